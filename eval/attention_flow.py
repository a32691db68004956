"""Attention flow: how much of their attention text and image rows pay to each other, layer by layer.

As DyVTE looks at it (https://arxiv.org/abs/2411.19628), from the plain model's own queries and keys, so any attention
backend will do. Scores exist for a few query rows of one layer at a time and are reduced to sums at once: memory does
not grow with the square of the length.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mllm.engine import Engine
from mllm.errors import ConflictError, UnsupportedModelError
from mllm.families import Parts, find_parts
from mllm.layout import TokenLayout

#: rows that ask: text before the first image, image, text after its start, all text, the last token of the prompt
QUERIES = ("prefix", "image", "question", "text", "last")
#: rows that are looked at; ``first`` is the row's first token, which is counted in one of the others too
KEYS = ("prefix", "image", "question", "first")

CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Flow:
    """Shares of attention, mean over heads and over the query rows of a kind.

    Attributes:
        mass: (B, layers, 5, 4) from :data:`QUERIES` to :data:`KEYS`; prefix, image and question add up to 1. NaN where
            a batch row has no such query.
        uniform: (B, 5, 4) the same if every visible key got the same weight: what position alone explains.
        counts: (B, 5) tokens of each kind of query.
    """

    mass: Tensor
    uniform: Tensor
    counts: Tensor

    def share(self, query: str, key: str) -> Tensor:
        """(B, layers) share that ``query`` rows give to ``key`` rows; ``"text"`` is prefix and question together."""
        return _share(self.mass, query, key)


def _share(mass: Tensor, query: str, key: str) -> Tensor:
    """(...) of (..., 5, 4)."""
    rows = mass[..., QUERIES.index(query), :]  # (..., 4)
    if key == "text":
        return rows[..., KEYS.index("prefix")] + rows[..., KEYS.index("question")]
    return rows[..., KEYS.index(key)]


class FlowMeter:
    """Pre-hooks on every self-attention that add up the attention of one call, row by row of the batch."""

    def __init__(self, parts: Parts, layout: TokenLayout, chunk_bytes: int) -> None:
        self.layout = layout
        self.limit = max(1, chunk_bytes // 4)  # float32 scores
        self.module = sys.modules[type(parts.layers[0].self_attn).__module__]
        seen = layout.visual.long().cumsum(dim=1) > 0  # (B, S) from the first image on
        # in a row without an image nothing tells the prefix from the question: all of it is question
        seen = seen | ~layout.visual.any(dim=1, keepdim=True)
        text, last = layout.text, torch.zeros_like(layout.visual)
        last.scatter_(1, layout.valid.shape[1] - 1 - layout.valid.flip(1).int().argmax(dim=1, keepdim=True), True)
        prefix, question = text & ~seen, text & seen
        first = layout.valid & (layout.valid.cumsum(dim=1) == 1)
        self.queries = torch.stack([prefix, layout.visual, question, text, last], dim=-1)  # (B, S, 5)
        self.keys = torch.stack([prefix, layout.visual, question, first], dim=-1)  # (B, S, 4)
        self.rows = [valid.nonzero().flatten() for valid in layout.valid]  # B x (n,)
        self.sums: dict[int, Tensor] = {}  # layer -> (B, 5, 4)

    @contextmanager
    def attached(self, layers: nn.ModuleList) -> Iterator[None]:
        hooks = []
        try:
            for number, layer in enumerate(layers):
                hook = _BeforeAttention(self, number)
                hooks.append(layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def measure(self, number: int, attention: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
        """Add the masses of one layer; ``hidden`` (B, S, D) is what its attention is given."""
        shape = (*hidden.shape[:2], -1, attention.head_dim)
        queries = attention.q_proj(hidden).view(shape).transpose(1, 2)  # (B, heads, S, head_dim)
        keys = attention.k_proj(hidden).view(shape).transpose(1, 2)  # (B, kv_heads, S, head_dim)
        queries, keys = self.module.apply_rotary_pos_emb(queries, keys, *rotary)
        self.sums[number] = torch.stack(
            [
                self._row(row, queries[row][:, index], keys[row][:, index], attention.scaling)
                for row, index in enumerate(self.rows)
            ]
        )

    def _row(self, row: int, queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
        """(5, 4) summed shares of one batch row without its padding: (heads, n, head_dim), (kv_heads, n, head_dim)."""
        heads, length = queries.shape[:2]
        queries = queries.unflatten(0, (keys.shape[0], -1))  # (kv_heads, heads a kv_head, n, head_dim)
        keys = keys.float().transpose(1, 2)  # (kv_heads, head_dim, n)
        asks = self.queries[row, self.rows[row]].double()  # (n, 5)
        seen = self.keys[row, self.rows[row]].float()  # (n, 4)
        places = torch.arange(length, device=keys.device)
        total = asks.new_zeros(len(QUERIES), len(KEYS))
        step = max(1, self.limit // (heads * length))
        for start in range(0, length, step):
            stop = min(start + step, length)
            block = queries[:, :, start:stop].float().flatten(1, 2) * scaling  # (kv_heads, group * C, head_dim)
            scores = (block @ keys[..., :stop]).unflatten(1, (-1, stop - start))  # (kv_heads, group, C, stop)
            scores = scores.masked_fill_(places[:stop] > places[start:stop, None], -math.inf)
            shares = scores.softmax(dim=-1).mean(dim=(0, 1)) @ seen[:stop]  # (C, 4)
            total += asks[start:stop].T @ shares.double()
        return total

    def flow(self) -> Flow:
        """What was measured, on the CPU."""
        counts = torch.stack([self.queries[row, index].sum(dim=0) for row, index in enumerate(self.rows)])  # (B, 5)
        uniform = []
        for row, index in enumerate(self.rows):
            seen = self.keys[row, index].double().cumsum(dim=0)  # (n, 4)
            seen = seen / torch.arange(1, len(index) + 1, device=seen.device)[:, None]
            uniform.append(self.queries[row, index].double().T @ seen)  # (5, 4)
        mass = torch.stack([self.sums[number] for number in sorted(self.sums)], dim=1)  # (B, layers, 5, 4)
        divisor = counts.double().where(counts > 0, math.nan)[..., None]  # (B, 5, 1)
        return Flow((mass / divisor[:, None]).cpu(), (torch.stack(uniform) / divisor).cpu(), counts.cpu())


class _BeforeAttention:
    def __init__(self, meter: FlowMeter, number: int) -> None:
        self.meter, self.number = meter, number

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.meter.measure(self.number, module, hidden, kwargs["position_embeddings"])


def attention_flow(model: nn.Module, inputs: Mapping[str, Any], chunk_bytes: int = CHUNK_BYTES) -> Flow:
    """Share of attention between text and image rows in every layer of the plain model.

    As DyVTE looks at it (https://arxiv.org/abs/2411.19628). It costs about one eager attention more than
    the forward. Not for models with a technique attached: detach first.

    Args:
        model: stock, on any attention backend.
        inputs: of one prefill: ``input_ids`` (B, S), pixel values, padding on any side.
        chunk_bytes: size of the largest tensor of scores, in bytes; at least one query row is scored at a time.

    Raises:
        UnsupportedModelError: layers that are not plain causal attention with rotary positions.
        ConflictError: a technique is attached.
    """
    parts = check_plain(model)
    meter = FlowMeter(parts, layout_of(parts, inputs), chunk_bytes)
    with torch.no_grad(), meter.attached(parts.layers):
        parts.model(**without_cache(inputs), logits_to_keep=1)
    return meter.flow()


_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}


def check_plain(model: nn.Module) -> Parts:
    """The model's parts, if its attention can be recomputed and nothing is attached to it."""
    parts = find_parts(model)
    for hook in parts.base._forward_pre_hooks.values():
        if isinstance(getattr(hook, "__self__", None), Engine):
            raise ConflictError(f"{hook.__self__.stack!r} is attached; the plain model is measured. Detach it first.")
    kinds = getattr(parts.text_config, "layer_types", None) or ["full_attention"]
    if set(kinds) != {"full_attention"}:
        raise UnsupportedModelError(
            f"The decoder has layers of the kinds {', '.join(sorted(set(kinds)))}; full attention can be measured."
        )
    for layer in parts.layers:
        attention = getattr(layer, "self_attn", None)
        names = {name for name, _ in attention.named_children()} if attention is not None else set()
        module = sys.modules[type(attention).__module__]
        if names != _ATTENTION_PARTS or not hasattr(module, "apply_rotary_pos_emb"):
            raise UnsupportedModelError(
                f"{type(layer).__name__} has no self_attn made of {', '.join(sorted(_ATTENTION_PARTS))} with rotary "
                "positions; its attention cannot be recomputed."
            )
    return parts


def layout_of(parts: Parts, inputs: Mapping[str, Any]) -> TokenLayout:
    visual = any(inputs.get(name) is not None for name in parts.family.visual_arguments)
    return TokenLayout.from_inputs(parts.token_ids, inputs["input_ids"], inputs.get("attention_mask"), 0, visual)


def without_cache(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {**inputs, "use_cache": False}
