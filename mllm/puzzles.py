"""Small drawn pictures (96 x 96) with questions that need a look at the right place, and tight labels for each.

What :mod:`mllm.drawn` draws is easy to guess: one to three shapes, one question about each. Here a picture is a grid of
coloured shapes and characters, and questions look things up: by shape, by colour, by place, by picture, by page. Each
kind of question has its chance level in :data:`CHANCE`. Training and test share no set of things, no font (where
Debian's are installed), no word, no document and no sum.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from mllm.drawn import COLORS, FACTS, NUMBERS, SHAPES, WORDS, Sample, Turn, draw_shape, fonts, load_font, rng_for, side

SIDE = 96
GRID = 3
CELL = SIDE // GRID
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"
DIGITS = "0123456789"
#: what a thing can be, in the order of the dense labels
GLYPHS = (*SHAPES, *DIGITS, *LETTERS, "I", "O", "Q")
_GROUNDS = ((255, 255, 255), (255, 255, 255), (240, 240, 230), (225, 235, 245), (235, 225, 240))

#: kind of question -> what blind guessing among the possible answers gets right
CHANCE = {
    "color": 1 / 8,
    "shape": 1 / 6,
    "shape at": 1 / 6,
    "color at": 1 / 8,
    "where": 1 / 9,
    "count": 1 / 5,
    "count color": 1 / 4,
    "pair": 1 / 2,
    "same": 1 / 2,
    "beside": 1 / 2,
    "choice": 1 / 2,
    "list": 0.0,
    "character at": 1 / 33,
    "character where": 1 / 9,
    "character color": 1 / 8,
    "digit": 1 / 10,
    "letter": 1 / 23,
    "number": 1 / 90,
    "word": 0.0,
    "picture color": 1 / 8,
    "picture shape": 1 / 6,
    "which picture": 1 / 3,
    "page": 1 / 3,
    "page number": 1 / 90,
    "page color": 1 / 8,
    "it": 1 / 9,
    "sum": 1 / 19,
    "larger": 1 / 2,
    "repeat": 0.0,
    "fact": 0.0,
}


@dataclass(frozen=True)
class Thing:
    """A shape or a character in a picture.

    Attributes:
        glyph: one of :data:`GLYPHS`.
        color: one of :data:`mllm.drawn.COLORS`.
        box: left, top, right, bottom in pixels.
        row, column: cell of the grid, counted from 1; 0 outside a grid.
        order: place in its word, counted from 1; 0 for what stands alone.
    """

    glyph: str
    color: str
    box: tuple[float, float, float, float]
    row: int = 0
    column: int = 0
    order: int = 0

    @property
    def place(self) -> str:
        return f"{ROWS[self.row - 1]} {COLUMNS[self.column - 1]}"


@dataclass(frozen=True)
class Picture:
    """A drawn picture and what is in it."""

    image: Image.Image
    things: tuple[Thing, ...]


_font = lru_cache(maxsize=2000)(load_font)


def _canvas(rng: random.Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIDE, SIDE), rng.choice(_GROUNDS))
    return image, ImageDraw.Draw(image)


def _fitting(font_name: str, text: str, width: float, height: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest size of a font, up to ``height``, at which the text is no wider than ``width``."""
    font = _font(font_name, int(height))
    wide = font.getlength(text)
    return font if wide <= width else _font(font_name, max(8, int(height * width / wide)))


def _draw_word(
    draw: ImageDraw.ImageDraw, text: str, font_name: str, color: str, x: float, y: float, width: float, height: float
) -> list[Thing]:
    """Write characters around (x, y); returns each with its box."""
    font = _fitting(font_name, text, width, height)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    x0, y0 = x - (left + right) / 2, y - (top + bottom) / 2
    draw.text((x0, y0), text, font=font, fill=COLORS[color])
    ends = [font.getlength(text[: k + 1]) for k in range(len(text))]
    starts = [0.0, *ends[:-1]]
    alone = len(text) == 1
    return [
        Thing(glyph, color, (x0 + start, y0 + top, x0 + end, y0 + bottom), order=0 if alone else k + 1)
        for k, (glyph, start, end) in enumerate(zip(text, starts, ends, strict=True))
    ]


