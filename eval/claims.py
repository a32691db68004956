"""The papers' headline claims, measured on the model ``tiny`` with parts that were trained on it: ``mllm claims``.

Each claim is a function that asks for scores of (model, techniques, task) and returns rows of the table. Scores come
from :func:`mllm.eval.runner.run_grid`, question by question, so that differences are paired, and a run that was stopped
goes on. Of parts with several seeds a question counts with its mean over them, and the interval is that of the mean
over questions: it says what other questions would give, not what other seeds would, whose differences stand beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mllm.config import Config
from mllm.errors import ConfigError, EvalError, LoadError
from mllm.eval.results import cell_path, read_cell, write_json
from mllm.eval.runner import run_grid
from mllm.eval.stats import Z95
from mllm.eval.tasks import manifest
from mllm.loading import TINY
from mllm.technique import Stack, Technique, get_technique

#: trained parts that come with this package, one folder each
PARTS_FOLDER = TINY.parent / "claims"
#: of parts that take long to train; those of gates, which do not, stand in their part
SEEDS = (0,)
#: questions of a task, without --limit
LIMIT = 200
LOOKING = ("puzzle_scenes", "puzzle_characters", "puzzle_counting", "puzzle_relations", "puzzle_reading")
TUNING_DATA = "grids:1,characters:1,grids:1,spelling"


# --- what is trained --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Something that is trained on ``tiny`` by one ``mllm train`` command.

    Attributes:
        name: of its folder, without the seed.
        technique: what ``mllm train`` is told, in any case.
        data, training, arguments, options: as in a training config.
        seeds: one run each.
        start: part of the same seed that it starts from, as ``weights``.
    """

    name: str
    technique: str
    data: str
    training: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS
    start: str | None = None

    def folder(self, root: Path, seed: int) -> Path:
        return root / f"{self.name}-{seed}"

    def all_arguments(self, root: Path, seed: int) -> dict[str, Any]:
        """Arguments of the technique, with the part that it starts from."""
        start = {} if self.start is None else {"weights": str(PARTS[self.start].folder(root, seed))}
        return {**self.arguments, **start}

    def command(self, root: Path, seed: int) -> str:
        """The command that trains it."""
        given = {"--argument": self.all_arguments(root, seed), "--option": self.options}
        pairs = [f"{flag} {key}={_plain(value)}" for flag, some in given.items() for key, value in some.items()]
        settings = [f"--{key.replace('_', '-')} {value}" for key, value in {**self.training, "seed": seed}.items()]
        start = ["mllm", "train", self.technique.lower(), "--model tiny", f"--data {self.data}", "--dtype float32"]
        return " ".join([*start, *settings, *pairs, f"--out {self.folder(root, seed)}"])

    def train(self, root: Path, seed: int) -> Path:
        """Train it, or go on with it; a finished one is left as it is."""
        from mllm.training import train_technique

        return train_technique(
            self.technique,
            model="tiny",
            data=self.data,
            out=self.folder(root, seed),
            training={**self.training, "seed": seed},
            arguments=self.all_arguments(root, seed),
            options=dict(self.options),
            dtype="float32",
        )


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


_RANK = {"rank": 8, "alpha": 16.0}
_TUNING = {"steps": 120, "batch_size": 16, "lr": 1e-3}
_BENDING = {"steps": 120, "batch_size": 16}
PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part(
            "gates",
            "DyVTE",
            "grids:1,characters:1,grids:1,spelling",
            {"steps": 600},
            options={"samples": 800, "held_out": 300},
            seeds=(0, 1, 2),
        ),
        # one control for two techniques: the same data, steps and rate, causal and full attention
        Part("full", "naavit", TUNING_DATA, _TUNING, options={"attach": False, **_RANK}),
        Part("naavit", "naavit", TUNING_DATA, _TUNING, options=_RANK),
        Part("mma", "mma", TUNING_DATA, _TUNING, options=_RANK),
        Part("plain_tuned", "naavit", "scenes,reading", {**_BENDING, "lr": 2e-3}, options={"attach": False, **_RANK}),
        Part(
            "lorra",
            "LoRRA",
            "scenes,reading",
            {**_BENDING, "lr": 2e-3},
            {"rank": 8, "router_length": 1024},
            {"model_lr": 2e-3, "rank": 8},
        ),
        Part(
            "urag",
            "URaG",
            "booklets:1,leaflets:1",
            {"steps": 150, "batch_size": 4},
            {"layer": 2, "keep_pages": 3, "hidden": 256, "width": 128},
            {"stage": "retrieval"},
        ),
        Part(
            "urag_joint",
            "URaG",
            "booklets:1,leaflets:1",
            {"steps": 40, "batch_size": 2, "accumulation": 2, "lr": 5e-4},
            {"layer": 2, "keep_pages": 3, "hidden": 256, "width": 128},
            {"stage": "joint", **_RANK},
            start="urag",
        ),
    )
}


