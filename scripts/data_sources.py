"""Pictures, questions and answers for training and testing, made the same way on every machine.

Sources: openclipart (public domain; Debian package ``openclipart-png``), Noto emoji (Apache-2.0; npm package
``emoji-datasource-google``), and what :mod:`mllm.drawn` draws, with free fonts (Debian packages
``fonts-dejavu-core fonts-liberation fonts-freefont-ttf``). For test alone, the Jargon File (public domain; Debian
package ``jargon-text``).

Training and test never share a picture, a concept (all pictures of cats lie on one side), a font or a document.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import random
import re
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial, wraps
from pathlib import Path

from PIL import Image

from mllm import drawn
from mllm.drawn import CAPTION_QUESTION, SIZE, SPLITS, Sample, Turn, article, fonts, rng_for, side
from mllm.errors import LoadError
from mllm.inputs import open_image

EMOJI_PACKAGE = "emoji-datasource-google@16.0.0"
CLIPART = Path("/usr/share/openclipart/png")
MAX_FILE_BYTES = 400_000  # larger clip art files are few, slow to decode, and two of them are 168 megapixels


# --- pictures ---------------------------------------------------------------------------------------------------------

#: folder of openclipart, or category/subcategory of the emoji -> what we call it
CLIPART_CATEGORIES = {
    "animals": "animal",
    "food/beverages": "drink",
    "food": "food",
    "plants": "plant",
    "transportation/roadsigns": None,
    "transportation/aiga-symbols": None,
    "transportation": "vehicle",
    "buildings": "building",
    "tools": "tool",
    "people/clothing": "clothing",
    "people/smilies": "face",
    "people/stickmen": None,
    "people/bodypart": None,
    "people": "person",
    "recreation/music": "musical instrument",
    "signs_and_symbols/flags/semaphore": None,
    "signs_and_symbols/flags": "flag",
    "shapes/arrows": "arrow",
    "shapes/stars": None,
}
EMOJI_CATEGORIES = {
    "animal-": "animal",
    "plant-": "plant",
    "food-": "food",
    "drink": "drink",
    "transport-ground": "vehicle",
    "transport-air": "vehicle",
    "transport-water": "vehicle",
    "place-building": "building",
    "place-religious": "building",
    "tool": "tool",
    "clothing": "clothing",
    "musical-instrument": "musical instrument",
    "country-flag": "flag",
    "face-": "face",
    "person": "person",
    "arrow": "arrow",
}
_NOISE = {"face", "with", "and", "of", "the", "in", "on", "for", "symbol", "button", "sign", "icon", "simple", "black"}
_NOISE |= {"white", "old", "new", "small", "large", "big", "red", "green", "blue", "yellow", "left", "right", "one"}


@dataclass(frozen=True)
class Picture:
    """A picture file, what it shows, and where it comes from."""

    path: Path
    category: str
    name: str | None
    group: str
    source: str


@cache
def emoji_folder() -> Path:
    """Unpacked emoji package; fetched with npm into the user's cache the first time."""
    from mllm.default_model import cache_folder

    root = cache_folder() / "training-data" / EMOJI_PACKAGE
    if not (root / "package" / "emoji.json").exists():
        if shutil.which("npm") is None:
            raise LoadError(f"npm is needed once to fetch {EMOJI_PACKAGE}. Install Node.js.")
        root.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", EMOJI_PACKAGE], cwd=root, check=True, stdout=subprocess.DEVNULL)
        archive = next(root.glob("*.tgz"))
        with tarfile.open(archive) as tar:
            wanted = [m for m in tar if m.name.endswith(("emoji.json", "LICENSE")) or "/img/google/64/" in m.name]
            tar.extractall(root, members=wanted, filter="data")
        archive.unlink()
    return root / "package"


