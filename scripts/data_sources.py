"""Pictures, questions and answers for training and testing, made the same way on every machine.

Sources: openclipart (public domain; Debian package ``openclipart-png``), Noto emoji (Apache-2.0; npm package
``emoji-datasource-google``), scenes and pages drawn here, words and numbers set in free fonts (Debian packages
``fonts-dejavu-core fonts-liberation fonts-freefont-ttf``).

Training and test never share a picture, a concept (all pictures of cats lie on one side), a font or a document.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mllm.errors import LoadError
from mllm.inputs import open_image

SPLITS = ("train", "test")
SIZE = 224
EMOJI_PACKAGE = "emoji-datasource-google@16.0.0"
CLIPART = Path("/usr/share/openclipart/png")
FONTS = Path("/usr/share/fonts/truetype")
MAX_FILE_BYTES = 400_000  # larger clip art files are few, slow to decode, and two of them are 168 megapixels


@dataclass(frozen=True)
class Turn:
    """One question with its answer, and other answers that are right too."""

    question: str
    answer: str
    accepted: tuple[str, ...] = ()
    kind: str = ""


@dataclass(frozen=True)
class Sample:
    """Pictures and the questions about them.

    Attributes:
        images: 224 x 224 RGB pictures, in the order of the prompt.
        turns: questions, each answerable from the pictures alone.
        source: openclipart, noto-emoji, scene, reading, document or text.
        group: what must not be split between training and test: a concept, a font, a document.
        evidence: for documents, the index of the page that holds the answer to the first question.
    """

    images: tuple[Image.Image, ...]
    turns: tuple[Turn, ...]
    source: str
    group: str
    evidence: int | None = None


def side(group: str, test_share: float = 0.2) -> str:
    """``train`` or ``test`` for a group, by its hash."""
    value = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    return "test" if value < test_share else "train"


def rng_for(*parts: object) -> random.Random:
    """A generator of its own for each purpose, the same on every machine."""
    return random.Random("/".join(map(str, parts)))


def article(noun: str) -> str:
    """The noun with its indefinite article, where it takes one."""
    if noun in ("food", "clothing"):
        return noun
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


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
NAME_QUESTION = "What is in the picture? Answer with one word."
CAPTION_QUESTION = "Describe the picture."


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


# --- scenes -----------------------------------------------------------------------------------------------------------

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 50, 170),
    "orange": (245, 140, 30),
    "black": (20, 20, 20),
    "gray": (140, 140, 140),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
NUMBERS = ("zero", "one", "two", "three", "four", "five")


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, color: tuple[int, ...]) -> None:
    """Draw a shape of radius ``r`` around (x, y)."""
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "square":
        draw.rectangle((x - r * 0.85, y - r * 0.85, x + r * 0.85, y + r * 0.85), fill=color)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r * 0.8), (x + r, y + r * 0.8)], fill=color)
    elif shape == "star":
        points = []
        for k in range(10):
            radius, angle = (r if k % 2 == 0 else r * 0.42), math.pi * k / 5 - math.pi / 2
            points.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
        draw.polygon(points, fill=color)
    elif shape == "cross":
        draw.rectangle((x - r, y - r * 0.3, x + r, y + r * 0.3), fill=color)
        draw.rectangle((x - r * 0.3, y - r, x + r * 0.3, y + r), fill=color)
    else:  # heart
        draw.pieslice((x - r, y - r * 0.9, x, y + r * 0.1), 180, 360, fill=color)
        draw.pieslice((x, y - r * 0.9, x + r, y + r * 0.1), 180, 360, fill=color)
        draw.polygon([(x - r, y - r * 0.42), (x + r, y - r * 0.42), (x, y + r)], fill=color)


def scene_samples(split: str, seed: int, n: int) -> Iterator[Sample]:
    """One to three coloured shapes: colour, shape, count, presence, side, caption. A combination has one split."""
    rng = rng_for("scenes", split, seed)
    made = 0
    while made < n:
        count = rng.choice((1, 1, 2, 2, 3))
        shapes, colors = rng.sample(SHAPES, count), rng.sample(sorted(COLORS), count)
        group = "scene " + " ".join(sorted(f"{c} {s}" for c, s in zip(colors, shapes, strict=True)))
        if count > 1 and side(group) != split:
            continue
        made += 1
        image = Image.new("RGB", (SIZE, SIZE), "white")
        draw = ImageDraw.Draw(image)
        for place, (shape, color) in enumerate(zip(shapes, colors, strict=True)):
            width = SIZE / count
            r = rng.uniform(0.3, 0.46) * width if count > 1 else rng.uniform(0.2, 0.42) * width
            x = place * width + width / 2
            y = rng.uniform(r + 4, SIZE - r - 4)
            draw_shape(draw, shape, x, y, r, COLORS[color])
        pick = rng.randrange(count)
        turns = [
            Turn(f"What color is the {shapes[pick]}?", colors[pick], kind="color"),
            Turn(f"Which shape is {colors[pick]}?", shapes[pick], kind="shape"),
            Turn("How many shapes are there?", NUMBERS[count], (str(count),), kind="count"),
        ]
        if rng.random() < 0.5:
            turns.append(Turn(f"Is there a {shapes[pick]}?", "yes", kind="presence"))
        else:
            absent = rng.choice([s for s in SHAPES if s not in shapes])
            turns.append(Turn(f"Is there a {absent}?", "no", kind="presence"))
        if count == 2:
            where = rng.randrange(2)
            turns.append(Turn(f"Which shape is on the {('left', 'right')[where]}?", shapes[where], kind="side"))
        listed = " and ".join(article(f"{c} {s}") for c, s in zip(colors, shapes, strict=True))
        turns.append(Turn(CAPTION_QUESTION, f"A picture of {listed}.", kind="caption"))
        rng.shuffle(turns)
        yield Sample((image,), tuple(turns[:4]), "scene", group)


# --- reading ----------------------------------------------------------------------------------------------------------

WORDS = [
    "apple",
    "bread",
    "chair",
    "clock",
    "cloud",
    "dance",
    "dream",
    "earth",
    "fire",
    "fish",
    "fruit",
    "garden",
    "glass",
    "gold",
    "hand",
    "home",
    "horse",
    "house",
    "juice",
    "key",
    "king",
    "lamp",
    "lemon",
    "light",
    "milk",
    "moon",
    "music",
    "night",
    "ocean",
    "paper",
    "piano",
    "plane",
    "queen",
    "radio",
    "rain",
    "river",
    "road",
    "salt",
    "ship",
    "shoe",
    "snow",
    "star",
    "stone",
    "storm",
    "sugar",
    "summer",
    "table",
    "tiger",
    "train",
    "tree",
    "water",
    "wheel",
    "wind",
    "winter",
    "wood",
    "world",
    "yellow",
    "zebra",
]


@cache
def fonts(split: str) -> tuple[str, ...]:
    """Free font files of one split; the families of one foundry are spread over both."""
    files = sorted(p for folder in ("dejavu", "liberation", "freefont") for p in (FONTS / folder).glob("*.ttf"))
    if len(files) < 20:
        raise LoadError("Free fonts are missing: apt-get install fonts-dejavu-core fonts-liberation fonts-freefont-ttf")
    return tuple(str(p) for p in files if side("font " + p.name, 0.25) == split)


def draw_text(
    image: Image.Image, text: str, font_file: str, box: tuple[int, int, int, int], fill: str = "black"
) -> None:
    """Write ``text`` as large as fits into the middle of ``box`` (left, top, right, bottom)."""
    left, top, right, bottom = box
    draw = ImageDraw.Draw(image)
    size = bottom - top
    while size > 8:
        font = ImageFont.truetype(font_file, size)
        bounds = draw.textbbox((0, 0), text, font=font)
        if bounds[2] - bounds[0] <= right - left and bounds[3] - bounds[1] <= bottom - top:
            break
        size -= 2
    x = left + (right - left - (bounds[2] - bounds[0])) / 2 - bounds[0]
    y = top + (bottom - top - (bounds[3] - bounds[1])) / 2 - bounds[1]
    draw.text((x, y), text, font=font, fill=fill)


def reading_samples(split: str, seed: int, n: int) -> Iterator[Sample]:
    """A large digit, letter, number or common word; training and test use different fonts."""
    rng = rng_for("reading", split, seed)
    for _ in range(n):
        kind = rng.choice(("digit", "letter", "number", "word"))
        font = rng.choice(fonts(split))
        if kind == "digit":
            text, question = str(rng.randrange(10)), "Which digit is shown?"
        elif kind == "letter":
            text, question = rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ"), "Which letter is shown?"
        elif kind == "number":
            text, question = str(rng.randrange(10, 100)), "Which number is shown?"
        else:
            text, question = rng.choice(WORDS), "Which word is written here?"
        image = Image.new("RGB", (SIZE, SIZE), "white")
        margin = rng.randrange(10, 60) if split == "train" else 24
        draw_text(image, text, font, (margin, margin, SIZE - margin, SIZE - margin))
        yield Sample((image,), (Turn(question, text, kind=kind),), "reading", f"font {Path(font).name}")


# --- documents --------------------------------------------------------------------------------------------------------

TITLES = ("Report", "Notes", "Invoice", "Letter", "Manual", "Menu")


def document_samples(split: str, seed: int, n: int, pages: tuple[int, ...] = (2, 3)) -> Iterator[Sample]:
    """Pages with a heading, lines of small text and one coloured shape; questions name a page or ask for it."""
    rng = rng_for("documents", split, seed)
    made = 0
    while made < n:
        count = rng.choice(pages)
        shapes, colors = rng.sample(SHAPES, count), rng.sample(sorted(COLORS), count)
        title = rng.choice(TITLES)
        group = f"document {title} " + " ".join(f"{c} {s}" for c, s in zip(colors, shapes, strict=True))
        if side(group) != split:
            continue
        made += 1
        font = rng.choice(fonts(split))
        images = []
        for number in range(count):
            image = Image.new("RGB", (SIZE, SIZE), "white")
            draw_text(image, f"{title}, page {number + 1}", font, (16, 8, SIZE - 16, 40))
            for line in range(4):
                words = " ".join(rng.choice(WORDS) for _ in range(6))
                draw_text(image, words, font, (16, 44 + 14 * line, SIZE - 16, 56 + 14 * line), fill="#555555")
            draw_shape(ImageDraw.Draw(image), shapes[number], SIZE / 2, 162, 50, COLORS[colors[number]])
            images.append(image)
        evidence = rng.randrange(count)
        other = rng.randrange(count)
        turns = (
            Turn(
                f"Which page shows a {colors[evidence]} shape? Answer with its number.",
                str(evidence + 1),
                (NUMBERS[evidence + 1],),
                kind="page",
            ),
            Turn(f"What color is the shape on page {other + 1}?", colors[other], kind="page color"),
            Turn(f"What color is the {shapes[evidence]}?", colors[evidence], kind="color"),
        )
        turns = turns if split == "train" else (turns[made % 3],)
        yield Sample(tuple(images), turns, "document", group, other if turns[0].kind == "page color" else evidence)


# --- text -------------------------------------------------------------------------------------------------------------

FACTS = {
    "What is the capital of {}?": {
        "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Germany": "Berlin",
        "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "England": "London", "China": "Beijing",
        "Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw", "Norway": "Oslo", "Ireland": "Dublin",
        "Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi", "Sweden": "Stockholm", "Hungary": "Budapest",
    },
    "What is the opposite of {}?": {
        "hot": "cold", "up": "down", "big": "small", "day": "night", "open": "closed", "fast": "slow",
        "happy": "sad", "old": "young", "wet": "dry", "hard": "soft", "early": "late", "full": "empty",
        "rich": "poor", "strong": "weak", "black": "white", "good": "bad", "left": "right", "light": "dark",
    },
    "Which language is spoken in {}?": {
        "Brazil": "Portuguese", "France": "French", "Germany": "German", "Japan": "Japanese", "Mexico": "Spanish",
        "Italy": "Italian", "Russia": "Russian", "Greece": "Greek", "Sweden": "Swedish", "Turkey": "Turkish",
    },
    "Which animal says {}?": {
        "meow": "cat", "woof": "dog", "moo": "cow", "quack": "duck", "oink": "pig", "neigh": "horse", "baa": "sheep",
    },
}  # fmt: skip
FACT_KINDS = dict(zip(FACTS, ("capital", "opposite", "language", "animal"), strict=True))


def text_samples(split: str, seed: int, n: int) -> Iterator[Sample]:
    """Short questions without a picture: facts and small sums."""
    rng = rng_for("text", split, seed)
    facts = [
        (template.format(key), answer, template)
        for template, table in FACTS.items()
        for key, answer in table.items()
        if side(f"fact {template} {key}", 0.7) == split
    ]
    rng.shuffle(facts)
    for number in range(n):
        if number % 4 == 3 or not facts:
            a, b = rng.randrange(1, 10), rng.randrange(1, 10)
            turn = Turn(f"What is {a} plus {b}?", str(a + b), kind="sum")
        else:
            question, answer, template = facts[number % len(facts)]
            turn = Turn(f"{question} Answer with one word.", answer, kind=FACT_KINDS[template])
        yield Sample((), (turn,), "text", turn.question)


SOURCES = {
    "pictures": picture_samples,
    "scenes": scene_samples,
    "reading": reading_samples,
    "documents": document_samples,
    "text": text_samples,
}

if __name__ == "__main__":
    for split_name in SPLITS:
        found = pictures(split_name)
        print(f"{split_name}: {len(found)} pictures of {len({p.group for p in found})} concepts,", end=" ")
        print(f"{sum(p.name is not None for p in found)} with a name, {len(fonts(split_name))} fonts")
        print("   ", dict(Counter(p.category for p in found)))
