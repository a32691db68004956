"""What the offline tasks share: data check, prompts and scores. Loaded by lmms-eval through ``!function``.

Answers are compared by their first words: the reply is lower-cased, stripped of punctuation and articles, and is right
if it begins with an accepted answer. Captions are scored by the F1 of their content words against the reference.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from mllm.errors import EvalError

DATA = Path(__file__).parent / "data"
_ARTICLES = {"a", "an", "the"}
# words that any caption has: they must not earn points
_FILLERS = _ARTICLES | {
    "picture",
    "image",
    "photo",
    "drawing",
    "of",
    "and",
    "is",
    "it",
    "in",
    "this",
    "with",
    "on",
    "shows",
}


@cache
def _manifest() -> dict[str, Any]:
    return json.loads((DATA / "data.json").read_text(encoding="utf-8"))


def check_data(dataset: Any) -> Any:
    """The dataset itself, once its file is the one that was committed; scores of other data could not be compared."""
    task = dataset[0]["task"]
    path = DATA / f"{task}.parquet"
    found, expected = hashlib.sha256(path.read_bytes()).hexdigest(), _manifest()[task]["sha256"]
    if found != expected:
        raise EvalError(
            f"{path.name} has the SHA-256 {found}, expected {expected}: the task's data was changed or damaged. "
            "Restore it from version control, or build it and its data.json with scripts/build_eval_data.py."
        )
    return dataset


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    """The pictures of a document, in order; an empty list for text-only tasks."""
    return [image.convert("RGB") for image in doc["images"]]


def doc_to_text(doc: dict[str, Any]) -> str:
    """The question."""
    return doc["question"]


def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """One user turn: pictures first, then the question."""
    content = [{"type": "image", "url": image} for image in doc_to_visual(doc)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}]


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    return [word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in _ARTICLES]


def is_right(reply: str, accepted: list[str]) -> bool:
    """Whether the reply begins with one of the accepted answers."""
    said = words(reply)
    return any(said[: len(words(answer))] == words(answer) for answer in accepted if words(answer))


def content_f1(reply: str, reference: str) -> float:
    """F1 of the sets of content words, 0 to 1."""
    said, wanted = (set(words(text)) - _FILLERS for text in (reply, reference))
    common = len(said & wanted)
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def score_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Accuracy of one short answer."""
    return {"accuracy": float(is_right(results[0], list(doc["answers"])))}


def score_caption(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Content-word F1 of one caption, the best over the references."""
    return {"content_f1": max(content_f1(results[0], reference) for reference in doc["answers"])}


def mean(values: list[float]) -> float:
    """Aggregation."""
    return sum(values) / len(values)
