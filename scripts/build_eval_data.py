"""Build the data of the offline tasks from the test side of ``data_sources.py`` and of ``mllm/puzzles.py``.

    python scripts/build_eval_data.py --out eval/tasks/data                      # the same bytes every time
    python scripts/build_eval_data.py --out eval/tasks/data --tasks puzzle       # those whose names begin so

Writes one Parquet file a task and ``data.json``: checksums, sizes, and what replies score that do not look at the
pictures. Kinds of questions take turns, and so do the answers within a kind, so that every ``--limit`` has its share of
each.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from data_sources import CATEGORIES, SOURCES, TEST_SOURCES  # isort: skip  (beside this file)

from mllm.drawn import COLORS, SHAPES, Sample, Turn, fonts, rng_for, side
from mllm.eval.tasks import task_folder
from mllm.eval.tasks.scoring import content_f1, is_right, item_f1, words
from mllm.puzzles import PUZZLES, page, page_turns, talk_samples

SEED = 1
#: questions of each kind in a task
PER_KIND = {
    "mllm_vqa": 140,
    "mllm_caption": 240,
    "mllm_reading": 275,
    "mllm_docqa": 366,
    "mllm_text": 170,
    "mllm_language": 1100,
}
#: the tasks of puzzles: where their questions come from, their kinds, and how many of each
PUZZLE_TASKS: dict[str, tuple[str, tuple[str, ...], int]] = {
    "puzzle_scenes": ("grids", ("color", "shape", "shape at", "color at", "where"), 220),
    "puzzle_characters": ("characters", ("character at", "character where", "character color"), 366),
    "puzzle_counting": ("grids", ("count", "count color"), 550),
    "puzzle_relations": ("grids", ("pair", "same", "beside"), 366),
    "puzzle_choice": ("grids", ("choice",), 1100),
    "puzzle_list": ("grids", ("list",), 600),
    "puzzle_reading": ("spelling", ("digit", "letter", "number", "word"), 275),
    "puzzle_album": ("album", ("picture color", "picture shape", "which picture", "color"), 275),
    "puzzle_pages5": ("5", ("page", "page number", "page color"), 366),
    "puzzle_pages10": ("10", ("page", "page number", "page color"), 366),
    "puzzle_pages20": ("20", ("page", "page number", "page color"), 366),
    "puzzle_chat": ("talk", ("T", "TT", "TTT", "TTV", "TV", "V"), 183),
    "puzzle_words": ("words", ("sum", "larger", "repeat", "fact"), 400),
}
PER_KIND |= {task: number for task, (_, _, number) in PUZZLE_TASKS.items()}
#: pages that the documents of one task are made of
POOL = 400
#: kinds of questions whose answers are a closed set, besides those where the drawn answers are one
CLOSED = {
    "color": tuple(COLORS),
    "page color": tuple(COLORS),
    "shape": SHAPES,
    "side": SHAPES,
    "kind": tuple(CATEGORIES),
    "presence": ("yes", "no"),
}
OPEN = ("name", "caption", "word", "list", "repeat", "fact", "number", "larger", "page number", "next number")
OPEN += ("last word",)
#: kinds whose questions say what can be answered, after the last of these
NAMED = {"larger number": ", ", "alphabet": ", ", "last of a list": ": ", "first of a list": ": "}
#: real pictures, which are stored with losses (few, and invisible): without, the files are three times as large
PHOTOS = ("openclipart", "noto-emoji")
Question = tuple[Sample, Turn]


def booklets(pages: int, count: int) -> Iterator[Sample]:
    """Documents whose pages are drawn from one pool, so that a file holds each page once."""
    rng = rng_for("booklets", SEED, pages)
    font = fonts("test")
    pool = [
        page(rng, rng.choice(SHAPES), rng.choice(sorted(COLORS)), str(rng.randrange(10, 100)), rng.choice(font))
        for _ in range(POOL)
    ]
    made = 0
    while made < count:
        drawn = rng.sample(pool, pages)
        asked = page_turns(rng, drawn)
        group = "pages " + " ".join("".join(f"{t.color} {t.glyph} " for t in p.things) for p in drawn)
        if side(group) == "test":
            made += 1
            for turn, evidence in asked:
                yield Sample(tuple(p.image for p in drawn), (turn,), "booklet", group, evidence)


def puzzles(task: str) -> Iterator[Question]:
    """Questions of a task of puzzles; of a chat the last one, which is the one to be answered."""
    source, kinds, number = PUZZLE_TASKS[task]
    if source.isdecimal():
        for sample in booklets(int(source), number // 2):
            yield sample, sample.turns[0]
    elif source == "talk":
        for sample in talk_samples("test", SEED, 12 * number, kinds):
            yield sample, sample.turns[-1]
    else:
        rng = rng_for("puzzles", SEED, task)
        for sample in PUZZLES[source]("test", SEED, 20 * number):
            for kind in kinds:  # one of each kind: else a picture's first answer would shut out its second
                if found := [turn for turn in sample.turns if turn.kind == kind]:
                    yield sample, rng.choice(found)


def webp(image: Any, lossless: bool = True) -> bytes:
    """A picture's bytes."""
    return _webp(image.size, image.tobytes(), lossless)