def train_parts(root: Path, names: Iterable[str] = ()) -> None:
    """Train parts into ``root``, all without ``names``; finished ones stay, one that was stopped goes on.

    Raises:
        ConfigError: an unknown name.
    """
    for name in names or PARTS:
        if name not in PARTS:
            raise ConfigError(f"There is no part {name!r}. Parts: {', '.join(PARTS)}.")
        for seed in PARTS[name].seeds:
            PARTS[name].train(root, seed)


# --- scores -----------------------------------------------------------------------------------------------------------


Question = tuple[str, int]


@dataclass(frozen=True)
class Scores:
    """Answers of one model with some techniques, by (task, question).

    Attributes:
        score: 0 to 1.
        flops: of decoder layers, prefill and answer.
        decisions: what techniques decided, by their names.
    """

    score: dict[Question, float]
    cost: dict[Question, float]
    decisions: dict[Question, dict[str, Any]] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for task, _ in self.score))

    @property
    def flops(self) -> float:
        """Of a question on average."""
        return sum(self.cost.values()) / len(self.cost)

    def only(self, keys: Iterable[Question]) -> Scores:
        """Some of the questions."""
        keys = list(keys)
        return Scores(*({key: values[key] for key in keys if key in values} for values in vars(self).values()))

    def of(self, task: str) -> Scores:
        """The questions of one task."""
        return self.only(key for key in self.score if key[0] == task)

    def kind(self, kind: str | None) -> Scores:
        """The questions of one kind; None: all."""
        if kind is None:
            return self
        kinds = {(task, row["id"]): row["kind"] for task in self.tasks for row in documents(task)}
        return self.only(key for key in self.score if kinds[key] == kind)

    def exits(self, last: int) -> dict[Question, int]:
        """The layer that visual tokens of each question left after; ``last`` where they stayed."""
        told = {key: told["DyVTE"]["exit_layer"] for key, told in self.decisions.items()}
        return {key: last if layer is None else layer for key, layer in told.items()}


class Measured:
    """Scores by need, kept in a folder.

    Args:
        out: its ``cells`` hold what is known.
        parts: folder of trained parts.
        limit: questions of a task.
        batch_size: prompts in a batch.
    """

    def __init__(self, out: Path, parts: Path, limit: int = LIMIT, batch_size: int = 16) -> None:
        self.out, self.parts, self.limit, self.batch_size = out, parts, limit, batch_size

    def model(self, part: str | None, seed: int = 0) -> tuple[str, str]:
        """Name and place of ``tiny``, or of a part that loads as a model."""
        return ("tiny", "tiny") if part is None else (f"{part}-{seed}", str(self.part(part, seed)))

    def part(self, name: str, seed: int) -> Path:
        folder = PARTS[name].folder(self.parts, seed)
        if not folder.is_dir():
            raise LoadError(f"{folder} is missing: train it with `mllm claims --retrain`, or give another --parts.")
        return folder

    def trained(self, part: str, seed: int, **arguments: Any) -> Technique:
        """A part's technique with its weights."""
        cls = get_technique(PARTS[part].technique)
        return cls(weights=str(self.part(part, seed)), **arguments)

    def over(
        self,
        model: tuple[str, str],
        name: str,
        techniques: Sequence[Technique],
        tasks: Sequence[str],
        limit: int | None = None,
    ) -> Scores:
        """Scores of a model with techniques on tasks; ``name`` tells the techniques apart in file names."""
        limit = limit or self.limit
        config = Config(name, Stack(*techniques))
        run_grid(dict([model]), [config], tasks, self.out, limit, self.batch_size, dtype="float32", device="cpu")
        found = Scores({}, {}, {})
        for task in tasks:
            cell = read_cell(cell_path(self.out, model[0], name, task))
            if cell is None or cell["errors"]:
                reasons = "; ".join(cell["error_reasons"]) if cell else "no result was written"
                raise EvalError(f"{task} with {name}: some questions have no answer. {reasons}")
            for sample in cell["samples"]:
                key = task, sample["id"]
                found.score[key], found.cost[key] = sample["score"], sample["flops"]
                found.decisions[key] = sample.get("decisions", {})
        return found