def _draw_in_cell(
    draw: ImageDraw.ImageDraw, rng: random.Random, glyph: str, color: str, row: int, column: int, font: str
) -> Thing:
    x, y = (column - 0.5) * CELL, (row - 0.5) * CELL
    if glyph in SHAPES:
        r = rng.uniform(9, 14)
        x, y = x + rng.uniform(r - 15, 15 - r), y + rng.uniform(r - 15, 15 - r)
        draw_shape(draw, glyph, x, y, r, COLORS[color])
        return Thing(glyph, color, (x - r, y - r, x + r, y + r), row, column)
    height = rng.uniform(22, 32)
    x, y = x + rng.uniform(-3, 3), y + rng.uniform(-3, 3)
    thing = _draw_word(draw, glyph, font, color, x, y, 28, height)[0]
    return Thing(glyph, color, thing.box, row, column)


def _places(rng: random.Random, count: int) -> list[tuple[int, int]]:
    return rng.sample([(row, column) for row in range(1, GRID + 1) for column in range(1, GRID + 1)], count)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


# --- one picture: shapes ----------------------------------------------------------------------------------------------


def shape_grid(split: str, rng: random.Random, count: int | None = None) -> Picture:
    """One to five coloured shapes in a 3 x 3 grid; shapes and colours may repeat, a pair of both may not."""
    while True:
        wanted = count or rng.randint(1, 5)
        # few colours and shapes to a picture, so that repeats are common and single attributes do not give it away
        colors, shapes = rng.sample(sorted(COLORS), min(8, wanted + 1)), rng.sample(SHAPES, min(6, wanted + 1))
        pairs = rng.sample([(c, s) for c in colors for s in shapes], wanted)
        if wanted < 2 or side("grid " + " ".join(sorted(f"{c} {s}" for c, s in pairs))) == split:
            break
    image, draw = _canvas(rng)
    things = [
        _draw_in_cell(draw, rng, shape, color, *place, font="")
        for (color, shape), place in zip(pairs, _places(rng, wanted), strict=True)
    ]
    return Picture(image, tuple(things))


def _once(values: list[str]) -> list[int]:
    return [k for k, value in enumerate(values) if values.count(value) == 1]


