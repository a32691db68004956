"""Attention under our own names: exact lowerings of a technique's rule onto the stock attention of a backend.

While a technique that needs it is attached, the decoder's attention backend is called ``mllm_sdpa`` instead of ``sdpa``
(``mllm_eager`` instead of ``eager``). Both hand every call to the :class:`~mllm.engine.Step` it belongs to, which runs
the stock function: as it is, or once per :class:`Segment` where that spares scores and mask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

STEP = "mllm_step"  # keyword that carries the step down to the layers and their attention
NAMES = {"sdpa": "mllm_sdpa", "eager": "mllm_eager"}
_ALONE = SimpleNamespace()  # stands in for the attention module where there is none: one key head for each query head
_FEW = 8  # keys in front of a segment are few where it has so many times their rows
_CHUNK = 512  # rows for which a mask is made at a time: memory grows with the length, not with its square


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows that see the same earlier keys, so that they need no mask of their own.

    Attributes:
        rows: first and last (exclusive) of the rows that run.
        keys: the same for the keys they see, in the order they are put; at the end the rows themselves.
        causal: the rows see each other causally; otherwise all of these keys.
    """

    rows: tuple[int, int]
    keys: tuple[tuple[int, int], ...]
    causal: bool = True


def _function(backend: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        step = kwargs.pop(STEP, None)
        # every model has its own eager attention, beside its attention class
        stock = (
            sys.modules[type(module).__module__].eager_attention_forward
            if backend == "eager"
            else ALL_ATTENTION_FUNCTIONS[backend]
        )
        if step is None or step.rests:
            return stock(module, query, key, value, attention_mask, **kwargs)
        return step.attend(stock, module, query, key, value, attention_mask, kwargs)

    return attention


for _backend, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(NAMES[_backend], _function(_backend))
    AttentionMaskInterface.register(NAMES[_backend], _mask)


def attend_segments(
    stock: Callable[..., tuple[Tensor, Tensor | None]],
    segments: tuple[Segment, ...],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kwargs: dict[str, Any],
) -> Tensor:
    """(B, A, heads, head_dim): the stock attention, segment by segment."""
    outputs = []
    for segment in segments:
        keys, values = _pick(key, segment.keys), _pick(value, segment.keys)  # (B, kv_heads, k, head_dim)
        start, stop = segment.rows
        before = keys.shape[2] - (stop - start)  # keys ahead of the rows' own
        if not segment.causal or stop - start == 1:
            outputs.append(
                stock(module, query[:, :, start:stop], keys, values, None, **{**kwargs, "is_causal": False})[0]
            )
            continue
        if stock is ALL_ATTENTION_FUNCTIONS["sdpa"] and before * _FEW <= stop - start:
            # a square block: no mask means causal; a few rows put in front make one, and cost less than a mask
            rows = query[:, :, start:stop]
            rows = torch.cat([rows[:, :, :before], rows], dim=2) if before else rows
            outputs.append(stock(module, rows, keys, values, None, **kwargs)[0][:, before:])
            continue
        for low in range(0, stop - start, _CHUNK):
            high = min(low + _CHUNK, stop - start)
            mask = torch.ones(high - low, before + high, dtype=torch.bool, device=query.device).tril(before + low)
            rows, end = query[:, :, start + low : start + high], before + high
            some_keys, some_values = keys[:, :, :end], values[:, :, :end]
            if stock is ALL_ATTENTION_FUNCTIONS["sdpa"]:
                outputs.append(_packed(stock, module, rows, some_keys, some_values, mask, kwargs))
                continue
            mask = additive(mask, query.dtype)
            outputs.append(stock(module, rows, some_keys, some_values, mask[None, None], **kwargs)[0])
    return torch.cat(outputs, dim=1)


def attend_to(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: tuple[Segment, ...] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """(B, S, heads, head_dim) attention outside a layer's own; a row that sees no key gets exactly 0.

    Args:
        queries: (B, heads, S, head_dim).
        keys, values: (B, heads, N, head_dim).
        segments: of the rows, where that is all that limits them.
        mask: (B, 1, S, N) bool, True where a row sees a key; None: every row sees every key, or what its segment says.
    """
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if segments is None:
        if mask is None:
            return stock(_ALONE, queries, keys, values, None, is_causal=False)[0]
        some = mask.any(dim=-1, keepdim=True)  # (B, 1, S, 1)
        # a softmax over nothing is no number: rows without keys are given all of them, and lose what that gave
        out = stock(_ALONE, queries, keys, values, mask | ~some)[0]  # (B, S, heads, head_dim)
        return out.masked_fill(~some.transpose(1, 2), 0.0)
    blind = sum(segment.rows[1] - segment.rows[0] for segment in segments if segment.keys[-1][1] == 0)  # come first
    seeing = tuple(segment for segment in segments if segment.keys[-1][1])
    nothing = values.new_zeros(values.shape[0], blind, values.shape[1], values.shape[3])
    if not seeing:
        return nothing
    out = attend_segments(stock, seeing, _ALONE, queries, keys, values, {})
    return torch.cat([nothing, out], dim=1) if blind else out


def _packed(
    stock: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    kwargs: dict[str, Any],
) -> Tensor:
    """(B, n, heads, head_dim): attention with one ``mask`` (n, k) for all heads. Heads that share their keys stand as
    further rows of one head, so that keys are not repeated, which stock SDPA does beside a mask."""
    groups = rows.shape[1] // keys.shape[1]
    if groups == 1:
        return stock(module, rows, keys, values, mask[None, None], **kwargs)[0]
    batch, heads, count, head_dim = rows.shape
    packed = rows.reshape(batch, keys.shape[1], groups * count, head_dim)
    out = stock(_ALONE, packed, keys, values, mask.repeat(groups, 1)[None, None], **kwargs)[0]
    out = out.unflatten(1, (groups, count))  # (B, groups, n, kv_heads, head_dim)
    return out.permute(0, 2, 3, 1, 4).reshape(batch, count, heads, head_dim)


def _pick(states: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
    parts = [states[:, :, start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as what eager attention adds to the scores."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
