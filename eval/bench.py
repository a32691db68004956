"""What the clock says to what the FLOPs promise: techniques at real shapes, against the plain model and an oracle.

Weights are random, the decoder's shape is real, visual features are random and handed over encoded, so that only the
decoder is timed. In each round all settings run in turn on the same numbers, and ratios are taken within the round:

* ``speed-up``: time of the plain model over the technique's;
* ``predicted``: the same ratio of FLOPs (:mod:`mllm.cost`);
* ``oracle``: time of the plain model over that of the same work written by hand (:mod:`mllm.eval.bench_oracle`): stock
  layers in a bare loop on the rows that the technique leaves, without hooks, layouts or bookkeeping.

A technique that does not lose anything has ``realised_over_oracle`` = 1.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache

from mllm.cost import ARCHITECTURES, LayerWork, ModelSpec
from mllm.errors import ConfigError
from mllm.eval.bench_model import CHAT, MIN_TEXT, PAGES, SETTINGS, build_model, make_prompt, prepare, twin
from mllm.eval.bench_oracle import Bare
from mllm.eval.results import check_writable, environment, write_json
from mllm.loading import ATTENTION_BACKENDS, pick_device, pick_dtype
from mllm.timing import PeakMemory, synchronize
from mllm.versions import CACHE

_RESAMPLES = 1000
_DECODE_STEPS = 20


@dataclass
class Row:
    """One setting at one size; times in milliseconds, medians over the rounds.

    Attributes:
        arch, layers, attn, dtype, device: what ran; ``layers`` may be fewer than the architecture has.
        setting: name of the setting.
        phase: ``"prefill"`` or ``"decode"`` (one token).
        visual_tokens, text_tokens, batch: the prompt.
        plain_ms, technique_ms, oracle_ms: medians.
        speedup, oracle, predicted: ratios to the plain model.
        realised_over_oracle, realised_over_predicted: with 95 % bootstrap intervals of the median over rounds.
        text_only_ms: the plain model on the prompt's text alone, without its pictures.
        kv_bytes, dense_kv_bytes, peak_bytes, dense_peak_bytes: after a prefill, and the highest use in it.
        rounds: timed rounds.
        note: what was adapted to this machine, or why there are no times.
        commit: of the code that was measured.
    """

    arch: str
    layers: int
    attn: str
    dtype: str
    device: str
    setting: str
    phase: str
    visual_tokens: int
    text_tokens: int
    batch: int
    plain_ms: float | None = None
    technique_ms: float | None = None
    oracle_ms: float | None = None
    text_only_ms: float | None = None
    speedup: float | None = None
    oracle: float | None = None
    predicted: float | None = None
    realised_over_oracle: float | None = None
    realised_over_oracle_ci95: list[float] = field(default_factory=list)
    realised_over_predicted: float | None = None
    realised_over_predicted_ci95: list[float] = field(default_factory=list)
    kv_bytes: int | None = None
    dense_kv_bytes: int | None = None
    peak_bytes: int | None = None
    dense_peak_bytes: int | None = None
    rounds: int = 0
    note: str = ""
    commit: str | None = None

    @property
    def key(self) -> tuple:
        """What no two rows of one file share, in the order of the table."""
        order = list(SETTINGS).index(self.setting)
        size = (self.arch, self.device, self.dtype, self.attn, self.layers, self.batch, self.text_tokens)
        return (*size, self.phase != "prefill", _rough(self.visual_tokens), order)


def _rough(visual_tokens: int) -> int:
    """Pages round the number of visual tokens down."""
    return round(visual_tokens / 32)


# --- measuring --------------------------------------------------------------------------------------------------------


def _timed(device: torch.device, call: Callable[[], Any]) -> float:
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - begin) * 1e3


def _interval(ratios: Sequence[float]) -> list[float]:
    """95 % bootstrap interval of the median."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return [medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES) - 1]]


