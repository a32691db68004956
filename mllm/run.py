"""What happened while a stack was attached: rows per layer, FLOPs and cache bytes, counted as they were spent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mllm.cost import LayerWork, ModelSpec

if TYPE_CHECKING:
    from mllm.reuse import ImageCache


@dataclass(frozen=True)
class Report:
    """What a run did; lists hold one entry per layer unless said otherwise.

    Attributes:
        steps: forward calls (a generate of n tokens makes n).
        visual_tokens: visual tokens of each batch row in the last call that had some.
        visual_per_layer: the most visual tokens of any row that entered each layer in that call.
        exit_layer: last layer that saw visual tokens, per batch row; None for a row without any.
        cache_lengths: keys held per layer after the last call; empty without a cache.
        flops: FLOPs spent in the decoder layers by all calls since the run began or was reset.
        dense_flops: what the plain model would have spent.
        kv_bytes: key/value bytes of the last call's cache.
        dense_kv_bytes: what the plain model would have held.
    """

    steps: int
    visual_tokens: list[int]
    visual_per_layer: list[int]
    exit_layer: list[int | None]
    cache_lengths: list[int]
    flops: int
    dense_flops: int
    kv_bytes: int
    dense_kv_bytes: int

    @property
    def flops_ratio(self) -> float:
        """FLOPs spent over those of the plain model; 1.0 before any call."""
        return self.flops / self.dense_flops if self.dense_flops else 1.0

    @property
    def kv_ratio(self) -> float:
        """Cache bytes over those of the plain model; 1.0 without a cache."""
        return self.kv_bytes / self.dense_kv_bytes if self.dense_kv_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "flops_ratio": self.flops_ratio, "kv_ratio": self.kv_ratio}

    def __str__(self) -> str:
        parts = []
        if self.visual_per_layer:
            stages = [f"visual {self.visual_per_layer[0]}"]
            for layer, (before, now) in enumerate(zip(self.visual_per_layer, self.visual_per_layer[1:], strict=False)):
                if now != before:
                    stages.append(f"-> {now} after layer {layer}")
            parts.append(" ".join(stages))
        else:
            parts.append("no visual tokens")
        return ", ".join([*parts, f"FLOPs {self.flops_ratio:.2f}x", f"KV {self.kv_ratio:.2f}x"])


@dataclass
class Run:
    """State of one attachment: counters that grow with every call of the model, and a view of the last one.

    Read it during or after the calls; :meth:`reset` zeroes the counters.
    """

    spec: ModelSpec
    flops: int = 0
    dense_flops: int = 0
    kv_bytes: int = 0
    dense_kv_bytes: int = 0
    steps: int = 0
    visual_steps: int = 0
    cache_lengths: list[int] = field(default_factory=list)
    #: what techniques tell about the last prompt that was read, by their names; a continuation may have nothing to tell
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: pictures whose keys and values are kept for the next question, where a technique does so
    image_cache: ImageCache | None = None
    # of the last call with visual tokens; tensors stay on the device until a report asks for them
    _visual: Tensor | None = None
    _visual_per_layer: list[Tensor] = field(default_factory=list)

    def reset(self) -> None:
        """Zero the counters; the attachment stays."""
        self.__init__(self.spec, image_cache=self.image_cache)

    def count(self, work: Mapping[LayerWork, int], extra: int, rows: int, queries: int, keys: int) -> None:
        """Book one call: how many layers did which work, FLOPs beside it, and what the plain model would have done."""
        self.steps += 1
        self.flops += extra + sum(layers * layer.flops(self.spec) for layer, layers in work.items())
        dense = LayerWork(rows * queries, rows * queries * keys)
        self.dense_flops += dense.flops(self.spec) * self.spec.layers

    def count_cache(self, lengths: list[int], rows: int, length: int, bytes_per_value: int, extra: int = 0) -> None:
        """Book the cache after one call: keys per layer, the plain model's length, and bytes kept beside them."""
        per_key = 2 * self.spec.kv_width * bytes_per_value * rows
        self.cache_lengths = lengths
        self.kv_bytes = sum(lengths[: self.spec.layers]) * per_key + extra
        self.dense_kv_bytes = length * len(lengths[: self.spec.layers]) * per_key

    def record_visual(self, visual: Tensor, per_layer: list[Tensor]) -> None:
        """Keep the visual counts of one call: (B,) at its start and (B,) entering each layer."""
        self.visual_steps += 1
        self._visual, self._visual_per_layer = visual, per_layer

    def report(self) -> Report:
        """What happened so far, as plain numbers."""
        visual = [] if self._visual is None else self._visual.tolist()
        layers = [counts.tolist() for counts in self._visual_per_layer]  # layers x B
        exits = [max((n for n, counts in enumerate(layers) if counts[row]), default=None) for row in range(len(visual))]
        return Report(
            steps=self.steps,
            visual_tokens=visual,
            visual_per_layer=[max(counts) for counts in layers],
            exit_layer=exits,
            cache_lengths=self.cache_lengths,
            flops=self.flops,
            dense_flops=self.dense_flops,
            kv_bytes=self.kv_bytes,
            dense_kv_bytes=self.dense_kv_bytes,
        )