def shape_turns(rng: random.Random, picture: Picture) -> list[Turn]:
    """Every kind of question that the picture of a shape grid can answer, each once or twice."""
    things, count = picture.things, len(picture.things)
    colors, shapes = [t.color for t in things], [t.glyph for t in things]
    pairs = set(zip(colors, shapes, strict=True))
    turns = []
    for k in _once(shapes)[:3]:
        turns.append(Turn(f"What color is the {shapes[k]}?", colors[k], kind="color"))
    for k in _once(colors)[:3]:
        turns.append(Turn(f"Which shape is {colors[k]}?", shapes[k], kind="shape"))
    for thing in rng.sample(things, min(2, count)):
        turns.append(Turn(f"Which shape is at the {thing.place}?", thing.glyph, kind="shape at"))
    for thing in rng.sample(things, min(2, count)):
        turns.append(Turn(f"What color is at the {thing.place}?", thing.color, kind="color at"))
    for thing in rng.sample(things, min(2, count)):
        turns.append(Turn(f"Where is the {thing.color} {thing.glyph}?", thing.place, kind="where"))
    turns.append(Turn("How many shapes are there?", NUMBERS[count], (str(count),), kind="count"))
    color = rng.choice(colors) if rng.random() < 0.75 else rng.choice([c for c in COLORS if c not in colors])
    number = colors.count(color)
    if number <= 3:
        turns.append(Turn(f"How many shapes are {color}?", NUMBERS[number], (str(number),), kind="count color"))
    thing = rng.choice(things)
    turns.append(Turn(f"Is there a {thing.color} {thing.glyph}?", "yes", kind="pair"))
    # a pair that is not there, of a colour and a shape that mostly are
    absent = [(c, s) for c in set(colors) for s in set(shapes) if (c, s) not in pairs]
    if not absent:
        absent = [(c, thing.glyph) for c in COLORS if (c, thing.glyph) not in pairs]
    color, shape = rng.choice(sorted(absent))
    turns.append(Turn(f"Is there a {color} {shape}?", "no", kind="pair"))
    thing = rng.choice(things)
    options = [thing.glyph, rng.choice([shape for shape in SHAPES if shape != thing.glyph])]
    rng.shuffle(options)
    question = f"Is the shape at the {thing.place} a {options[0]} or a {options[1]}?"
    turns.append(Turn(question, thing.glyph, kind="choice"))
    in_order = sorted(things, key=lambda thing: (thing.row, thing.column))
    turns.append(Turn("What is in the picture?", ", ".join(f"{t.color} {t.glyph}" for t in in_order), kind="list"))
    single = [things[k] for k in _once(shapes)]
    if len(single) >= 2:
        one, other = rng.sample(single, 2)
        same = one.color == other.color
        # different colours are more common: even out the answers
        if same or rng.random() < 0.25:
            turns.append(Turn(f"Are the {one.glyph} and the {other.glyph} the same color?", _yes(same), kind="same"))
        apart = [(a, b) for a in single for b in single if a.column != b.column]
        if apart:
            one, other = rng.choice(apart)
            left = rng.random() < 0.5
            answer = _yes((one.column < other.column) == left)
            way = "left" if left else "right"
            turns.append(Turn(f"Is the {one.glyph} {way} of the {other.glyph}?", answer, kind="beside"))
    return turns


# --- one picture: characters ------------------------------------------------------------------------------------------


def character_grid(split: str, rng: random.Random) -> Picture:
    """Two to six different characters in a 3 x 3 grid, each in its colour, in one font."""
    font = rng.choice(fonts(split))
    while True:
        count = rng.randint(2, 6)
        glyphs = rng.sample(DIGITS + LETTERS, count)
        if side("characters " + "".join(sorted(glyphs))) == split:
            break
    image, draw = _canvas(rng)
    things = [
        _draw_in_cell(draw, rng, glyph, rng.choice(sorted(COLORS)), *place, font=font)
        for glyph, place in zip(glyphs, _places(rng, count), strict=True)
    ]
    return Picture(image, tuple(things))


def character_turns(rng: random.Random, picture: Picture) -> list[Turn]:
    """What stands where, where something stands, and its colour."""
    turns, things = [], picture.things
    for thing in rng.sample(things, min(3, len(things))):
        turns.append(Turn(f"Which character is at the {thing.place}?", thing.glyph, kind="character at"))
    for thing in rng.sample(things, min(3, len(things))):
        turns.append(Turn(f"Where is the character {thing.glyph}?", thing.place, kind="character where"))
    for thing in rng.sample(things, min(3, len(things))):
        turns.append(Turn(f"What color is the character {thing.glyph}?", thing.color, kind="character color"))
    return turns


def _test_word(text: str) -> bool:
    return side(f"string {text}") == "test"


def random_text(split: str, rng: random.Random) -> tuple[str, str]:
    """A digit, letter, two-digit number or word of capitals, and its kind; words and numbers have a side."""
    kind = rng.choice(("digit", "letter", "number", "word", "word"))
    if kind == "digit":
        return rng.choice(DIGITS), kind
    if kind == "letter":
        return rng.choice(LETTERS), kind
    while True:
        if kind == "number":
            text = str(rng.randrange(10, 100))
        elif split == "train" and rng.random() < 0.5:  # any letters, so that words have to be spelled out
            text = "".join(rng.choice(LETTERS + "IOQ") for _ in range(rng.randint(2, 5)))
        else:
            text = rng.choice([word.upper() for word in WORDS if len(word) <= 5])
        if _test_word(text) == (split == "test"):
            return text, kind