def _rounds(device: torch.device, calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Times of all calls, which take turns; the order turns round too, so that drift meets all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        order = list(calls) if number % 2 == 0 else list(calls)[::-1]
        for name in order:
            times[name].append(_timed(device, calls[name]))
    return times


def _fill(row: Row, times: dict[str, list[float]]) -> None:
    plain, technique, oracle = times["plain"], times["technique"], times["oracle"]
    row.rounds = len(plain)
    row.plain_ms, row.technique_ms, row.oracle_ms = map(statistics.median, (plain, technique, oracle))
    row.text_only_ms = statistics.median(times["text"])
    speedups = [a / b for a, b in zip(plain, technique, strict=True)]
    row.speedup = statistics.median(speedups)
    row.oracle = statistics.median(a / b for a, b in zip(plain, oracle, strict=True))
    ratios = [a / b for a, b in zip(oracle, technique, strict=True)]
    row.realised_over_oracle, row.realised_over_oracle_ci95 = statistics.median(ratios), _interval(ratios)
    ratios = [speedup / row.predicted for speedup in speedups]
    row.realised_over_predicted, row.realised_over_predicted_ci95 = statistics.median(ratios), _interval(ratios)


def measure(
    model: nn.Module, plain: nn.Module, name: str, visual: int, text: int, batch: int, rounds: int, start: Row
) -> Iterator[Row]:
    """One setting at one size: the prefill, then a decoded token, each as soon as it is measured.

    Args:
        model: what the technique is attached to.
        plain: its :func:`~mllm.eval.bench_model.twin`.
        name: of the setting.
        visual, text, batch: the prompts.
        rounds: timed rounds.
        start: what the rows have in common.
    """
    setting, device = SETTINGS[name], model.lm_head.weight.device
    prompt = make_prompt(model, visual, text, batch, setting.pages)
    prefill, decode = (replace(start, phase=phase, visual_tokens=prompt.visual) for phase in ("prefill", "decode"))
    token = torch.full((batch, 1), MIN_TEXT, device=device)
    memory = PeakMemory(device)

    def step(of: nn.Module, cache: DynamicCache) -> Any:
        return of.model(input_ids=token, use_cache=True, **{CACHE: cache})

    def peak(call: Callable[[], Any]) -> int | None:
        memory.reset()
        call()
        return memory.read()

    stack = prepare(setting, model, prompt.length)
    handle = stack.attach(model, CHAT)
    bare = Bare(plain, prompt, stack, setting.work, handle.modules)
    calls = {
        "plain": lambda: plain.model(**prompt.inputs()),
        "technique": lambda: model.model(**prompt.inputs()),
        "oracle": bare.prefill,
        "text": lambda: plain.model(**prompt.text_inputs()),
    }
    try:
        dense, text_only = calls["plain"]()[CACHE], calls["text"]()[CACHE]  # warm up
        calls["oracle"]()  # also keeps the picture where it is asked about again
        calls["technique"]()
        handle.run.reset()
        cache = calls["technique"]()[CACHE]
        report = handle.run.report()
        prefill.predicted = report.dense_flops / report.flops
        for row in (prefill, decode):
            row.kv_bytes, row.dense_kv_bytes = report.kv_bytes, report.dense_kv_bytes
        prefill.dense_peak_bytes, prefill.peak_bytes = peak(calls["plain"]), peak(calls["technique"])
        _fill(prefill, _rounds(device, calls, rounds))
        yield prefill
        handle.run.reset()
        step(model, cache)
        decode.predicted = handle.run.dense_flops / handle.run.flops
        made, places = bare.prefill(), itertools.count(prompt.length)  # its memories belong to this cache
        steps = {
            "plain": lambda: step(plain, dense),
            "technique": lambda: step(model, cache),
            "oracle": lambda: bare.step(token, next(places), made),
            "text": lambda: step(plain, text_only),
        }
        _rounds(device, steps, 2)
        _fill(decode, _rounds(device, steps, max(_DECODE_STEPS, rounds)))
        yield decode
    finally:
        handle.detach()


# --- what fits --------------------------------------------------------------------------------------------------------


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large linear layer."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    return 2 * 2048**3 / min(_timed(device, lambda: nn.functional.linear(a, a)) for _ in range(5)) * 1e3


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    memory = Path("/proc/meminfo")
    if memory.exists():
        for line in memory.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 8 << 30


def _layers_that_fit(spec: ModelSpec, element: int, length: int, free: int) -> int:
    """Decoder layers whose weights and caches (three at a time) take at most two thirds of the free memory."""
    per_layer = element * (
        2 * spec.hidden * (spec.q_width + spec.kv_width)
        + 3 * spec.hidden * spec.intermediate
        + 3 * 2 * length * spec.kv_width
    )
    working = element * length * (4 * spec.hidden + 3 * spec.intermediate)
    return min(spec.layers, int((free * 2 / 3 - working) // per_layer))


def run_bench(
    out: str | Path,
    architectures: Sequence[str],
    visual_tokens: Sequence[int] = (576, 2880, 10000),
    batches: Sequence[int] = (1, 8),
    text_tokens: int = 64,
    settings: Sequence[str] = tuple(SETTINGS),
    rounds: int = 7,
    seconds: float = 300.0,
    layers: int | None = None,
    attn: str = "sdpa",
    dtype: str = "auto",
    device: str = "auto",
    within: float | None = None,
) -> list[Row]:
    """Measure, and write ``bench.json``, ``bench.md`` and ``bench.png`` into ``out``.

    Rows of other settings and sizes that stand in ``out`` already stay, if they were measured on the same machine.

    Args:
        out: folder.
        architectures: names of :data:`mllm.cost.ARCHITECTURES`.
        visual_tokens, batches: sizes; every pair is one cell.
        text_tokens: per prompt.
        settings: names of :data:`mllm.eval.bench_model.SETTINGS`.
        rounds: timed rounds a setting.
        seconds: a setting that is expected to take longer at a size is left out there, and says so.
        layers: decoder layers at most; fewer are used where memory forbids, and the rows say so.
        attn, dtype, device: see :func:`mllm.load`.
        within: seconds for the whole run; what is not expected to fit into them is left out.

    Raises:
        ConfigError: an unknown architecture, setting or backend, a size below 1, or rows of another machine in ``out``.
        EvalError: ``out`` cannot be written.
    """
    for name, known in (*((a, ARCHITECTURES) for a in architectures), *((s, SETTINGS) for s in settings)):
        if name not in known:
            raise ConfigError(f"{name!r} is not one of: {', '.join(known)}.")
    smallest = min([*visual_tokens, *batches, rounds, 4 if layers is None else layers // 4], default=0)
    if smallest < 1 or not (architectures and settings and visual_tokens and batches) or text_tokens < MIN_TEXT:
        raise ConfigError(
            f"visual_tokens={list(visual_tokens)}, batches={list(batches)}, text_tokens={text_tokens}, "
            f"rounds={rounds}, layers={layers}: at least one of each, 4 layers and {MIN_TEXT} text tokens are needed."
        )
    if any(SETTINGS[name].pages > min(visual_tokens) for name in settings):
        raise ConfigError(
            f"visual_tokens={list(visual_tokens)} do not fill the {PAGES} pages of URaG. Give more, or other settings."
        )
    if attn not in ATTENTION_BACKENDS:
        raise ConfigError(f"attn={attn!r} is not one of: {', '.join(ATTENTION_BACKENDS)}.")
    out = Path(out)
    target = pick_device(device)
    number = pick_dtype(dtype, target)
    check_writable(out)
    before = _earlier(out / "bench.json")
    speed = _speed(target, number)
    rows: list[Row] = []
    cells = [(arch, batch, visual) for arch in architectures for batch in batches for visual in sorted(visual_tokens)]
    model = plain = built = None

    def keep(row: Row) -> None:
        row.commit = commit
        rows.append(row)
        write_json(out / "bench.json", {"env": environment(), "matmul_gflops": speed / 1e9, "rows": _merged()})

    def _merged() -> list[dict[str, Any]]:
        mine = {row.key for row in rows}
        return [asdict(row) for row in sorted([*(r for r in before if r.key not in mine), *rows], key=lambda r: r.key)]

    commit, begin = environment()["commit"], time.monotonic()
    with torch.inference_mode(), tqdm(total=len(cells) * len(settings), desc="bench", file=sys.stderr) as bar:
        for arch, batch, visual in cells:
            spec = ARCHITECTURES[arch]
            length = batch * (visual + text_tokens)
            if built is not None and built[0] != arch:
                model = plain = built = None  # before the free memory is looked at
            free = _free_bytes(target) + (0 if model is None else sum(p.nbytes for p in model.parameters()))
            use = min(layers or spec.layers, _layers_that_fit(spec, number.itemsize, length, free))
            note = "" if use == spec.layers else f"{use} of {spec.layers} layers"
            dense = LayerWork(length, length * (visual + text_tokens)).flops(spec) * max(use, 0)
            expected = dense / speed * (6 + rounds * 2.5)
            for name in settings:
                bar.set_postfix_str(f"{arch}, batch {batch}, {visual} visual tokens, {name}")
                common = (arch, use, attn, str(number).removeprefix("torch."), target.type, name, "prefill")
                row = Row(*common, visual, text_tokens, batch, note=note)
                left = None if within is None else within - (time.monotonic() - begin)
                if use < 4:
                    keep(replace(row, note="not enough memory for 4 layers"))
                elif expected > seconds or (left is not None and expected > left):
                    most = f"{seconds:.0f}" if expected > seconds else f"the {max(left, 0):.0f} s that are left"
                    keep(replace(row, note=f"left out: about {expected:.0f} s expected here, more than {most}"))
                else:
                    if built != (arch, use):
                        model = plain = None
                        model, built = build_model(arch, spec, use, attn, number, target), (arch, use)
                        plain = twin(model)
                    for found in measure(model, plain, name, visual, text_tokens, batch, rounds, row):
                        keep(found)  # what stands if it is stopped
                bar.update()
    from mllm.eval.bench_report import write_report

    write_report(out)
    return rows


def _earlier(path: Path) -> list[Row]:
    """Rows that stand there already, of this machine."""
    if not path.exists():
        return []
    env, here = json.loads(path.read_text(encoding="utf-8"))["env"], environment()
    for name in ("processor", "threads", "gpu", "torch", "transformers"):
        if env[name] != here[name]:
            raise ConfigError(
                f"{path} was measured with {name}={env[name]!r}, this is {here[name]!r}: their times do not compare. "
                "Give another --out."
            )
    return read_rows(path)


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a ``bench.json``."""
    return [Row(**row) for row in json.loads(Path(path).read_text(encoding="utf-8"))["rows"]]