@lru_cache(maxsize=POOL)
def _webp(size: tuple[int, int], pixels: bytes, lossless: bool) -> bytes:
    buffer = io.BytesIO()
    quality = 100 if lossless else 90
    Image.frombytes("RGB", size, pixels).save(buffer, "WEBP", lossless=lossless, quality=quality, method=4)
    return buffer.getvalue()


def questions(source: str, count: int) -> Iterator[Question]:
    """Every question of the first samples of a source, with its sample."""
    options = {"margins": (10, 59)} if source == "reading" else {}  # ten fonts alone would be few pictures of a digit
    for sample in (SOURCES | TEST_SOURCES)[source]("test", SEED, count, **options):
        for turn in sample.turns:
            yield sample, turn


def kind_of(task: str, sample: Sample, turn: Turn) -> str | None:
    """The kind that a question counts as in a task; None where the task does not ask it."""
    if task in PUZZLE_TASKS:
        kind = sample.source.removeprefix("talk ") if task == "puzzle_chat" else turn.kind
        return kind if kind in PUZZLE_TASKS[task][1] else None
    if task == "mllm_vqa":
        return None if turn.kind == "caption" else turn.kind
    if task == "mllm_caption":
        named = sample.images and "," in turn.answer  # "A picture of a duck, an animal."
        shown = "a scene" if sample.source == "scene" else "a name" if named else "a kind"
        return f"caption of {shown}" if turn.kind == "caption" else None
    return turn.kind


def candidates(task: str) -> dict[str, list[Question]]:
    """Questions that a task can draw from, by kind."""
    sources = {
        "mllm_vqa": (("pictures", 3000), ("scenes", 4000)),
        "mllm_caption": (("pictures", 3000), ("scenes", 1500)),
        "mllm_reading": (("reading", 3000),),
        "mllm_docqa": (("documents", 1200),),
        "mllm_text": (("text", 1500), ("following", 3000)),
        "mllm_language": (("passages", 3000),),
    }
    kinds: dict[str, list[Question]] = defaultdict(list)
    found = (
        puzzles(task)
        if task in PUZZLE_TASKS
        else (q for source, count in sources[task] for q in questions(source, count))
    )
    for sample, turn in found:
        kind = kind_of(task, sample, turn)
        if kind is not None:
            kinds[kind].append((sample, turn))
    return dict(sorted(kinds.items()))


def answers_in_turn(found: list[Question], skip: Callable[[Question], bool] = lambda _: False) -> Iterator[Question]:
    """The questions of one kind so that each answer comes up once before one comes up again, but those to skip."""
    pools: dict[str, list[Question]] = defaultdict(list)
    for question in found:
        pools[question[1].answer].append(question)
    order = sorted(pools)
    rng_for("eval answers", SEED, *order).shuffle(order)
    while order:
        order = [answer for answer in order if pools[answer]]
        for answer in order:
            while pools[answer]:
                question = pools[answer].pop(0)
                if not skip(question):
                    yield question
                    break


def choose(task: str) -> list[tuple[str, Question]]:
    """The questions of a task with their kinds: no picture and no text-only question twice; a document for several."""
    taken: set[bytes] = set()

    def key_of(question: Question) -> bytes:
        sample, turn = question
        key = b"".join(image.tobytes() for image in sample.images) or turn.question.encode()
        if sample.source in ("booklet", "document"):
            key += turn.question.encode()
        if task == "puzzle_chat":
            key += " ".join(turn.question for turn in sample.turns).encode()
        return key

    def is_taken(question: Question) -> bool:
        return key_of(question) in taken

    ordered: dict[str, Iterator[Question]] = {}
    for kind, found in candidates(task).items():
        if task == "mllm_language":  # running text stays as it is: frequent words are part of the matter
            ordered[kind] = iter(found)
        else:  # of a puzzle whose picture is taken the next answer has its turn, of others the next picture
            ordered[kind] = answers_in_turn(found) if task in PUZZLE_TASKS else answers_in_turn(found, is_taken)
    # kinds that share few pictures choose one by one, else the last would get what the others left
    at_once = PER_KIND[task] if task in PUZZLE_TASKS else 1
    chosen: dict[str, list[Question]] = {kind: [] for kind in ordered}
    for _ in range(0, PER_KIND[task], at_once):
        for kind, found in ordered.items():
            free = (question for question in found if not is_taken(question))
            for question in islice(free, at_once):
                taken.add(key_of(question))
                chosen[kind].append(question)
    # question i of n of its kind stands at (i + 1/2) / n: every prefix holds each kind in proportion
    placed = [((i + 0.5) / len(rows), kind, row) for kind, rows in sorted(chosen.items()) for i, row in enumerate(rows)]
    order = sorted(chosen)
    rng_for("eval kinds", SEED, task).shuffle(order)
    placed.sort(key=lambda item: (item[0], order.index(item[1])))
    return [(kind, row) for _, kind, row in placed]