def reading_picture(split: str, rng: random.Random, text: str) -> Picture:
    """A text across the picture, at a random size and place."""
    font = rng.choice(fonts(split))
    image, draw = _canvas(rng)
    width = rng.uniform(60, 92) if len(text) > 2 else rng.uniform(34, 88)
    height = rng.uniform(34, 84)
    dark = [name for name, rgb in COLORS.items() if sum(rgb) < 480]
    font_used = _fitting(font, text, width, height)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font_used)
    wide, high = (right - left) / 2 + 1, (bottom - top) / 2 + 1
    x = rng.uniform(min(wide, SIDE / 2), max(SIDE - wide, SIDE / 2))
    y = rng.uniform(min(high, SIDE / 2), max(SIDE - high, SIDE / 2))
    things = _draw_word(draw, text, font, rng.choice(dark), x, y, width, height)
    return Picture(image, tuple(things))


_READ = {
    "digit": "Which digit is shown?",
    "letter": "Which letter is shown?",
    "number": "Which number is shown?",
    "word": "Which word is written here?",
}


# --- several pictures -------------------------------------------------------------------------------------------------


def album(split: str, rng: random.Random) -> tuple[list[Picture], list[Turn], str]:
    """Two to four pictures with one shape each: asked for by number, or the number by the shape."""
    while True:
        count = rng.choice((2, 2, 3, 4))
        shapes, colors = rng.sample(SHAPES, count), rng.sample(sorted(COLORS), count)
        group = "album " + " ".join(f"{c} {s}" for c, s in zip(colors, shapes, strict=True))
        if side(group) == split:
            break
    pictures = []
    for shape, color in zip(shapes, colors, strict=True):
        image, draw = _canvas(rng)
        place = _places(rng, 1)[0]
        pictures.append(Picture(image, (_draw_in_cell(draw, rng, shape, color, *place, font=""),)))
    turns = []
    for k in rng.sample(range(count), 2):
        turns.append(Turn(f"What color is the shape in picture {k + 1}?", colors[k], kind="picture color"))
        turns.append(Turn(f"Which shape is in picture {k + 1}?", shapes[k], kind="picture shape"))
        by = rng.choice((colors[k], shapes[k]))
        article = "something " if by in COLORS else "a "
        turns.append(Turn(f"Which picture shows {article}{by}?", f"picture {k + 1}", (str(k + 1),), "which picture"))
        turns.append(Turn(f"What color is the {shapes[k]}?", colors[k], kind="color"))
    rng.shuffle(turns)
    return pictures, turns, group


def page(rng: random.Random, shape: str, color: str, number: str, font: str) -> Picture:
    """A page with a shape above, lines of text too small to read, and a number below."""
    image, draw = _canvas(rng)
    thing = _draw_in_cell(draw, rng, shape, color, 1, rng.randint(1, GRID), font)
    for line in range(3):
        words = " ".join(rng.choice(WORDS) for _ in range(4))
        draw.text((6, 35 + 8 * line), words, font=_font(font, 8), fill="#777777")
    return Picture(image, (thing, *_draw_word(draw, number, font, "black", 48, 78, 60, 30)))


