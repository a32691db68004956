"""Build the data of the offline tasks from the test side of ``data_sources.py``: the same content every time.

    python scripts/build_eval_data.py

Writes one Parquet file a task into ``eval/tasks/data`` and ``data.json`` with checksums, sizes and what a constant
answer per kind of question would score. Kinds take turns, so that any ``--limit`` has a fair share of each.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_sources import SOURCES, Sample, Turn  # isort: skip  (beside this file)

from mllm.eval.tasks import task_folder
from mllm.eval.tasks.utils import content_f1, is_right

SEED = 1
SIZES = {"mllm_vqa": 210, "mllm_caption": 120, "mllm_reading": 120, "mllm_docqa": 90, "mllm_text": 80}


def png(image: Any) -> bytes:
    """Lossless bytes of a picture."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def pairs(source: str, count: int) -> Iterator[tuple[Sample, Turn]]:
    """Every question of the first samples of a source, with its sample."""
    for sample in SOURCES[source]("test", SEED, count):
        for turn in sample.turns:
            yield sample, turn


def by_turns(items: Iterable[tuple[Sample, Turn]], size: int) -> list[tuple[Sample, Turn]]:
    """Kinds of questions in turn, each picture at most once, ``size`` in all."""
    kinds: dict[str, list[tuple[Sample, Turn]]] = defaultdict(list)
    for sample, turn in items:
        kinds[f"{sample.source} {turn.kind}"].append((sample, turn))
    chosen: list[tuple[Sample, Turn]] = []
    seen: set[bytes] = set()
    waiting = [iter(kinds[kind]) for kind in sorted(kinds)]
    while waiting and len(chosen) < size:
        rows = waiting.pop(0)
        for row in rows:
            key = b"".join(png(image) for image in row[0].images) or row[1].question.encode()
            if key not in seen:
                seen.add(key)
                chosen.append(row)
                waiting.append(rows)
                break
    return chosen


def documents(task: str) -> list[tuple[Sample, Turn]]:
    """The questions of one task."""
    size = SIZES[task]
    if task == "mllm_vqa":
        found = [*pairs("pictures", 500), *pairs("scenes", 500)]
        return by_turns(((s, t) for s, t in found if t.kind not in ("caption", "name")), size)
    if task == "mllm_caption":
        found = [*pairs("pictures", 300), *pairs("scenes", 300)]
        return by_turns(((s, t) for s, t in found if t.kind == "caption"), size)
    source = {"mllm_reading": "reading", "mllm_docqa": "documents", "mllm_text": "text"}[task]
    return by_turns(pairs(source, 4 * size), size)


def record(task: str, number: int, sample: Sample, turn: Turn) -> dict[str, Any]:
    """One row of the Parquet file."""
    return {
        "id": number,
        "task": task,
        "kind": turn.kind,
        "source": sample.source,
        "images": [{"bytes": png(image), "path": None} for image in sample.images],
        "question": turn.question,
        "answer": turn.answer,
        "answers": [turn.answer, *turn.accepted],
        "evidence": -1 if sample.evidence is None else sample.evidence,
    }


def constant_score(rows: list[dict[str, Any]]) -> float:
    """What the best constant reply per kind of question scores: what one gets without looking."""
    asked: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        asked[row["kind"]].append(row)
    total = 0.0
    for group in asked.values():
        replies = Counter(row["answer"] for row in group)
        if rows[0]["task"] == "mllm_caption":
            total += max(sum(content_f1(reply, row["answer"]) for row in group) for reply in replies)
        else:
            total += max(sum(is_right(reply, row["answers"]) for row in group) for reply in replies)
    return total / len(rows)


def main() -> None:
    import datasets

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=task_folder() / "data")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    text = datasets.Value("string")
    features = datasets.Features(
        {
            "id": datasets.Value("int32"),
            "task": text,
            "kind": text,
            "source": text,
            "images": datasets.List(datasets.Image()),
            "question": text,
            "answer": text,
            "answers": datasets.List(text),
            "evidence": datasets.Value("int32"),
        }
    )
    manifest = {}
    for task in SIZES:
        rows = [record(task, number, *pair) for number, pair in enumerate(documents(task))]
        path = out / f"{task}.parquet"
        datasets.Dataset.from_list(rows, features=features).to_parquet(path)
        manifest[task] = {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "n": len(rows),
            "kinds": dict(sorted(Counter(row["kind"] for row in rows).items())),
            "constant_reply": round(constant_score(rows), 4),
        }
        print(task, path.stat().st_size, manifest[task])
    (out / "data.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
