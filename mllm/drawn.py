"""Pictures, questions and answers that are drawn: the same on every machine with the same fonts, nothing to fetch.

Coloured shapes, large words and numbers, small documents, and facts without a picture. Training and test share no
combination of shapes, no document and no fact, and no font where Debian's packages ``fonts-dejavu-core
fonts-liberation fonts-freefont-ttf`` are installed; elsewhere Pillow's own font is used, which looks different.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SPLITS = ("train", "test")
SIZE = 224
FONTS = Path("/usr/share/fonts/truetype")
PILLOW_FONT = "pillow"
CAPTION_QUESTION = "Describe the picture."


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
        shown_at: in a chat, the index of the turn that the pictures come with.
    """

    images: tuple[Image.Image, ...]
    turns: tuple[Turn, ...]
    source: str
    group: str
    evidence: int | None = None
    shown_at: int = 0


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
def debian_fonts() -> tuple[str, ...]:
    """Font files of Debian's three packages of free fonts; empty where they are not installed."""
    files = sorted(p for folder in ("dejavu", "liberation", "freefont") for p in (FONTS / folder).glob("*.ttf"))
    return tuple(map(str, files)) if len(files) >= 20 else ()


@cache
def fonts(split: str) -> tuple[str, ...]:
    """Fonts of one split; the families of one foundry are spread over both. Without Debian's, Pillow's own for both."""
    return tuple(name for name in debian_fonts() if side(f"font {Path(name).name}", 0.25) == split) or (PILLOW_FONT,)


def load_font(name: str, size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """A font of :func:`fonts` at a size in pixels."""
    return ImageFont.load_default(size) if name == PILLOW_FONT else ImageFont.truetype(name, size)


def draw_text(
    image: Image.Image, text: str, font_name: str, box: tuple[int, int, int, int], fill: str = "black"
) -> None:
    """Write ``text`` as large as fits into the middle of ``box`` (left, top, right, bottom)."""
    left, top, right, bottom = box
    draw = ImageDraw.Draw(image)
    size = bottom - top
    while size > 8:
        font = load_font(font_name, size)
        bounds = draw.textbbox((0, 0), text, font=font)
        if bounds[2] - bounds[0] <= right - left and bounds[3] - bounds[1] <= bottom - top:
            break
        size -= 2
    x = left + (right - left - (bounds[2] - bounds[0])) / 2 - bounds[0]
    y = top + (bottom - top - (bounds[3] - bounds[1])) / 2 - bounds[1]
    draw.text((x, y), text, font=font, fill=fill)


def reading_samples(split: str, seed: int, n: int, margins: tuple[int, int] | None = None) -> Iterator[Sample]:
    """A large digit, letter, number or common word; training and test use different fonts where there are several.

    ``margins`` is the range of the empty border in pixels: 10 to 59 for training without it, and 24 for test.
    """
    margins = margins or ((10, 59) if split == "train" else None)
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
        margin = rng.randint(*margins) if margins else 24
        draw_text(image, text, font, (margin, margin, SIZE - margin, SIZE - margin))
        yield Sample((image,), (Turn(question, text, kind=kind),), "reading", f"font {Path(font).name}")


# --- documents --------------------------------------------------------------------------------------------------------

TITLES = ("Report", "Notes", "Invoice", "Letter", "Manual", "Menu")


def document_samples(
    split: str, seed: int, n: int, pages: tuple[int, ...] = (2, 3), every_page: bool = False
) -> Iterator[Sample]:
    """Pages with a heading, lines of small text and one coloured shape; questions name a page or ask for it.

    A training sample holds all three questions, with ``every_page`` the same three about each page, in any order. A
    test sample holds one of them: three samples follow each other that have the same pages.
    """
    rng = rng_for("documents", split, seed)
    made = documents = 0
    while made < n:
        count = rng.choice(pages)
        shapes, colors = rng.sample(SHAPES, count), rng.sample(sorted(COLORS), count)
        title = rng.choice(TITLES)
        group = f"document {title} " + " ".join(f"{c} {s}" for c, s in zip(colors, shapes, strict=True))
        if side(group) != split:
            continue
        documents += 1
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
        asked = [(page, page) for page in range(count)] if every_page and split == "train" else [(evidence, other)]
        turns = [
            turn
            for shown, numbered in asked
            for turn in (
                Turn(
                    f"Which page shows a {colors[shown]} shape? Answer with its number.",
                    str(shown + 1),
                    (NUMBERS[shown + 1],),
                    kind="page",
                ),
                Turn(f"What color is the shape on page {numbered + 1}?", colors[numbered], kind="page color"),
                Turn(f"What color is the {shapes[shown]}?", colors[shown], kind="color"),
            )
        ]
        if every_page:
            rng.shuffle(turns)
        parts = [tuple(turns)] if split == "train" else [(turns[(documents + k) % 3],) for k in range(3)]
        for part in parts[: n - made]:
            made += 1
            shows = other if part[0].kind == "page color" else evidence
            yield Sample(tuple(images), part, "document", group, shows)


def page_samples(split: str, seed: int, n: int, pages: tuple[int, ...] = (4, 5, 6, 7, 8)) -> Iterator[Sample]:
    """Pages with lines of small text and one shape, each of another colour; a question is about one page."""
    rng = rng_for("pages", split, seed)
    made = 0
    while made < n:
        count = rng.choice(pages)
        colors, shapes = rng.sample(sorted(COLORS), count), [rng.choice(SHAPES) for _ in range(count)]
        evidence = rng.randrange(count)
        group = f"page {colors[evidence]} {shapes[evidence]} of {count}, {evidence + 1}"
        if side(group) != split:
            continue
        made += 1
        font = rng.choice(fonts(split))
        images = []
        for shape, color in zip(shapes, colors, strict=True):
            image = Image.new("RGB", (SIZE, SIZE), "white")
            for line in range(4):
                words = " ".join(rng.choice(WORDS) for _ in range(6))
                draw_text(image, words, font, (16, 12 + 14 * line, SIZE - 16, 24 + 14 * line), fill="#555555")
            draw_shape(ImageDraw.Draw(image), shape, SIZE / 2, 142, 60, COLORS[color])
            images.append(image)
        turn = Turn(f"Which shape is {colors[evidence]}?", shapes[evidence], kind="page shape")
        yield Sample(tuple(images), (turn,), "page", group, evidence)


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


#: name -> samples(split, seed, n)
DRAWN = {
    "scenes": scene_samples,
    "reading": reading_samples,
    "documents": document_samples,
    "pages": page_samples,
    "text": text_samples,
}