@dataclass(frozen=True)
class Estimate:
    """A mean over questions with its 95 % interval; of several seeds, and each seed's own mean."""

    value: float
    low: float
    high: float
    seeds: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"

    @property
    def level(self) -> str:
        """As a share, without a sign, between 0 and 100."""
        return f"{100 * self.value:.1f} [{max(0.0, 100 * self.low):.1f}, {min(100.0, 100 * self.high):.1f}]"


def estimate(runs: Sequence[Mapping[Any, float]]) -> Estimate:
    """Mean of questions over some seeds that all answered them; normal interval over questions."""
    keys = set.intersection(*(set(run) for run in runs))
    values = [sum(run[key] for run in runs) / len(runs) for key in sorted(keys, key=str)]
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    half = Z95 * math.sqrt(variance / len(values))
    seeds = tuple(sum(run[key] for key in keys) / len(keys) for run in runs)
    return Estimate(mean, mean - half, mean + half, seeds if len(runs) > 1 else ())


def difference(ones: Sequence[Scores], others: Sequence[Scores]) -> Estimate:
    """Paired difference of two ways, seed by seed; a way with one run is compared with each run of the other."""
    count = max(len(ones), len(others))
    pairs = zip(list(ones) * (count // len(ones)), list(others) * (count // len(others)), strict=True)
    return estimate([{key: a.score[key] - b.score[key] for key in a.score if key in b.score} for a, b in pairs])


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    claim: str
    what: str
    task: str
    value: str
    verdict: str = ""


# --- the claims -------------------------------------------------------------------------------------------------------


def dyvte(measured: Measured) -> list[Row]:
    """DyVTE keeps accuracy at fewer FLOPs, and beats exits that do not look at the prompt."""
    name, tiny = "DyVTE", measured.model(None)
    tasks = (*LOOKING, "puzzle_choice", "puzzle_list")
    plain = measured.over(tiny, "none", [], tasks)
    fixed = fixed_exits(measured, tasks)
    gates = [
        measured.over(tiny, f"gates-{seed}", [measured.trained("gates", seed)], tasks) for seed in PARTS["gates"].seeds
    ]
    rows, what = [], "gates against the plain model"
    for task in tasks:
        some = [run.of(task) for run in gates]
        drop, flops = difference(some, [plain.of(task)]), _ratio(some, plain.of(task))
        rows.append(Row(name, what, task, f"{drop}, FLOPs {flops:.2f}x", _kept(drop, flops)))
    drop, flops = difference(gates, [plain]), _ratio(gates, plain)
    rows.append(Row(name, what, "all", f"{drop}, FLOPs {flops:.2f}x", _kept(drop, flops)))
    same_depth, chance, depths = [], [], []
    for run in gates:
        exits = run.exits(len(fixed) - 1)
        share = [list(exits.values()).count(layer) / len(exits) for layer in range(len(fixed))]
        depth = sum(layer * part for layer, part in enumerate(share))
        below = min(int(depth), len(fixed) - 2)
        weights = [0.0] * len(fixed)
        weights[below], weights[below + 1] = below + 1 - depth, depth - below
        depths.append(depth)
        same_depth.append(mixed(fixed, weights))
        chance.append(mixed(fixed, share))
    mean = sum(depths) / len(depths)
    for others, what in ((same_depth, f"fixed exits of the same mean depth ({mean:.1f})"), (chance, "random exits")):
        found = difference(gates, others)
        rows.append(Row(name, f"gates against {what}", "all", str(found), _better(found)))
    return rows


def static_exit(measured: Measured) -> list[Row]:
    """A fixed exit hurts open answers far more than multiple choice."""
    rows, name = [], "fixed exit"
    tasks = ("puzzle_choice", "puzzle_list")
    fixed = fixed_exits(measured, tasks)
    for layer, run in enumerate(fixed[:-1]):
        losses = [difference([run.of(task)], [fixed[-1].of(task)]) for task in tasks]
        value = f"multiple choice {losses[0]}, open list {losses[1]}"
        apart = losses[1].high < losses[0].low
        rows.append(
            Row(name, f"exit after layer {layer}", " / ".join(tasks), value, "holds" if apart else "no contrast")
        )
    return rows


def naavit(measured: Measured) -> list[Row]:
    """NAAViT, trained, is at least as good as full attention trained alike."""
    full = [measured.over(measured.model("full", seed), "none", [], LOOKING) for seed in SEEDS]
    cut = get_technique("NAAViT")()
    trained = [measured.over(measured.model("naavit", seed), "naavit", [cut], LOOKING) for seed in SEEDS]
    rows = _task_by_task("NAAViT", "trained with it against full attention trained alike", trained, full)
    untrained = [measured.over(measured.model(None), "naavit", [cut], LOOKING)]
    found = difference(untrained, [measured.over(measured.model(None), "none", [], LOOKING)])
    rows.append(Row("NAAViT", "switched on without training", "all", str(found)))
    return rows


def mma(measured: Measured) -> list[Row]:
    """Modality-mutual attention beats causal attention, same data and budget."""
    causal = [measured.over(measured.model("full", seed), "none", [], LOOKING) for seed in SEEDS]
    open_ = get_technique("MMA")()
    trained = [measured.over(measured.model("mma", seed), "mma", [open_], LOOKING) for seed in SEEDS]
    return _task_by_task("MMA", "trained with it against causal attention trained alike", trained, causal)


def lorra(measured: Measured) -> list[Row]:
    """LoRRA keeps text-only ability through visual tuning."""
    name, rows = "LoRRA", []
    for task in ("puzzle_words", "puzzle_chat", "mllm_reading"):
        before = measured.over(measured.model(None), "none", [], (task,))
        without = [measured.over(measured.model("plain_tuned", seed), "none", [], (task,)) for seed in SEEDS]
        with_ = [
            measured.over(measured.model("lorra", seed), "lorra", [measured.trained("lorra", seed)], (task,))
            for seed in SEEDS
        ]
        for kind in manifest()[task]["kinds"] if task == "puzzle_chat" else [None]:
            parts = [[run.kind(kind) for run in runs] for runs in ([before], without, with_)]
            levels = ", ".join(
                f"{word} {estimate([run.score for run in runs]).level}"
                for word, runs in zip(("before", "tuned without learners", "with"), parts, strict=True)
            )
            gain = difference(parts[2], parts[1])
            what = f"{kind or 'all'}: {levels}; learners add"
            rows.append(Row(name, what, task, str(gain), _better(gain) if task != "mllm_reading" else ""))
    return rows


def urag(measured: Measured) -> list[Row]:
    """URaG finds the page, and answers long documents better and cheaper."""
    rows, name, seeds = [], "URaG", PARTS["urag_joint"].seeds
    for pages in (5, 10, 20):
        task = f"puzzle_pages{pages}"
        limit = measured.limit if pages < 20 else measured.limit * 3 // 10  # they take seconds each
        everything = [measured.over(measured.model("urag_joint", seed), "none", [], (task,), limit) for seed in seeds]
        kept = [
            measured.over(
                measured.model("urag_joint", seed), "urag", [measured.trained("urag_joint", seed)], (task,), limit
            )
            for seed in seeds
        ]
        evidence = {(task, row["id"]): row["evidence"] for row in documents(task)}
        ranks = []
        for run in kept:
            found = {}
            for key, told in run.decisions.items():
                scores = told["URaG"]["scores"]
                found[key] = sum(score > scores[evidence[key]] for score in scores)
            ranks.append(found)
        for top in (1, 5):
            hits = estimate([{key: float(rank < top) for key, rank in found.items()} for found in ranks])
            rows.append(Row(name, f"top-{top} page", task, f"{hits.level} (chance {100 * min(1, top / pages):.0f})"))
        gain, flops = difference(kept, everything), _ratio(kept, everything[0])
        levels = (estimate([run.score for run in runs]).level for runs in (everything, kept))
        what = "answers with all pages {}, with kept pages {}".format(*levels)
        rows.append(Row(name, what, task, f"{gain}, FLOPs {flops:.2f}x", _better(gain)))
        asked = "page number"  # the one kind that a single page can answer
        alone = [
            measured.over(measured.model("urag_joint", seed), "none", [], (f"{task}_gold",), limit // 3)
            for seed in seeds
        ]
        gold = estimate([run.score for run in alone])
        levels = (estimate([run.kind(asked).score for run in runs]).level for runs in (everything, kept))
        what = "{}: all pages {}, kept pages {}, gold page".format(asked, *levels)
        rows.append(Row(name, what, task, gold.level))
    return rows


#: name -> what measures it, and the parts that it needs
CLAIMS: dict[str, tuple[Callable[[Measured], list[Row]], tuple[str, ...]]] = {
    "dyvte": (dyvte, ("gates",)),
    "naavit": (naavit, ("full", "naavit")),
    "mma": (mma, ("full", "mma")),
    "lorra": (lorra, ("plain_tuned", "lorra")),
    "urag": (urag, ("urag_joint",)),
    "static": (static_exit, ()),
}


def fixed_exits(measured: Measured, tasks: Sequence[str]) -> list[Scores]:
    """Scores when all visual tokens leave after each layer; the last one is the plain model."""
    cls = get_technique("DyVTE")
    layers = json.loads((TINY / "config.json").read_text(encoding="utf-8"))["text_config"]["num_hidden_layers"]
    tiny = measured.model(None)
    runs = [measured.over(tiny, f"exit-{layer}", [cls(exit_layer=layer)], tasks) for layer in range(layers - 1)]
    return [*runs, measured.over(tiny, "none", [], tasks)]


def mixed(runs: Sequence[Scores], weights: Sequence[float]) -> Scores:
    """What choosing among runs by chance gives, expected."""
    score = {key: sum(w * run.score[key] for w, run in zip(weights, runs, strict=True)) for key in runs[0].score}
    cost = {key: sum(w * run.cost[key] for w, run in zip(weights, runs, strict=True)) for key in runs[0].cost}
    return Scores(score, cost)


@cache
def documents(task: str) -> list[dict[str, Any]]:
    """Rows of a task without their pictures."""
    import pyarrow.parquet as pq

    from mllm.eval.tasks import task_folder

    file = task_folder() / "data" / f"{task}.parquet"
    return pq.read_table(file, columns=["id", "kind", "evidence"]).to_pylist()


def _ratio(runs: Sequence[Scores], plain: Scores) -> float:
    return sum(run.flops for run in runs) / len(runs) / plain.flops


def _better(found: Estimate) -> str:
    return "holds" if found.low > 0 else "does not hold" if found.high < 0 else "open"


def _kept(drop: Estimate, flops: float) -> str:
    """Whether half a point at most is lost, and something is saved for it."""
    return "does not hold" if drop.value < -0.005 else "holds" if flops < 0.995 else "saves nothing"


def _task_by_task(name: str, what: str, ones: list[Scores], others: list[Scores]) -> list[Row]:
    rows = []
    for task in (*ones[0].tasks, None):
        some, rest = ([run if task is None else run.of(task) for run in runs] for runs in (ones, others))
        found, flops = difference(some, rest), _ratio(some, rest[0])
        levels = (estimate([run.score for run in runs]).level for runs in (rest, some))
        rows.append(
            Row(name, what, task or "all", f"{found}, FLOPs {flops:.2f}x ({' -> '.join(levels)})", _better(found))
        )
    if seeds := ", ".join(f"{100 * value:+.1f}" for value in difference(ones, others).seeds):
        rows.append(Row(name, f"{what}, seed by seed", "all", seeds))
    return rows


# --- the table --------------------------------------------------------------------------------------------------------


def run_claims(
    out: Path, parts: Path = PARTS_FOLDER, names: Sequence[str] = (), limit: int = LIMIT, batch_size: int = 16
) -> list[Row]:
    """Measure claims and write ``claims.md`` and ``claims.json`` into ``out``.

    Args:
        out: folder; what is in it already is not measured again.
        parts: folder of trained parts.
        names: of claims; all without.
        limit: questions of a task.
        batch_size: prompts in a batch.

    Raises:
        ConfigError: an unknown claim.
        LoadError: a part is missing.
    """
    for name in names:
        if name not in CLAIMS:
            raise ConfigError(f"There is no claim {name!r}. Claims: {', '.join(CLAIMS)}.")
    measured = Measured(out, parts, limit, batch_size)
    chosen = [CLAIMS[name] for name in names or CLAIMS]
    for part in {part for _, needed in chosen for part in needed}:  # before anything is measured
        for seed in PARTS[part].seeds:
            measured.part(part, seed)
    rows = [row for measure, _ in chosen for row in measure(measured)]
    write_json(out / "claims.json", [asdict(row) for row in rows])
    (out / "claims.md").write_text(table(rows), encoding="utf-8")
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; points of 100, 95 % intervals in brackets."""
    lines = ["| claim | what | task | points [95 % interval] | |", "|---|---|---|---|---|"]
    lines += [f"| {row.claim} | {row.what} | {row.task} | {row.value} | {row.verdict} |" for row in rows]
    return "\n".join(lines) + "\n"
