"""A few samples of an offline task under some settings, between the visitors' questions.

Scores are those of ``mllm eval`` with the same limit: the same data, prompts, generation settings and scoring. The
model is taken sample by sample, so that a chat waits for one sample at most.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from mllm.demo.answers import Backend
from mllm.demo.charts import Point
from mllm.demo.uploads import Picture
from mllm.errors import EvalError
from mllm.technique import Stack

FULL = "full model"


@dataclass(frozen=True)
class Task:
    """An offline task: what ``eval/tasks`` says of it."""

    name: str
    new_tokens: int
    until: tuple[str, ...]
    score: Any


class _Reader(yaml.SafeLoader):
    """YAML with ``!function module.name``, kept as text."""


_Reader.add_constructor("!function", lambda loader, node: str(node.value))


def task_names() -> list[str]:
    """Offline tasks that can be run here."""
    from mllm.eval.tasks import manifest

    return list(manifest())


def read_task(name: str) -> Task:
    """Settings of a task.

    Raises:
        EvalError: there is no such task, or its data was changed.
    """
    from mllm.eval.tasks import task_folder, utils, verify_data

    verify_data(name)
    folder = task_folder()
    texts = [(folder / file).read_text(encoding="utf-8") for file in ("_offline", f"{name}.yaml")]
    shared, own = (yaml.load(text, _Reader) for text in texts)  # a SafeLoader
    settings = {**shared, **own}
    generation = settings["generation_kwargs"]
    score = getattr(utils, settings["process_results"].removeprefix("utils."))
    return Task(name, generation["max_new_tokens"], tuple(generation.get("until", ())), score)


def read_samples(name: str, limit: int) -> list[dict[str, Any]]:
    """The first samples of a task, with decoded pictures.

    Raises:
        EvalError: the package that reads the data is missing.
    """
    import io

    from PIL import Image

    from mllm.eval.tasks import task_folder

    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise EvalError("Evaluating needs pyarrow: pip install 'mllm-efficiency[eval]'.") from error
    with parquet.ParquetFile(task_folder() / "data" / f"{name}.parquet") as file:
        batch = next(file.iter_batches(batch_size=limit), None)
    rows = [] if batch is None else batch.to_pylist()
    for row in rows:
        row["images"] = [Image.open(io.BytesIO(image["bytes"])) for image in row.get("images") or []]
    return rows


class Evaluator:
    """Scores settings on offline tasks.

    Args:
        backend: the model.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._lock = threading.Lock()
        self._plain: dict[tuple[str, int], Point] = {}  # the plain model's score is the same for everybody

    def steps(self, name: str, limit: int, stack: Stack) -> int:
        """Answers that an evaluation takes."""
        return limit * (1 if not stack.techniques or (name, limit) in self._plain else 2)

    def run(
        self, name: str, limit: int, stack: Stack, label: str, stop: threading.Event
    ) -> Iterator[int | list[Point]]:
        """Evaluate the plain model, where that was not done yet, and the stack.

        Yields:
            How many answers are there, and at last the points: the plain model's and the stack's.

        Raises:
            EvalError: an unknown task, it was stopped, or a sample could not be answered.
        """
        task = read_task(name)
        samples = read_samples(name, limit)
        done, points = 0, []
        for stack_now, label_now in [(Stack(), FULL)] + ([(stack, label)] if stack.techniques else []):
            key = (name, limit)
            if not stack_now.techniques and key in self._plain:
                points.append(self._plain[key])
                continue
            scores, spent, dense = [], 0, 0
            for sample in samples:
                if stop.is_set():
                    raise EvalError("The evaluation was stopped; no point was added.")
                answer = self._answer(task, sample, stack_now, stop)
                if answer.state == "failed":
                    raise EvalError(f"A sample could not be answered: {answer.error}")
                if answer.state == "stopped":
                    raise EvalError("The evaluation was stopped; no point was added.")
                text = answer.text
                for mark in task.until:
                    text = text.split(mark)[0]
                scores.append(next(iter(task.score(sample, [text.strip()]).values())))
                spent, dense = spent + answer.flops, dense + answer.dense_flops
                done += 1
                yield done
            points.append(_point(name, label_now, scores, spent / dense if dense else 1.0))
            if not stack_now.techniques:
                with self._lock:
                    self._plain[key] = points[-1]
        yield points

    def _answer(self, task: Task, sample: dict[str, Any], stack: Stack, stop: threading.Event) -> Any:
        from mllm.inputs import to_rgb

        pictures = [Picture(to_rgb(image), "sample") for image in sample["images"]]
        return self.backend.complete([(sample["question"], pictures, None)], stack, task.new_tokens, stop)


def _point(task: str, label: str, scores: Sequence[float], flops_ratio: float) -> Point:
    from mllm.eval.stats import interval

    values = [float(score) for score in scores]
    return Point(label, task, sum(values) / len(values), interval(values), flops_ratio, len(values))


def add_points(old: Sequence[Point], new: Sequence[Point], most: int) -> list[Point]:
    """The points of one plot: later results replace earlier ones of the same settings; fronts are marked."""
    from mllm.eval.report import pareto_front

    points = {(p.task, p.label, p.samples): p for p in [*old, *new]}
    kept = list(points.values())[-most:]
    marked = []
    for point in kept:
        others = [p for p in kept if (p.task, p.samples) == (point.task, point.samples)]
        front = pareto_front([(p.flops_ratio, p.score) for p in others])
        marked.append(replace(point, front=front[others.index(point)]))
    return marked
