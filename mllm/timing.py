"""Time and memory, measured as a user feels them: the technique's own overhead is inside the timer."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from mllm.errors import ConfigError
from mllm.technique import Stack, Technique


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class TokenClock(BaseStreamer):
    """A streamer for ``generate`` that notes when each step's tokens are there; works for batches.

    ``times`` holds seconds from :meth:`start` to each step, the device synchronised.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []
        self._prompt_seen = False

    def start(self) -> None:
        """Start the clock; call it right before ``generate``."""
        self.times, self._prompt_seen = [], False
        synchronize(self.device)
        self._begin = time.perf_counter()

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:  # generate hands over the prompt first
            self._prompt_seen = True
            return
        synchronize(self.device)
        self.times.append(time.perf_counter() - self._begin)

    def end(self) -> None:
        synchronize(self.device)


class PeakMemory:
    """Highest memory use since :meth:`reset`, in bytes: allocated on a GPU, resident in RAM on Linux, else unknown."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._forbidden = False

    def reset(self) -> None:
        """Forget earlier peaks."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        control = Path("/proc/self/clear_refs")
        if control.exists():
            try:
                control.write_text("5")  # resets the resident high-water mark
            except OSError:  # a container may forbid it; read() then says unknown
                self._forbidden = True

    def read(self) -> int | None:
        """Bytes, or None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status")
        if self._forbidden or not status.exists():
            return None
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None


def percentile(values: Sequence[float], fraction: float) -> float:
    """Nearest-rank percentile of a non-empty sequence."""
    ordered = sorted(values)
    return ordered[max(math.ceil(fraction * len(ordered)), 1) - 1]


@dataclass(frozen=True)
class Measurement:
    """One setting, measured; times in milliseconds, sizes in bytes.

    Attributes:
        name: the stack.
        ttft_ms, ttft_ms_p90: time to the first token (vision tower and prefill), median and 90th percentile.
        token_ms, token_ms_p90: time per further token of the whole batch.
        tokens_per_s: further tokens a second, all rows together; None where only one token was asked for.
        flops, dense_flops: decoder FLOPs of one generate, and of the plain model.
        kv_bytes, dense_kv_bytes: cache at the end.
        peak_bytes: highest memory use; None where the system does not tell.
        repeats: timed runs.
    """

    name: str
    ttft_ms: float
    ttft_ms_p90: float
    token_ms: float | None
    token_ms_p90: float | None
    tokens_per_s: float | None
    flops: int
    dense_flops: int
    kv_bytes: int
    dense_kv_bytes: int
    peak_bytes: int | None
    repeats: int


class Measurements(list[Measurement]):
    """Settings measured side by side in one interleaved run; the first one is what the ratios compare with."""

    def to_dicts(self) -> list[dict[str, Any]]:
        return [asdict(item) for item in self]

    def table(self) -> str:
        """A Markdown table; the speed-up is over the first row."""
        head = "| setting | TTFT ms (p90) | speed-up | ms/token | FLOPs | KV MB | peak MB |\n" + "|---" * 7 + "|\n"
        return head + "\n".join(self._line(item) for item in self)

    def _line(self, item: Measurement) -> str:
        token = "-" if item.token_ms is None else f"{item.token_ms:.1f}"
        peak = "-" if item.peak_bytes is None else f"{item.peak_bytes / 1e6:.0f}"
        return (
            f"| {item.name} | {item.ttft_ms:.1f} ({item.ttft_ms_p90:.1f}) | {self[0].ttft_ms / item.ttft_ms:.2f}x "
            f"| {token} | {item.flops / item.dense_flops:.2f}x | {item.kv_bytes / 1e6:.2f} | {peak} |"
        )


def measure(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    settings: Sequence[Stack | Technique | None],
    max_new_tokens: int = 16,
    repeats: int = 5,
    warmup: int = 1,
    processor: Any = None,
) -> Measurements:
    """Measure the plain model and techniques on the same batch, taking turns so that noise meets all of them alike.

    Args:
        model: a model from :func:`mllm.load`.
        inputs: what the processor returned, on the model's device.
        settings: techniques or stacks; None is the plain model (only counted).
        max_new_tokens: tokens to generate; the end-of-text token is held back so that all settings do the same work.
        repeats: timed rounds.
        warmup: rounds before them that are not timed.
        processor: the model's, for techniques that must tell questions from answers.

    Raises:
        ConfigError: no setting, or a count below 1.
    """
    if not settings or max_new_tokens < 1 or repeats < 1 or warmup < 0:
        raise ConfigError(
            f"measure: {len(settings)} settings, max_new_tokens={max_new_tokens}, repeats={repeats}, warmup={warmup}: "
            "at least one setting, one token and one repeat are needed."
        )
    stacks = [s if isinstance(s, Stack) else Stack(*([] if s is None else [s])) for s in settings]
    device = next(model.parameters()).device
    clock, memory = TokenClock(device), PeakMemory(device)
    first: list[list[float]] = [[] for _ in stacks]
    further: list[list[float]] = [[] for _ in stacks]
    peaks: list[list[int | None]] = [[] for _ in stacks]
    runs: list[Any] = [None] * len(stacks)
    rows = inputs["input_ids"].shape[0]
    for turn in range(warmup + repeats):
        for number, stack in enumerate(stacks):
            with stack(model, processor) as run, torch.inference_mode():
                memory.reset()
                clock.start()
                model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    min_new_tokens=max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    streamer=clock,
                )
            if turn < warmup:
                continue
            first[number].append(clock.times[0] * 1e3)
            further[number] += [(b - a) * 1e3 for a, b in zip(clock.times, clock.times[1:], strict=False)]
            peaks[number].append(memory.read())
            runs[number] = run.report()
    results = Measurements()
    for number, stack in enumerate(stacks):
        token = statistics.median(further[number]) if further[number] else None
        report = runs[number]
        results.append(
            Measurement(
                name=" + ".join(map(repr, stack.techniques)) or "plain model",
                ttft_ms=statistics.median(first[number]),
                ttft_ms_p90=percentile(first[number], 0.9),
                token_ms=token,
                token_ms_p90=percentile(further[number], 0.9) if further[number] else None,
                tokens_per_s=None if token is None else rows * 1e3 / token,
                flops=report.flops,
                dense_flops=report.dense_flops,
                kv_bytes=report.kv_bytes,
                dense_kv_bytes=report.dense_kv_bytes,
                peak_bytes=None if None in peaks[number] else max(peaks[number]),
                repeats=repeats,
            )
        )
    return results