def page_turns(rng: random.Random, pages: list[Picture]) -> list[tuple[Turn, int]]:
    """Questions about a document, each with the index of the page that answers it.

    A page is asked for by its shape where no other page has it, by colour and shape where no other has both.
    """
    shapes, colors = [p.things[0].glyph for p in pages], [p.things[0].color for p in pages]
    names = [shape if shapes.count(shape) == 1 else f"{c} {shape}" for c, shape in zip(colors, shapes, strict=True)]
    once = _once(names)
    asked = []
    for k in rng.sample(once, min(3, len(once))):
        number = "".join(thing.glyph for thing in pages[k].things[1:])
        asked.append((Turn(f"Which page shows a {names[k]}?", f"page {k + 1}", (str(k + 1),), "page"), k))
        asked.append((Turn(f"Which number is on the page with the {names[k]}?", number, kind="page number"), k))
    for k in rng.sample(range(len(pages)), 2):
        asked.append((Turn(f"What color is the shape on page {k + 1}?", colors[k], kind="page color"), k))
    rng.shuffle(asked)
    return asked


def document(
    split: str, rng: random.Random, pages: tuple[int, ...] = (2, 3, 4)
) -> tuple[list[Picture], list[tuple[Turn, int]], str]:
    """Pages, questions about them, each with its page, and the group."""
    while True:
        count = rng.choice(pages)
        shapes = rng.sample(SHAPES, min(count, len(SHAPES)))
        shapes += [rng.choice(SHAPES) for _ in range(count - len(shapes))]
        colors = [rng.choice(sorted(COLORS)) for _ in range(count)]
        numbers = [str(rng.randrange(10, 100)) for _ in range(count)]
        group = "pages " + " ".join(f"{c} {s} {n}" for c, s, n in zip(colors, shapes, numbers, strict=True))
        if side(group) == split:
            break
    font = rng.choice(fonts(split))
    things = zip(shapes, colors, numbers, strict=True)
    drawn = [page(rng, shape, color, number, font) for shape, color, number in things]
    return drawn, page_turns(rng, drawn), group


# --- samples ----------------------------------------------------------------------------------------------------------


def _few(rng: random.Random, turns: list[Turn], limit: int) -> tuple[Turn, ...]:
    return tuple(rng.sample(turns, min(limit, len(turns))))


def _group(name: str, picture: Picture) -> str:
    return f"{name} " + " ".join(sorted(f"{t.color} {t.glyph}" for t in picture.things))


def grid_samples(split: str, seed: object, n: int, limit: int = 16) -> Iterator[Sample]:
    """Shapes in a 3 x 3 grid: attributes, places, counts, presence, comparison, relations."""
    rng = rng_for("grids", split, seed)
    for _ in range(n):
        picture = shape_grid(split, rng)
        yield Sample((picture.image,), _few(rng, shape_turns(rng, picture), limit), "grid", _group("grid", picture))


def character_samples(split: str, seed: object, n: int, limit: int = 16) -> Iterator[Sample]:
    """Digits and letters in a 3 x 3 grid."""
    rng = rng_for("characters", split, seed)
    for _ in range(n):
        picture = character_grid(split, rng)
        yield Sample(
            (picture.image,), _few(rng, character_turns(rng, picture), limit), "characters", _group("chars", picture)
        )


def spelling_samples(split: str, seed: object, n: int) -> Iterator[Sample]:
    """A digit, letter, number or word in capitals."""
    rng = rng_for("spelling", split, seed)
    for _ in range(n):
        text, kind = random_text(split, rng)
        picture = reading_picture(split, rng, text)
        yield Sample((picture.image,), (Turn(_READ[kind], text, kind=kind),), "spelling", f"string {text}")


def album_samples(split: str, seed: object, n: int, limit: int = 16) -> Iterator[Sample]:
    """Two to four pictures, told apart by number or by what they show."""
    rng = rng_for("album", split, seed)
    for _ in range(n):
        pictures, turns, group = album(split, rng)
        yield Sample(tuple(p.image for p in pictures), _few(rng, turns, limit), "album", group)


def leaflet_samples(
    split: str, seed: object, n: int, limit: int = 16, pages: tuple[int, ...] = (2, 3, 4)
) -> Iterator[Sample]:
    """Documents with an evidence page, which is that of the first question."""
    rng = rng_for("leaflets", split, seed)
    for _ in range(n):
        drawn, asked, group = document(split, rng, pages)
        asked = asked[:limit]
        yield Sample(tuple(p.image for p in drawn), tuple(turn for turn, _ in asked), "leaflet", group, asked[0][1])


