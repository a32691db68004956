"""Scores of the offline tasks: short answers are right or wrong, captions are compared by their content words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NUMBERS += ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
#: words that any caption has: they must not earn points
_FILLERS = _ARTICLES | {
    "picture",
    "image",
    "photo",
    "drawing",
    "illustration",
    "shows",
    "showing",
    "shown",
    "of",
    "and",
}
_FILLERS |= {"is", "are", "it", "in", "on", "with", "this", "there"}


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles, small number words as digits.

    Articles stay where nothing else is left: ``A`` can be the letter that was asked for.
    """
    found = [_DIGITS.get(word, word) for word in re.findall(r"[^\W_]+", text.lower())]
    return [word for word in found if word not in _ARTICLES] or found


def _contains(said: Sequence[str], wanted: Sequence[str]) -> bool:
    size = len(wanted)
    return any(list(said[i : i + size]) == list(wanted) for i in range(len(said) - size + 1)) if size else False


def is_right(reply: str, accepted: Sequence[str], options: Sequence[str] = ()) -> bool:
    """Whether a reply gives one of the accepted answers.

    It does if it is one, or if it contains one as whole words and names none of the other ``options``: "a red star" is
    right for "red", "red or blue" is not.
    """
    said = words(reply)
    right = [words(answer) for answer in accepted if words(answer)]
    if said in right:
        return True
    if not any(_contains(said, answer) for answer in right):
        return False
    wrong = [words(option) for option in options]
    return not any(_contains(said, o) for o in wrong if o and not any(_contains(answer, o) for answer in right))


def item_f1(reply: str, reference: str) -> float:
    """F1 of the things that a list with commas names, 0 to 1; in any order, each as often as it is there."""
    said, wanted = (Counter(" ".join(words(item)) for item in text.split(",")) for text in (reply, reference))
    common = (said & wanted).total()
    return 2 * common / (said.total() + wanted.total()) if common else 0.0


def content_words(text: str) -> set[str]:
    """The words of a caption that say what is in the picture."""
    return set(words(text)) - _FILLERS


def content_f1(reply: str, reference: str) -> float:
    """F1 of the sets of content words, 0 to 1: harmonic mean of their precision and recall."""
    said, wanted = content_words(reply), content_words(reference)
    common = len(said & wanted)
    return 2 * common / (len(said) + len(wanted)) if common else 0.0