def emoji_pictures() -> list[Picture]:
    """Noto emoji of things, one per concept and without skin-tone variants."""
    folder, pictures = emoji_folder(), []
    for item in json.loads((folder / "emoji.json").read_text(encoding="utf-8")):
        kind = item["subcategory"]
        category = next((name for prefix, name in EMOJI_CATEGORIES.items() if kind.startswith(prefix)), None)
        path = folder / "img" / "google" / "64" / item["image"]
        if category is None or not path.exists():
            continue
        name = item["short_name"].replace("flag-", "flag ").replace("_", " ").replace("-", " ").strip()
        name = (item["name"] or name).lower() if category != "flag" else None
        words = [w for w in re.findall(r"[a-z]+", name or "") if w not in _NOISE]
        short = " ".join(words[:2]) if 0 < len(words) <= 2 else None
        group = words[-1] if words else f"emoji {item['unified']}"
        short = None if category in ("face", "person") else short
        pictures.append(Picture(path, category, short, group, "noto-emoji"))
    return pictures


@cache
def _vocabulary() -> frozenset[str]:
    """Words that name things, to tell names from authors in clip art file names."""
    words: Counter[str] = Counter()
    for item in json.loads((emoji_folder() / "emoji.json").read_text(encoding="utf-8")):
        for name in [item["name"] or "", *item["short_names"]]:
            words.update(re.findall(r"[a-z]{3,}", name.lower()))
    return frozenset(words) - _NOISE


def clipart_pictures() -> list[Picture]:
    """openclipart pictures of things; the name only where the file name tells it."""
    if not CLIPART.is_dir():
        raise LoadError(f"{CLIPART} does not exist. Install it with: apt-get install openclipart-png")
    pictures = []
    for path in sorted(CLIPART.rglob("*.png")):
        if path.is_symlink() or path.stat().st_size > MAX_FILE_BYTES:
            continue
        folder = path.parent.relative_to(CLIPART).as_posix()
        prefix = next((p for p in CLIPART_CATEGORIES if folder == p or folder.startswith(p + "/")), None)
        category = CLIPART_CATEGORIES.get(prefix) if prefix else None
        if category is None:
            continue
        words = re.findall(r"[a-z]{3,}", path.stem.lower())
        known = [w for w in words[:3] if w in _vocabulary()]
        name = known[-1] if known and category not in ("flag", "face", "person", "arrow") else None
        # without a known name, all files that begin with the same word stay together
        pictures.append(Picture(path, category, name, name or (words[0] if words else path.stem), "openclipart"))
    return pictures


@cache
def pictures(split: str) -> tuple[Picture, ...]:
    """All usable pictures of one split; equal files count once."""
    chosen, seen = [], set()
    for picture in [*clipart_pictures(), *emoji_pictures()]:
        digest = hashlib.sha256(picture.path.read_bytes()).hexdigest()
        if digest not in seen and side(picture.group) == split:
            chosen.append(picture)
        seen.add(digest)
    return tuple(chosen)


def square(image: Image.Image, rng: random.Random | None = None) -> Image.Image:
    """The picture on a white square; with ``rng``, at a random size and place, sometimes mirrored."""
    scale, dx, dy = 0.9, 0.5, 0.5
    if rng is not None:
        scale, dx, dy = rng.uniform(0.6, 1.0), rng.random(), rng.random()
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    factor = SIZE * scale / max(image.size)
    width, height = (max(1, round(s * factor)) for s in image.size)
    canvas = Image.new("RGB", (SIZE, SIZE), "white")
    canvas.paste(image.resize((width, height)), (round((SIZE - width) * dx), round((SIZE - height) * dy)))
    return canvas


CATEGORIES = sorted({name for name in (*CLIPART_CATEGORIES.values(), *EMOJI_CATEGORIES.values()) if name})
KIND_QUESTION = "What kind of thing is this? Answer with one word."
ORDINALS = ("first", "second", "third")
NAME_QUESTION = "What is in the picture? Answer with one word."


def picture_samples(split: str, seed: int, n: int) -> Iterator[Sample]:
    """Real pictures: their kind, a choice of two kinds, their name, a caption."""
    rng = rng_for("pictures", split, seed)
    by_category: dict[str, list[Picture]] = {}
    for picture in pictures(split):
        by_category.setdefault(picture.category, []).append(picture)
    # frequent kinds more often, but not in proportion: flags and animals would drown the rest
    names = sorted(by_category)
    weights = [math.sqrt(len(by_category[name])) for name in names]
    pools = {name: rng.sample(items, len(items)) for name, items in sorted(by_category.items())}
    used: Counter[str] = Counter()
    for _ in range(n):
        category = rng.choices(names, weights)[0]
        picture = pools[category][used[category] % len(pools[category])]
        used[category] += 1
        image = square(open_image(picture.path), rng if split == "train" else None)
        other = rng.choice([name for name in CATEGORIES if name != picture.category])
        pair = rng.sample([picture.category, other], 2)
        shown = picture.name or picture.category
        turns = [
            Turn(KIND_QUESTION, picture.category, kind="kind"),
            Turn(f"Is this {article(pair[0])} or {article(pair[1])}?", picture.category, kind="choice"),
            Turn(CAPTION_QUESTION, _caption(picture), kind="caption"),
        ]
        if picture.name:
            turns.append(Turn(NAME_QUESTION, shown, (picture.category,), kind="name"))
        rng.shuffle(turns)
        yield Sample((image,), tuple(turns), picture.source, picture.group)


