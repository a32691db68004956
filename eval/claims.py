"""The papers' headline claims, measured on the model ``tiny`` with parts that were trained on it: ``mllm claims``.

Each claim is a function that asks for scores of (model, techniques, task) and returns rows of the table. Scores come
from :func:`mllm.eval.runner.run_grid`, question by question, so that differences are paired, and a run that was stopped
goes on. Of parts with several seeds a question counts with its mean over them, and the interval is that of the mean
over questions: it says what other questions would give, not what other seeds would, whose differences stand beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mllm.config import Config
from mllm.errors import ConfigError, EvalError, LoadError
from mllm.eval.results import cell_path, read_cell, write_json
from mllm.eval.runner import run_grid
from mllm.eval.stats import adjusted
from mllm.eval.tasks import manifest
from mllm.loading import TINY
from mllm.technique import Stack, Technique, get_technique

#: trained parts that come with this package, one folder each
PARTS_FOLDER = TINY.parent / "claims"
SEEDS = (0, 1, 2)
#: questions of a task, without --limit
LIMIT = 200
#: first documents of 5 and of 10 pages, by which the recipe of URaG's joint stage was chosen
SEEN = 100
LOOKING = ("puzzle_scenes", "puzzle_characters", "puzzle_counting", "puzzle_relations", "puzzle_reading")
ONE_QUESTION = "grids:1,characters:1,grids:1,spelling"
SEVERAL_QUESTIONS = "grids:8,characters:8,grids:8,characters:8,spelling"


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
        dtype: of the frozen weights.
    """

    name: str
    technique: str
    data: str
    training: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS
    start: str | None = None
    dtype: str = "float32"

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
        start = ["mllm train", self.technique.lower(), "--model tiny", f"--data {self.data}", f"--dtype {self.dtype}"]
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
            dtype=self.dtype,
        )


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


