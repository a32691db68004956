"""Build the data of the offline tasks from the test side of ``data_sources.py``: the same bytes every time.

    python scripts/build_eval_data.py --out eval/tasks/data

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
from pathlib import Path
from typing import Any

from data_sources import CATEGORIES, SOURCES  # isort: skip  (beside this file)

from mllm.drawn import COLORS, SHAPES, Sample, Turn, rng_for
from mllm.eval.tasks import task_folder
from mllm.eval.tasks.scoring import content_f1, is_right, words

SEED = 1
#: questions of each kind in a task
PER_KIND = {"mllm_vqa": 25, "mllm_caption": 60, "mllm_reading": 30, "mllm_docqa": 40, "mllm_text": 40}
#: kinds of questions whose answers are a closed set, besides those where the drawn answers are one
CLOSED = {
    "color": tuple(COLORS),
    "page color": tuple(COLORS),
    "shape": SHAPES,
    "side": SHAPES,
    "kind": tuple(CATEGORIES),
    "presence": ("yes", "no"),
}
OPEN = ("name", "caption", "word")
Question = tuple[Sample, Turn]


def png(image: Any) -> bytes:
    """Lossless bytes of a picture."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def questions(source: str, count: int) -> Iterator[Question]:
    """Every question of the first samples of a source, with its sample."""
    for sample in SOURCES[source]("test", SEED, count):
        for turn in sample.turns:
            yield sample, turn


def kind_of(task: str, sample: Sample, turn: Turn) -> str | None:
    """The kind that a question counts as in a task; None where the task does not ask it."""
    if task == "mllm_vqa":
        return None if turn.kind == "caption" else turn.kind
    if task == "mllm_caption":
        named = sample.images and "," in turn.answer  # "A picture of a duck, an animal."
        return None if turn.kind != "caption" else "caption of a name" if named else "caption of a kind"
    return turn.kind


def candidates(task: str) -> dict[str, list[Question]]:
    """Questions that a task can draw from, by kind."""
    sources = {
        "mllm_vqa": (("pictures", 600), ("scenes", 1500)),
        "mllm_caption": (("pictures", 600),),
        "mllm_reading": (("reading", 1500),),
        "mllm_docqa": (("documents", 900),),
        "mllm_text": (("text", 1500),),
    }
    kinds: dict[str, list[Question]] = defaultdict(list)
    for source, count in sources[task]:
        for sample, turn in questions(source, count):
            kind = kind_of(task, sample, turn)
            if kind is not None:
                kinds[kind].append((sample, turn))
    return dict(sorted(kinds.items()))


def answers_in_turn(found: list[Question]) -> Iterator[Question]:
    """The questions of one kind so that each answer comes up once before one comes up again."""
    pools: dict[str, list[Question]] = defaultdict(list)
    for question in found:
        pools[question[1].answer].append(question)
    order = sorted(pools)
    rng_for("eval answers", SEED, *order).shuffle(order)
    while order:
        order = [answer for answer in order if pools[answer]]
        yield from (pools[answer].pop(0) for answer in order)


def choose(task: str) -> list[tuple[str, Question]]:
    """The questions of a task with their kinds: no picture and no text-only question twice."""
    taken: set[bytes] = set()
    chosen: dict[str, list[Question]] = {}
    for kind, found in candidates(task).items():
        chosen[kind] = []
        for sample, turn in answers_in_turn(found):
            key = b"".join(image.tobytes() for image in sample.images) or turn.question.encode()
            if len(chosen[kind]) < PER_KIND[task] and key not in taken:
                taken.add(key)
                chosen[kind].append((sample, turn))
    # question i of n of its kind stands at (i + 1/2) / n: every prefix holds each kind in proportion
    placed = [((i + 0.5) / len(rows), kind, row) for kind, rows in sorted(chosen.items()) for i, row in enumerate(rows)]
    order = sorted(chosen)
    rng_for("eval kinds", SEED, task).shuffle(order)
    placed.sort(key=lambda item: (item[0], order.index(item[1])))
    return [(kind, row) for _, kind, row in placed]


def options_of(kind: str, turn: Turn, answers: Iterable[str]) -> list[str]:
    """Answers that exclude each other; empty where the question is open."""
    if kind == "choice":  # "Is this a plant or a tool?"
        first, second = turn.question.removeprefix("Is this ").removesuffix("?").split(" or ")
        return [noun.removeprefix("an ").removeprefix("a ") for noun in (first, second)]
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
            "images": [{"bytes": png(image), "path": None} for image in sample.images],
            "question": turn.question,
            "answer": turn.answer,
            "answers": [turn.answer, *turn.accepted],
            "options": options_of(kind, turn, answers[kind]),
            "evidence": -1 if sample.evidence is None else sample.evidence,
        }
        for number, (kind, (sample, turn)) in enumerate(chosen)
    ]


def score(task: str, row: dict[str, Any], reply: str) -> float:
    """Score of a reply to one question, 0 to 1."""
    if task == "mllm_caption":
        return max(content_f1(reply, answer) for answer in row["answers"])
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
        if all(row["options"] for row in group) and len({tuple(row["options"]) for row in group}) > 1:
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
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    text = datasets.Value("string")
    features = datasets.Features(
        {
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
    )
    manifest = {}
    for task in PER_KIND:
        rows = rows_of(task)
        path = out / f"{task}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), path, compression="zstd")
        manifest[task] = {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "n": len(rows),
            "kinds": dict(sorted(Counter(row["kind"] for row in rows).items())),
            **blind_scores(task, rows),
        }
        print(task, f"{path.stat().st_size / 1e6:.2f} MB", manifest[task])
    (out / "data.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