def _caption(picture: Picture) -> str:
    if picture.name and picture.name != picture.category:
        return f"A picture of {article(picture.name)}, {article(picture.category)}."
    return f"A picture of {article(picture.category)}."


def pair_samples(split: str, seed: int, n: int) -> Iterator[Sample]:
    """Two or three real pictures of different kinds, and questions that name one of them."""
    rng = rng_for("pairs", split, seed)
    singles = picture_samples(split, f"pairs {seed}", 8 * n + 8)
    for _ in range(n):
        shown: dict[str, tuple[Sample, str]] = {}
        count = rng.choice((2, 2, 3))
        while len(shown) < count:
            sample = next(singles)
            category = next(turn.answer for turn in sample.turns if turn.kind == "kind")
            shown.setdefault(category, (sample, category))
        turns = []
        for place, (sample, category) in enumerate(shown.values()):
            which = f"the {ORDINALS[place]}"
            turns.append(Turn(f"What kind of thing is in {which} picture?", category, kind="picture kind"))
            turns.append(Turn(f"Which picture shows {article(category)}?", which, kind="which picture"))
            names = [turn.answer for turn in sample.turns if turn.kind == "name"]
            turns += [Turn(f"What is in {which} picture?", name, kind="picture name") for name in names]
        rng.shuffle(turns)
        samples = [sample for sample, _ in shown.values()]
        yield Sample(tuple(s.images[0] for s in samples), tuple(turns[:5]), samples[0].source, samples[0].group)


# --- what is drawn ----------------------------------------------------------------------------------------------------


def with_fonts(samples: Callable[..., Iterator[Sample]]) -> Callable[..., Iterator[Sample]]:
    """Samples that have a font of their own on either side, or none."""

    @wraps(samples)
    def checked(*arguments: object, **options: object) -> Iterator[Sample]:
        if not drawn.debian_fonts():
            raise LoadError(
                "Free fonts are missing: apt-get install fonts-dejavu-core fonts-liberation fonts-freefont-ttf"
            )
        return samples(*arguments, **options)

    return checked


# --- text alone -------------------------------------------------------------------------------------------------------

_REQUESTS = (
    "Explain in one sentence what {} is.",
    "Write one sentence about {}.",
    "Give me one fact about {}.",
    "Why do people like {}? Answer in one or two sentences.",
    "Name three things that have to do with {}.",
    "What should a child know about {}? Answer briefly.",
)
_TOPICS = (
    "the sun", "a library", "bread", "music", "a bicycle", "the ocean", "chess", "a garden", "winter", "a computer",
    "the moon", "tea", "a hospital", "history", "football", "a bridge", "sleep", "mathematics", "a dog", "a river",
    "cooking", "a volcano", "reading", "a train", "friendship", "the internet", "rice", "a forest", "painting", "rain",
    "a museum", "gravity", "a market", "swimming", "honey", "a mountain", "electricity", "a school", "dancing", "salt",
    "an island", "photography", "a farm", "paper", "the heart", "a lighthouse", "glass", "a festival", "trees", "maps",
)  # fmt: skip
_SAYINGS = (
    "Hello! How are you?", "Who are you?", "Thank you for your help.", "Can you see pictures?", "Good morning!",
    "Tell me a joke.", "What can you do for me?", "Say something nice.", "Goodbye!", "What day comes after Monday?",
    "Translate 'good night' into French.", "How many days does a week have?", "Spell the word house.",
    "What is the largest planet?", "Which is heavier, a kilogram of iron or a kilogram of feathers?",
)  # fmt: skip