def options_of(kind: str, turn: Turn, answers: Iterable[str]) -> list[str]:
    """Answers that exclude each other; empty where the question is open."""
    if kind == "choice" and " at the " in turn.question:  # "Is the shape at the top left a star or a heart?"
        return [noun for noun in SHAPES if f" {noun}" in turn.question.removeprefix("Is the shape")]
    if kind == "choice":  # "Is this a plant or a tool?"
        first, second = turn.question.removeprefix("Is this ").removesuffix("?").split(" or ")
        return [noun.removeprefix("an ").removeprefix("a ") for noun in (first, second)]
    if kind in NAMED:  # "Which number is larger, 31 or 13?"
        named = turn.question.rstrip("?.").rpartition(NAMED[kind])[2]
        return named.replace(" or ", ", ").split(", ")
    if kind in OPEN or kind.startswith("caption"):
        return []
    closed = CLOSED.get(kind) or sorted(set(answers))
    said = words(turn.question)  # a reply may repeat the question: "1 + 7 = 8"
    return [option for option in closed if not set(words(option)) <= set(said)]


def rows_of(task: str) -> list[dict[str, Any]]:
    """The rows of a task's Parquet file."""
    chosen = choose(task)
    answers: dict[str, set[str]] = defaultdict(set)
    for kind, (_, turn) in chosen:
        answers[kind].add(turn.answer)
    return [
        {
            "id": number,
            "task": task,
            "kind": kind,
            "source": sample.source,
            "group": sample.group,
            "images": [{"bytes": webp(image, sample.source not in PHOTOS), "path": None} for image in sample.images],
            "question": turn.question,
            "answer": turn.answer,
            "answers": [turn.answer, *turn.accepted],
            "options": options_of(kind, turn, answers[kind]),
            "evidence": -1 if sample.evidence is None else sample.evidence,
        }
        | (
            {
                "history": [{"question": t.question, "answer": t.answer} for t in sample.turns[:-1]],
                "shown_at": sample.shown_at,
            }
            if task == "puzzle_chat"
            else {}
        )
        for number, (kind, (sample, turn)) in enumerate(chosen)
    ]


def score(task: str, row: dict[str, Any], reply: str) -> float:
    """Score of a reply to one question, 0 to 1."""
    if task == "mllm_caption":
        return max(content_f1(reply, answer) for answer in row["answers"])
    if task == "puzzle_list":
        return item_f1(reply, row["answer"])
    if task == "mllm_language":
        return float(reply == row["answer"])
    return float(is_right(reply, row["answers"], row["options"]))


def blind_scores(task: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """What replies score that do not look: the best constant one per kind of question, and a guess among options."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row)
    constant = guess = 0.0
    for group in kinds.values():
        replies: list[Callable[[dict[str, Any]], str]] = [
            lambda row, answer=answer: answer for answer in sorted({row["answer"] for row in group})
        ]
        named = NAMED.get(group[0]["kind"]) == ": "  # to say the first of a list that is asked for is no blind reply
        if not named and all(row["options"] for row in group) and len({tuple(row["options"]) for row in group}) > 1:
            replies += [lambda row: row["options"][0], lambda row: row["options"][-1]]  # always the first, or the last
        if group[0]["evidence"] >= 0 and group[0]["kind"] == "page":
            replies.append(lambda row: str(len(row["images"])))
        constant += max(sum(score(task, row, reply(row)) for row in group) for reply in replies)
        guess += sum(1 / len(row["options"]) for row in group if row["options"])
    return {"constant_reply": round(constant / len(rows), 4), "chance": round(guess / len(rows), 4)}


def main() -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=task_folder() / "data", help="folder to write into")
    parser.add_argument("--tasks", default="", help="only those whose names begin so; the others stay as they are")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    text = datasets.Value("string")
    columns = {
        "id": datasets.Value("int32"),
        "task": text,
        "kind": text,
        "source": text,
        "group": text,
        "images": datasets.List(datasets.Image()),
        "question": text,
        "answer": text,
        "answers": datasets.List(text),
        "options": datasets.List(text),
        "evidence": datasets.Value("int32"),
    }
    chat = {"history": datasets.List({"question": text, "answer": text}), "shown_at": datasets.Value("int32")}
    file = out / "data.json"
    manifest = json.loads(file.read_text(encoding="utf-8")) if arguments.tasks and file.exists() else {}
    for task in PER_KIND:
        if not task.startswith(arguments.tasks):
            continue
        rows = rows_of(task)
        path = out / f"{task}.parquet"
        schema = datasets.Features(columns | (chat if task == "puzzle_chat" else {})).arrow_schema
        # one group and one large dictionary: a page that many documents share is stored once
        whole = {"row_group_size": len(rows), "dictionary_pagesize_limit": 1 << 26}
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd", **whole)
        manifest[task] = {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "n": len(rows),
            "kinds": dict(sorted(Counter(row["kind"] for row in rows).items())),
            **blind_scores(task, rows),
        }
        print(task, f"{path.stat().st_size / 1e6:.2f} MB", manifest[task])
    file.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