_RANK = {"rank": 8, "alpha": 16.0}
_WIDE = {"rank": 16, "alpha": 32.0}
_ADAPTING = {"steps": 220, "batch_size": 14, "lr": 1.5e-3}
_TUNING = {"steps": 120, "batch_size": 16, "lr": 1e-3}
_BENDING = {"steps": 120, "batch_size": 16}
PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part(
            "gates",
            "DyVTE",
            ONE_QUESTION,
            {"steps": 1500},
            options={"samples": 3000, "held_out": 900, "target_drop": 0.005},
        ),
        # each technique and its control: the same data, steps and rate
        Part("full", "naavit", SEVERAL_QUESTIONS, _ADAPTING, options={"attach": False, **_WIDE}, dtype="bfloat16"),
        Part("naavit", "naavit", SEVERAL_QUESTIONS, _ADAPTING, options=_WIDE, dtype="bfloat16"),
        # pictures that attend to the question must not see the next one's, nor this one's answer
        Part("causal", "naavit", ONE_QUESTION, _TUNING, options={"attach": False, **_RANK}),
        Part("mma", "mma", ONE_QUESTION, _TUNING, options=_RANK),
        # half an hour a seed, for a difference that one seed does not show
        Part(
            "plain_tuned",
            "naavit",
            "scenes,reading",
            {**_BENDING, "lr": 2e-3},
            options={"attach": False, **_RANK},
            seeds=(0,),
        ),
        Part(
            "lorra",
            "LoRRA",
            "scenes,reading",
            {**_BENDING, "lr": 2e-3},
            {"rank": 8, "router_length": 1024},
            {"model_lr": 2e-3, "rank": 8},
            seeds=(0,),
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
            {"steps": 400, "batch_size": 2, "accumulation": 2, "lr": 1.5e-3},
            {"layer": 2, "keep_pages": 3, "hidden": 256, "width": 128},
            {"stage": "joint", "rank": 32, "alpha": 64.0},
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

    Attributes:
        bars: whether progress is shown as bars, not as lines.
    """

    def __init__(self, out: Path, parts: Path, limit: int = LIMIT, batch_size: int = 16) -> None:
        self.out, self.parts, self.limit, self.batch_size = out, parts, limit, batch_size
        self.bars = True

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
        batch_size: int | None = None,
    ) -> Scores:
        """Scores of a model with techniques on tasks; ``name`` tells the techniques apart in file names."""
        limit, batch_size = limit or self.limit, batch_size or self.batch_size
        config = Config(name, Stack(*techniques))
        how = {"dtype": "float32", "device": "cpu", "progress": self.bars}
        run_grid(dict([model]), [config], tasks, self.out, limit, batch_size, retry=True, **how)
        found = Scores({}, {}, {})
        for task in tasks:
            cell = read_cell(cell_path(self.out, model[0], name, task))
            if cell is None or cell["errors"]:
                reasons = "; ".join(cell["error_reasons"]) if cell else "no result was written"
                raise EvalError(f"{task} with {name}: some questions have no answer. {reasons}")
            if not self.bars:
                mean = sum(sample["score"] for sample in cell["samples"]) / len(cell["samples"])
                print(f"{task}, {model[0]}, {name}: {mean:.3f}", file=sys.stderr, flush=True)
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
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def estimate(runs: Sequence[Mapping[Any, float]], low: float = 0.0, high: float = 1.0) -> Estimate:
    """Mean of questions over some seeds that all answered them, each between ``low`` and ``high``.

    The interval is over questions, see :func:`mllm.eval.stats.adjusted`.

    Raises:
        EvalError: there are none.
    """
    keys = set.intersection(*(set(run) for run in runs))
    if not keys:
        raise EvalError("A kind of question does not come up among so few. Ask for more of each task: --limit 20.")
    values = [sum(run[key] for run in runs) / len(runs) for key in sorted(keys, key=str)]
    seeds = tuple(sum(run[key] for key in keys) / len(keys) for run in runs)
    return Estimate(sum(values) / len(values), *adjusted(values, low, high), seeds if len(runs) > 1 else ())


def difference(ones: Sequence[Scores], others: Sequence[Scores]) -> Estimate:
    """Paired difference of two ways, seed by seed; a way with one run is compared with each run of the other."""
    count = max(len(ones), len(others))
    pairs = zip(list(ones) * (count // len(ones)), list(others) * (count // len(others)), strict=True)
    paired = [{key: a.score[key] - b.score[key] for key in a.score if key in b.score} for a, b in pairs]
    return estimate(paired, -1.0, 1.0)


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
    fixed = fixed_exits(measured, tasks)
    # one prompt at a time: a batch pays for the row that keeps its picture longest
    plain = measured.over(tiny, "none-alone", [], tasks, batch_size=1)
    gates = [
        measured.over(tiny, f"gates-{seed}-alone", [measured.trained("gates", seed)], tasks, batch_size=1)
        for seed in PARTS["gates"].seeds
    ]
    rows, what = [], "gates against the plain model"
    for task in tasks:
        some = [run.of(task) for run in gates]
        drop, flops = difference(some, [plain.of(task)]), _ratio(some, plain.of(task))
        rows.append(Row(name, what, task, f"{drop}, FLOPs {flops:.2f}x", _kept(drop, flops)))
    drop, flops = difference(gates, [plain]), _ratio(gates, plain)
    rows.append(Row(name, what, "all", f"{drop}, FLOPs {flops:.2f}x", _kept(drop, flops)))
    batched = measured.over(tiny, "gates-0", [measured.trained("gates", 0)], tasks)
    flops = f"FLOPs {_ratio([batched], fixed[-1]):.2f}x"
    rows.append(Row(name, f"the same in batches of {measured.batch_size}, each as deep as its deepest", "all", flops))
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
    causal = [measured.over(measured.model("causal", seed), "none", [], LOOKING) for seed in SEEDS]
    open_ = get_technique("MMA")()
    trained = [measured.over(measured.model("mma", seed), "mma", [open_], LOOKING) for seed in SEEDS]
    return _task_by_task("MMA", "trained with it against causal attention trained alike", trained, causal)


def lorra(measured: Measured) -> list[Row]:
    """LoRRA keeps text-only ability through visual tuning."""
    name, rows, seeds = "LoRRA", [], PARTS["lorra"].seeds
    for task in ("puzzle_words", "puzzle_chat", "mllm_reading"):
        before = measured.over(measured.model(None), "none", [], (task,))
        without = [measured.over(measured.model("plain_tuned", seed), "none", [], (task,)) for seed in seeds]
        with_ = [
            measured.over(measured.model("lorra", seed), "lorra", [measured.trained("lorra", seed)], (task,))
            for seed in seeds
        ]
        for kind in manifest()[task]["kinds"] if task == "puzzle_chat" else [None]:
            parts = [[run.kind(kind) for run in runs] for runs in ([before], without, with_)]
            levels = [estimate([run.score for run in runs]).level for runs in parts]
            gain = difference(parts[2], parts[1])
            what = "with learners against without" + (f", chats {kind}" if kind else "")
            value = f"{gain} ({levels[1]} -> {levels[2]}; before tuning {levels[0]})"
            rows.append(Row(name, what, task, value, _better(gain) if task != "mllm_reading" else ""))
    return rows


def urag(measured: Measured, seeds: Sequence[int] = SEEDS) -> list[Row]:
    """URaG finds the page, and answers long documents better and cheaper."""
    rows, name = [], "URaG"
    # share of the limit, since long documents take seconds each; and those not counted: the recipe was chosen by them
    for pages, share, seen in ((5, 0.5, SEEN), (10, 1, SEEN), (20, 0.3, 0)):
        task = f"puzzle_pages{pages}"
        limit = seen + max(1, int(measured.limit * share))
        everything = [measured.over(measured.model("urag_joint", seed), "none", [], (task,), limit) for seed in seeds]
        kept = [
            measured.over(
                measured.model("urag_joint", seed), "urag", [measured.trained("urag_joint", seed)], (task,), limit
            )
            for seed in seeds
        ]
        everything, kept = (
            [run.only(key for key in run.score if key[1] >= seen) for run in runs] for runs in (everything, kept)
        )
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
        levels = " -> ".join(estimate([run.score for run in runs]).level for runs in (everything, kept))
        what = "answers with kept pages against all pages"
        rows.append(Row(name, what, task, f"{gain}, FLOPs {flops:.2f}x ({levels})", _better(gain)))
        if gain.seeds:
            rows.append(Row(name, "the same, seed by seed", task, _each(gain)))
        asked, third = "page number", max(1, measured.limit // 3)  # the one kind that a single page can answer
        before = sum(row["kind"] == asked for row in documents(task)[:seen])
        alone = [
            measured.over(measured.model("urag_joint", seed), "none", [], (f"{task}_gold",), before + third)
            for seed in seeds
        ]
        alone = [run.only(key for key in run.score if key[1] >= before) for run in alone]
        shown = [[run.kind(asked) for run in everything], [run.kind(asked) for run in kept], alone]
        levels = " -> ".join(estimate([run.score for run in runs]).level for runs in shown)
        rows.append(Row(name, f"{asked}s: all pages -> kept pages -> the right page alone", task, levels))
    return rows


@dataclass(frozen=True)
class Claim:
    """How a claim is measured.

    Attributes:
        measure: returns its rows.
        parts: that it needs.
        shares: arguments for ``measure`` that between them ask for all its scores, so that processes can share it out.
    """

    measure: Callable[..., list[Row]]
    parts: tuple[str, ...] = ()
    shares: tuple[dict[str, Any], ...] = ({},)


#: by name; the longest first, and what stands on another's scores behind it
CLAIMS: dict[str, Claim] = {
    "dyvte": Claim(dyvte, ("gates",)),
    "urag": Claim(urag, ("urag_joint",), tuple({"seeds": (seed,)} for seed in SEEDS)),
    "naavit": Claim(naavit, ("full", "naavit")),
    "mma": Claim(mma, ("causal", "mma")),
    "lorra": Claim(lorra, ("plain_tuned", "lorra")),
    "static": Claim(static_exit),
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
    """Whether half a point at most is lost, and something is saved for it; ``(point)``: the interval leaves it open."""
    if flops >= 0.995:
        return "saves nothing"
    if drop.value < -0.005:
        return "does not hold" if drop.high < -0.005 else "does not hold (point)"
    return "holds" if drop.low >= -0.005 else "holds (point)"


def _task_by_task(name: str, what: str, ones: list[Scores], others: list[Scores]) -> list[Row]:
    rows = []
    for task in (*ones[0].tasks, None):
        some, rest = ([run if task is None else run.of(task) for run in runs] for runs in (ones, others))
        found, flops = difference(some, rest), _ratio(some, rest[0])
        levels = (estimate([run.score for run in runs]).level for runs in (rest, some))
        rows.append(
            Row(name, what, task or "all", f"{found}, FLOPs {flops:.2f}x ({' -> '.join(levels)})", _better(found))
        )
    if (found := difference(ones, others)).seeds:
        rows.append(Row(name, f"{what}, seed by seed", "all", _each(found)))
    return rows


def _each(found: Estimate) -> str:
    return ", ".join(f"{100 * value:+.1f}" for value in found.seeds)


# --- the table --------------------------------------------------------------------------------------------------------


def run_claims(
    out: Path,
    parts: Path = PARTS_FOLDER,
    names: Sequence[str] = (),
    limit: int = LIMIT,
    batch_size: int = 16,
    jobs: int = 1,
) -> list[Row]:
    """Measure claims and write ``claims.md`` and ``claims.json`` into ``out``.

    Args:
        out: folder; what is in it already is not measured again.
        parts: folder of trained parts.
        names: of claims; all without.
        limit: questions of a task.
        batch_size: prompts in a batch.
        jobs: claims, or seeds of one, that are measured at a time, each in a process of its own with one thread.

    Raises:
        ConfigError: an unknown claim.
        LoadError: a part is missing.
    """
    for name in names:
        if name not in CLAIMS:
            raise ConfigError(f"There is no claim {name!r}. Claims: {', '.join(CLAIMS)}.")
    measured = Measured(out, parts, limit, batch_size)
    chosen = [CLAIMS[name] for name in names or CLAIMS]
    for part in {part for claim in chosen for part in claim.parts}:  # before anything is measured
        for seed in PARTS[part].seeds:
            measured.part(part, seed)
    if jobs > 1:
        _measure_at_once(measured, chosen, jobs)
    rows = [row for claim in chosen for row in claim.measure(measured)]
    write_json(out / "claims.json", [asdict(row) for row in rows])
    (out / "claims.md").write_text(table(rows), encoding="utf-8")
    return rows


def _measure_at_once(measured: Measured, claims: Iterable[Claim], jobs: int) -> None:
    """Measure claims in several processes; their scores stay in the folder."""
    shares = [(claim.measure, share) for claim in claims for share in claim.shares]
    with ProcessPoolExecutor(min(jobs, len(shares)), get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_measure_share, measured, *share) for share in shares]):
            future.result()


def _measure_share(measured: Measured, measure: Callable[..., list[Row]], share: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    measured.bars = False  # those of several processes would overwrite each other
    measure(measured, **share)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; points of 100, 95 % intervals in brackets."""
    lines = ["| claim | what | task | points [95 % interval] | |", "|---|---|---|---|---|"]
    lines += [f"| {row.claim} | {row.what} | {row.task} | {row.value} | {row.verdict} |" for row in rows]
    return "\n".join(lines) + "\n"