def booklet_samples(
    split: str, seed: object, n: int, limit: int = 16, pages: tuple[int, ...] = (5, 8, 10, 14, 20)
) -> Iterator[Sample]:
    """The documents of :func:`leaflet_samples`, with more pages."""
    yield from leaflet_samples(split, f"long {seed}", n, limit, pages)


def _talk(split: str, rng: random.Random) -> tuple[Picture, list[Turn]]:
    """A picture and two turns: which shape has a colour, and where *it* is."""
    while True:
        picture = shape_grid(split, rng, rng.randint(2, 5))
        if once := _once([t.color for t in picture.things]):
            break
    thing = picture.things[rng.choice(once)]
    first = Turn(f"Which shape is {thing.color}?", thing.glyph, kind="shape")
    return picture, [first, Turn("Where is it?", thing.place, kind="it")]


#: turns of a chat: T asks for text alone, V about the picture that comes with the first V
PATTERNS = ("T", "TT", "TTT", "TTV", "TV", "V", "VV", "VTV")


def talk_samples(split: str, seed: object, n: int, patterns: tuple[str, ...] = PATTERNS) -> Iterator[Sample]:
    """Chats in which questions about words and about a picture follow each other, as a pattern says."""
    rng = rng_for("talk", split, seed)
    for number in range(n):
        pattern = rng.choice(patterns)
        words = (sample.turns[0] for sample in word_samples(split, f"talk/{seed}/{number}", len(pattern)))
        picture, seen = _talk(split, rng)
        turns = [next(words) if letter == "T" else seen.pop(0) for letter in pattern]
        images = (picture.image,) if "V" in pattern else ()
        yield Sample(
            images, tuple(turns), f"talk {pattern}", _group("grid", picture), shown_at=max(0, pattern.find("V"))
        )


def _facts(split: str) -> list[Turn]:
    """Facts in two wordings: training sees one wording of every fact, and the other of those that are not tested."""
    turns = []
    for template, table in FACTS.items():
        for key, answer in table.items():
            question = template.format(key)
            other = "Tell me: " + question[0].lower() + question[1:]
            tested = side(f"wording {question}") == "test"
            if split == "train":
                turns.append(Turn(question, answer, kind="fact"))
            if tested == (split == "test"):
                turns.append(Turn(other, answer, kind="fact"))
    return turns


def word_samples(split: str, seed: object, n: int) -> Iterator[Sample]:
    """Without a picture: sums, comparisons, repeating, facts in a wording that is new to them."""
    rng = rng_for("words", split, seed)
    facts = _facts(split)
    made = 0
    while made < n:
        kind = rng.choice(("sum", "larger", "repeat", "fact"))
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        if kind == "sum":
            a, b = a % 10, b % 10
            turn = Turn(f"What is {a} plus {b}?", str(a + b), kind=kind)
        elif kind == "larger":
            turn = Turn(f"Which is larger, {a} or {b}?", str(max(a, b)), kind=kind)
        elif kind == "repeat":
            text = "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 5)))
            turn = Turn(f"Repeat {text}.", text, kind=kind)
        else:
            turn = rng.choice(facts)
        if (kind == "larger" and a == b) or (kind != "fact" and side(f"words {turn.question}") != split):
            continue
        made += 1
        yield Sample((), (turn,), "words", turn.question)


#: name -> samples(split, seed, n)
PUZZLES: dict[str, Callable[..., Iterator[Sample]]] = {
    "grids": grid_samples,
    "characters": character_samples,
    "spelling": spelling_samples,
    "album": album_samples,
    "leaflets": leaflet_samples,
    "booklets": booklet_samples,
    "talk": talk_samples,
    "words": word_samples,
}