def requests(split: str) -> list[str]:
    """Things to ask without a picture; what is replied is for a language model to say."""
    asked = [request.format(topic) for request in _REQUESTS for topic in _TOPICS]
    return [request for request in (*asked, *_SAYINGS) if side(request) == split]


# --- text for test alone ----------------------------------------------------------------------------------------------


def following_samples(split: str, seed: int, n: int) -> Iterator[Sample]:
    """Instructions without a picture whose results can be checked; training has none of these kinds."""
    rng = rng_for("following", split, seed)
    for _ in range(n):
        kind = rng.choice(("repeat", "larger number", "next number", "alphabet", "first of a list", "last of a list"))
        some, number = rng.sample(drawn.WORDS, 4), rng.randrange(10, 99)
        if kind == "repeat":
            question, answer = f"Repeat these words: {' '.join(some[:3])}.", " ".join(some[:3])
        elif kind == "larger number":
            other = rng.choice([value for value in range(10, 100) if value != number])
            question, answer = f"Which number is larger, {number} or {other}?", str(max(number, other))
        elif kind == "next number":
            number = rng.randrange(10, 300)
            question, answer = f"Which number comes right after {number}?", str(number + 1)
        elif kind == "alphabet":
            question, answer = f"Which word comes first in the alphabet, {some[0]} or {some[1]}?", min(some[:2])
        else:
            which, place = ("first", 0) if kind == "first of a list" else ("last", -1)
            question, answer = f"What is the {which} word of this list: {', '.join(some)}?", some[place]
        yield Sample((), (Turn(question, answer, kind=kind),), "following", question)


JARGON = Path("/usr/share/doc/jargon-text/jargon.txt.gz")
#: entries that not everybody wants to read
_CRUDE = re.compile(r"fuck|shit|piss|sex|porn|crap|bitch|nazi|suck|ass\b|arse|drug|kill|rape|whore|damn|hell\b", re.I)


def passages() -> list[str]:
    """Paragraphs of the Jargon File as single lines of 30 to 150 words, in ASCII, without marks of references."""
    if not JARGON.exists():
        raise LoadError(f"{JARGON} does not exist. Install it with: apt-get install jargon-text")
    text = gzip.decompress(JARGON.read_bytes()).decode()
    text = text.translate(str.maketrans({"{": "", "}": "", "“": '"', "”": '"', "‘": "'", "’": "'", "—": "--"}))
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    return [
        part
        for part in dict.fromkeys(paragraphs)
        if 30 <= len(part.split()) <= 150 and part.isascii() and not re.search(r"[\[\]|<>*_=\\]", part)
        if not _CRUDE.search(part)
    ]


def passage_samples(split: str, seed: int, n: int) -> Iterator[Sample]:
    """A passage up to a word that it ends in soon, and that word; one to each passage, all of them test."""
    rng = rng_for("passages", split, seed)
    found = passages()
    for passage in rng.sample(found, min(n, len(found))):
        words = passage.split()
        places = [k for k in range(len(words) // 2, len(words)) if re.fullmatch(r"[a-z]{3,}[.,;]?", words[k])]
        if places:
            place = rng.choice(places)
            word = words[place].rstrip(".,;")
            yield Sample((), (Turn(" ".join(words[:place]), word, kind="last word"),), "jargon-file", passage)


# --- all of them ------------------------------------------------------------------------------------------------------

SOURCES = {
    "pictures": picture_samples,
    "pairs": pair_samples,
    "scenes": drawn.scene_samples,
    "reading": with_fonts(drawn.reading_samples),
    "documents": with_fonts(drawn.document_samples),
    "every page": with_fonts(partial(drawn.document_samples, pages=(1, 2, 3), every_page=True)),
    "text": drawn.text_samples,
}

#: what no model is trained on
TEST_SOURCES = {"following": following_samples, "passages": passage_samples}

if __name__ == "__main__":
    for split_name in SPLITS:
        found = pictures(split_name)
        print(f"{split_name}: {len(found)} pictures of {len({p.group for p in found})} concepts,", end=" ")
        print(f"{sum(p.name is not None for p in found)} with a name, {len(fonts(split_name))} fonts")
        print("   ", dict(Counter(p.category for p in found)))
