"""The engine: forward hooks that let a stock decoder process fewer rows, exactly.

One call of the model makes one :class:`Step`. A pre-hook on the multimodal base model reads the call's
:class:`~mllm.layout.TokenLayout` and passes the step down as a keyword argument, which stock transformers models hand
on to every decoder layer. Nothing about a call is kept on a module, so threads, several models and recomputation
cannot mix calls up. In each layer three sets of rows matter:

* ``alive``: rows of the call that exist in this layer; their keys are what the layer's cache grows by;
* ``active``: alive rows that run the layer, through the stock layer itself;
* ``passive``: alive visual rows that only offer keys and values (and what their policy adds).

Rows that are not alive are physically absent: the tensor that travels from layer to layer holds the active rows only,
and masks, positions and rotary tables are gathered for them. Text keeps its original positions. After the last layer
the rows are put back in place, so that the caller sees the input's length.

The cache is ragged: a layer holds keys for its alive rows. Layer 0 always holds all of them, because transformers
reads the length of the sequence there. Which rows a cached key belongs to travels with the cache object.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from mllm.cost import LayerWork, ModelSpec
from mllm.errors import CacheError, ConfigError, ConflictError, DidNotFireError, UnsupportedModelError
from mllm.families import Parts, find_parts
from mllm.layout import TokenLayout, valid_tokens
from mllm.run import Run
from mllm.technique import LayerView

if TYPE_CHECKING:
    from mllm.technique import Stack, Technique, VisualPolicy

_STEP = "mllm_step"  # keyword that carries the step down to the layers
_PASSIVE = "mllm_passive"  # keyword that carries passive keys and values into a layer's attention
_CACHE_STATE = "mllm_state"  # attribute of a cache object: whose keys its layers hold


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """Some tokens of each batch row, in order, at the right end of a common width.

    Attributes:
        index: (B, N) long into the sequence; None stands for all of it.
        valid: (B, N) bool, False where a batch row has fewer tokens than N and another one fills in; None: all True.
        length: N.
    """

    index: Tensor | None
    valid: Tensor | None
    length: int

    @classmethod
    def select(cls, wanted: Tensor, counts: list[int]) -> Rows:
        """The tokens where ``wanted`` (B, S) is True; ``counts`` are its row sums, already on the host."""
        length = max(1, *counts)
        order = wanted.to(torch.int8).sort(dim=1, stable=True).indices  # (B, S), wanted ones last, in order
        index = order[:, wanted.shape[1] - length :]  # (B, N)
        ragged = any(count != length for count in counts)
        return cls(index, wanted.gather(1, index) if ragged else None, length)

    def take(self, states: Tensor, batch: int) -> Tensor:
        """(B, N, ...) these tokens of ``states`` (B or 1, S, ...)."""
        if self.index is None:
            return states
        if states.shape[0] != batch:
            states = states.expand(batch, *states.shape[1:])
        return states.flatten(0, 1).index_select(0, self._flat(states.shape[1])).unflatten(0, (batch, self.length))

    def put(self, states: Tensor, updates: Tensor) -> Tensor:
        """``states`` (B, S, D) with these tokens replaced by ``updates`` (B, N, D); fillers are left as they were."""
        if self.index is None:
            return updates
        flat, source = self._flat(states.shape[1]), updates.flatten(0, 1)
        if self.valid is not None:
            real = self.valid.flatten()
            flat, source = flat[real], source[real]
        return states.flatten(0, 1).index_copy(0, flat, source).view_as(states)

    def _flat(self, width: int) -> Tensor:
        """(B * N,) index into the flattened (B * width) sequence."""
        offsets = torch.arange(self.index.shape[0], device=self.index.device) * width
        return (self.index + offsets[:, None]).flatten()


@dataclass(frozen=True, eq=False)
class Split:
    """How the rows of a call are divided in a layer; layers with the same division share one object."""

    alive: Rows
    active: Rows
    passive: Rows | None = None
    #: (B, alive) where each alive row stands in [passive | active]
    order: Tensor | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all rows simply run the layer."""
        return self.active.index is None


def _key_order(alive: Rows, active: Rows, passive: Rows, width: int) -> Tensor:
    """(B, alive) position of each alive row in the concatenation [passive | active]."""
    batch, device = active.index.shape[0], active.index.device
    place = torch.zeros(batch, width + 1, dtype=torch.long, device=device)  # (B, S + 1), the last column is a bin
    for rows, offset in ((passive, 0), (active, passive.length)):
        index = rows.index if rows.valid is None else rows.index.masked_fill(~rows.valid, width)
        place.scatter_(1, index, (torch.arange(rows.length, device=device) + offset).expand(batch, -1))
    return place[:, :width] if alive.index is None else place.gather(1, alive.index)


# --- the cache --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CacheState:
    """Which tokens the keys of a ragged cache belong to.

    Attributes:
        length: tokens seen when this was written; keys that came later are held by every layer.
        rows: per layer, the tokens whose keys it holds, as columns of the whole sequence.
    """

    length: int
    rows: tuple[Rows, ...]

    def past(self, layer: int, length: int) -> Rows:
        """The keys that ``layer`` holds now that ``length`` tokens have been seen."""
        rows, tail = self.rows[layer], length - self.length
        if rows.index is None or tail == 0:
            return Rows(None, None, length) if rows.index is None else rows
        batch = rows.index.shape[0]
        new = torch.arange(self.length, length, device=rows.index.device).expand(batch, -1)  # (B, tail)
        valid = None if rows.valid is None else torch.nn.functional.pad(rows.valid, (0, tail), value=True)
        return Rows(torch.cat((rows.index, new), dim=1), valid, rows.length + tail)

    def cropped(self, length: int) -> CacheState | None:
        """The state once the last tokens are cut off again; None where dropped rows are among them."""
        cut, rows = self.length - length, {}
        for old in self.rows:
            if old.index is None:
                rows[old] = Rows(None, None, length)
                continue
            tail = torch.arange(length, self.length, device=old.index.device)
            whole = old.valid is None or bool(old.valid[:, -cut:].all())
            if cut >= old.length or not whole or not bool((old.index[:, -cut:] == tail).all()):
                return None
            valid = None if old.valid is None else old.valid[:, :-cut]
            rows[old] = Rows(old.index[:, :-cut], valid, old.length - cut)
        return CacheState(length, tuple(rows[old] for old in self.rows))


class _JoinedCache:
    """Stands in for the cache inside one attention call: passive keys and values join the active ones."""

    def __init__(self, cache: Cache | None, keys: Tensor, values: Tensor, order: Tensor) -> None:
        self.cache, self.keys, self.values, self.order = cache, keys, values, order

    def _join(self, passive: Tensor, active: Tensor) -> Tensor:
        joined = torch.cat((passive, active), dim=2)  # (B, kv_heads, P + A, head_dim)
        index = self.order[:, None, :, None].expand(-1, joined.shape[1], -1, joined.shape[3])
        return joined.gather(2, index)  # (B, kv_heads, alive, head_dim)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._join(self.keys, keys), self._join(self.values, values)
        if self.cache is None:
            return keys, values
        return self.cache.update(keys, values, *args, **kwargs)


def _check_cache_kind(cache: Cache) -> None:
    for layer in cache.layers:
        if type(layer) is not DynamicLayer:
            raise UnsupportedModelError(
                f"The key/value cache has a {type(layer).__name__}; techniques that drop or freeze rows need "
                "transformers' DynamicCache with plain layers. Leave cache_implementation unset."
            )


def _lengths(cache: Cache) -> list[int]:
    return [layer.get_seq_length() for layer in cache.layers]


# --- one call ---------------------------------------------------------------------------------------------------------


class Step:
    """One forward call of the model."""

    def __init__(self, engine: Engine, layout: TokenLayout, visual: bool, cache: Cache | None, whole: bool) -> None:
        self.engine = engine
        self.layout = layout
        self.batch, self.width = layout.visual.shape
        self.visual = visual
        self.whole = whole  # hidden states of every layer must have full length
        if not layout.past_length and hasattr(cache, _CACHE_STATE):  # the cache was reset
            delattr(cache, _CACHE_STATE)
        self.past: CacheState | None = getattr(cache, _CACHE_STATE, None)
        everything = Rows(None, None, self.width)
        self.split = self._whole_split = Split(everything, everything)
        self.reduced: Tensor | None = None  # (B, S) bool, alive rows once a technique has dropped some
        self.visual_per_layer: list[Tensor] = []
        self.splits: list[Split] = []
        self.work: Counter[LayerWork] = Counter()
        self.extra_flops = 0
        self.fired: set[Technique] = set()
        self._full: Tensor | None = None  # (B, S, D) states of the rows that do not travel
        self._passive: Tensor | None = None  # (B, P, D)
        self._no_past = Rows(None, None, layout.past_length)
        self._counted: tuple[Tensor, Tensor] | None = None  # alive rows, and how many of them are visual
        self._known: dict[tuple, Split] = {}
        self._gathered: dict[tuple, Any] = {}
        # nothing to do in the layers: no visual rows in this call, and none dropped in an earlier one
        self.idle = not (visual and engine.active) and self.past is None
        if cache is not None and layout.past_length:
            self._check_cache(cache)

    def _check_cache(self, cache: Cache) -> None:
        """The cache must hold what the state says: every layer the same number of keys, or the recorded ones."""
        length = self.layout.past_length
        found = _lengths(cache)
        if self.past is not None and length < self.past.length:  # cropped, as assisted decoding does
            cropped = self.past.cropped(length)
            if cropped is None:
                raise CacheError(
                    f"The cache was cropped to {length} of the {self.past.length} tokens that were read together with "
                    "images, into rows that layers have dropped. Start again with an empty cache."
                )
            self.past = cropped
            setattr(cache, _CACHE_STATE, cropped)
        if self.past is None:
            expected = [length] * len(found)
        else:
            batch = next((rows.index.shape[0] for rows in self.past.rows if rows.index is not None), self.batch)
            if batch != self.batch:
                raise CacheError(
                    f"The cache was filled with a batch of {batch} and is used with {self.batch}. Expand the inputs "
                    "before the first call (generate does), or start again with an empty cache."
                )
            expected = [rows.length + length - self.past.length for rows in self.past.rows]
        if found != expected:
            raise CacheError(
                f"The layers of the cache hold {found} keys where {expected} are expected: it was filled or cut by "
                "something else. Start again with an empty cache."
            )

    # -- into a layer

    def enter(self, number: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Prepare ``kwargs`` for layer ``number`` and return the rows that run it, (B, active, D)."""
        policy = self.engine.policies[number] if self.visual else None
        before = self.split
        self._reduce(number, hidden)
        self.split = split = self._divide(policy)
        self.splits.append(split)
        if split is not before or self.whole:
            self._full = full = hidden if self.whole else self._restore(before, hidden)
            hidden = split.active.take(full, self.batch)
            self._passive = None if split.passive is None else split.passive.take(full, self.batch)
        past = self._past(number)
        keys = past.length + split.alive.length
        rotary = kwargs["position_embeddings"]
        if split.passive is not None:
            keys_values = self._serve(layer, policy, self._take("rotary", split.passive, rotary))
            kwargs[_PASSIVE] = (*keys_values, split.order)
        kwargs["attention_mask"] = self._mask(kwargs.get("attention_mask"), split, past, hidden)
        if not split.is_whole:
            kwargs["position_embeddings"] = self._take("rotary", split.active, rotary)
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = self._take("positions", split.active, (kwargs["position_ids"],))[0]
        passive = 0 if split.passive is None else split.passive.length
        self.work[
            LayerWork(
                self.batch * split.active.length,
                self.batch * split.active.length * keys,
                self.batch * passive,
                bool(passive and policy.own_value),
                bool(passive and policy.ffn),
            )
        ] += 1
        return hidden

    def leave(self, number: int, hidden: Tensor) -> Tensor | None:
        """Put all rows back in place, (B, S, D), where the caller needs them; None leaves the output alone."""
        if self.split.is_whole or not (self.whole or number == self.engine.spec.layers - 1):
            return None
        return self._restore(self.split, hidden)

    def _reduce(self, number: int, hidden: Tensor) -> None:
        """Ask the techniques which rows stay."""
        if not self.visual:
            return
        spec, layout = self.engine.spec, self.layout
        alive = layout.valid if self.reduced is None else self.reduced
        for technique in self.engine.active:
            if technique.visual_policy(number, spec) is not None:
                self.fired.add(technique)
            view = LayerView(number, spec, layout, alive, partial(self._states, hidden), self._spend)
            keep = technique.keep(view)
            if keep is None:
                continue
            self.fired.add(technique)
            if keep is alive:
                continue
            if number == 0:
                raise ConfigError(f"{technique!r} drops rows before layer 0, which must hold the whole sequence.")
            alive = self.reduced = alive & keep  # (B, S)
        if self._counted is None or self._counted[0] is not alive:
            self._counted = alive, (alive & layout.visual).sum(dim=1)  # (B,)
        self.visual_per_layer.append(self._counted[1])

    def _states(self, hidden: Tensor) -> Tensor:
        return hidden if self.whole else self._restore(self.split, hidden)

    def _spend(self, flops: int) -> None:
        self.extra_flops += flops

    def _divide(self, policy: VisualPolicy | None) -> Split:
        """The split for the rows alive now; the only place that waits for the device, once per division."""
        key = (self.reduced, policy is not None)
        if key in self._known:
            return self._known[key]
        layout = self.layout
        alive = layout.valid if self.reduced is None else self.reduced
        if policy is None and self.reduced is None:
            split = self._whole_split
        else:
            wanted = [alive, alive & ~layout.visual, alive & layout.visual]
            counts = torch.stack([mask.sum(dim=1) for mask in wanted]).tolist()
            rows = self._whole_split.alive if self.reduced is None else Rows.select(alive, counts[0])
            if policy is None or not any(counts[2]):
                split = self._whole_split if self.reduced is None else Split(rows, rows)
            else:
                active, passive = Rows.select(wanted[1], counts[1]), Rows.select(wanted[2], counts[2])
                split = Split(rows, active, passive, _key_order(rows, active, passive, self.width))
        self._known[key] = split
        return split

    def _restore(self, split: Split, hidden: Tensor) -> Tensor:
        """(B, S, D) all rows at their places: the travelling, the passive, and the others as they were left."""
        if split.is_whole:
            return hidden
        full = split.active.put(self._full, hidden)
        return full if split.passive is None else split.passive.put(full, self._passive)

    def _past(self, number: int) -> Rows:
        if self.past is None:
            return self._no_past
        key = ("past", self.past.rows[number])
        if key not in self._gathered:
            self._gathered[key] = self.past.past(number, self.layout.past_length)
        return self._gathered[key]

    def _take(self, what: str, rows: Rows, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Rotary tables or positions of ``rows``; gathered once for all layers that share them."""
        if rows.index is None:
            return tensors
        key = (what, rows, *map(id, tensors))
        if key not in self._gathered:
            # the inputs are kept beside the result, so that their ids stay theirs
            self._gathered[key] = (tensors, tuple(rows.take(tensor, self.batch) for tensor in tensors))
        return self._gathered[key][1]

    # -- passive rows

    def _serve(self, layer: nn.Module, policy: VisualPolicy, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of the passive rows, (B, kv_heads, P, head_dim) each; then what the policy does to them."""
        states, attention = self._passive, layer.self_attn  # (B, P, D)
        normed = layer.input_layernorm(states)  # (B, P, D)
        shape = (*states.shape[:2], -1, attention.head_dim)
        keys = attention.k_proj(normed).view(shape).transpose(1, 2)  # (B, kv_heads, P, head_dim)
        values = attention.v_proj(normed).view(shape).transpose(1, 2)  # (B, kv_heads, P, head_dim)
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        _, keys = rotate(keys[:, :0], keys, *rotary)
        if policy.own_value:
            own = values.repeat_interleave(attention.num_key_value_groups, dim=1)  # (B, heads, P, head_dim)
            states = states + attention.o_proj(own.transpose(1, 2).flatten(2))
        if policy.ffn:
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        self._passive = states
        return keys, values

    # -- masks

    def _mask(self, mask: Tensor | None, split: Split, past: Rows, hidden: Tensor) -> Tensor | None:
        """The layer's mask for the active rows and the keys it holds; made once for the layers that share them."""
        if split.is_whole and past.index is None:
            return mask
        key = ("mask", split, past, None if mask is None else id(mask))
        if key not in self._gathered:
            self._gathered[key] = (mask, self._make_mask(mask, split, past, hidden))
        return self._gathered[key][1]

    def _make_mask(self, mask: Tensor | None, split: Split, past: Rows, hidden: Tensor) -> Tensor | None:
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4):
            raise UnsupportedModelError(
                f"The decoder was given an attention mask of type {type(mask).__name__} that cannot be cut to the "
                'rows that remain. Load the model with attn="sdpa" or attn="eager".'
            )
        all_valid = split.alive.valid is None and split.active.valid is None and past.valid is None
        if mask is None and all_valid and (self.width == 1 or (split.passive is None and past.length == 0)):
            return None  # one new token sees every key; a square causal block is what no mask means
        length, device = self.layout.past_length, hidden.device
        queries = self._columns(split.active, length, device)  # (B or 1, A)
        keys = torch.cat(
            [
                columns.expand(self.batch, -1)
                for columns in (self._columns(past, 0, device), self._columns(split.alive, length, device))
            ],
            dim=1,
        )  # (B, K)
        if mask is None:
            made = keys[:, None, :] <= queries[:, :, None]  # (B, A, K)
        else:
            rows = torch.arange(self.batch, device=device)[:, None, None] % mask.shape[0]  # (B, 1, 1)
            made = mask[rows, 0, (queries - length)[:, :, None], keys[:, None, :]]  # (B, A, K)
        if past.valid is not None or split.alive.valid is not None:
            valid = torch.cat([self._valid(past, device), self._valid(split.alive, device)], dim=1)[:, None, :]
            if made.dtype == torch.bool:
                made = made & valid
            else:
                made = made.masked_fill(~valid, torch.finfo(made.dtype).min)
        made = made[:, None]  # (B, 1, A, K)
        if made.dtype == torch.bool and self.engine.parts.attention == "eager":
            return torch.zeros_like(made, dtype=hidden.dtype).masked_fill(~made, torch.finfo(hidden.dtype).min)
        return made

    def _columns(self, rows: Rows, offset: int, device: torch.device) -> Tensor:
        """(B or 1, N) columns of the whole sequence that ``rows`` stand for."""
        index = torch.arange(rows.length, device=device)[None] if rows.index is None else rows.index
        return index + offset

    def _valid(self, rows: Rows, device: torch.device) -> Tensor:
        if rows.valid is None:
            return torch.ones(self.batch, rows.length, dtype=torch.bool, device=device)
        return rows.valid

    # -- after the last layer

    def finish(self, cache: Cache | None, bytes_per_value: int) -> None:
        """Book the call, and leave on the cache what later calls must know."""
        engine, layout = self.engine, self.layout
        length = layout.past_length + self.width
        layers = engine.spec.layers
        if not self.idle and len(self.splits) != layers:
            raise DidNotFireError(
                f"{len(self.splits)} of {layers} decoder layers were called through their hooks, while this call needs "
                "all of them. Attach after the model is complete, and not to a compiled or rebuilt copy."
            )
        if self.visual:
            missing = [technique for technique in engine.active if technique not in self.fired]
            if missing:
                raise DidNotFireError(
                    f"{', '.join(map(repr, missing))} saw visual tokens and did nothing. Its arguments or its code "
                    "leave this model unchanged; a technique that means to must say so in is_neutral()."
                )
            counts = self.visual_per_layer or [layout.visual.sum(dim=1)] * layers
            engine.run.record_visual(layout.visual.sum(dim=1), counts)
        if self.idle:
            self.work[LayerWork(self.batch * self.width, self.batch * self.width * length)] = layers
            lengths = [length] * layers
        else:
            lengths = [self._past(n).length + split.alive.length for n, split in enumerate(self.splits)]
        engine.run.count(self.work, self.extra_flops, self.batch, self.width, length)
        if cache is None:
            engine.run.count_cache([], 0, 0, 0)
            return
        engine.run.count_cache(lengths, self.batch, length, bytes_per_value)
        if self.visual and not self.idle:
            _check_cache_kind(cache)
            if self.reduced is not None or self.past is not None:
                setattr(cache, _CACHE_STATE, CacheState(length, self._held()))

    def _held(self) -> tuple[Rows, ...]:
        """Per layer, the tokens whose keys the cache now holds; layers that hold the same share one object."""
        offset, device = self.layout.past_length, self.layout.visual.device
        known: dict[tuple, Rows] = {}
        held = []
        for number, split in enumerate(self.splits):
            past, alive = self._past(number), split.alive
            key = (past, alive) if past.index is not None else alive
            if key not in known:
                if past.index is None and alive.index is None:
                    known[key] = Rows(None, None, offset + self.width)
                else:
                    parts = (self._columns(past, 0, device), self._columns(alive, offset, device))
                    index = torch.cat([part.expand(self.batch, -1) for part in parts], dim=1)  # (B, K)
                    ragged = past.valid is not None or alive.valid is not None
                    valid = torch.cat([self._valid(past, device), self._valid(alive, device)], 1) if ragged else None
                    known[key] = Rows(index, valid, index.shape[1])
            held.append(known[key])
        return tuple(held)


# --- hooks ------------------------------------------------------------------------------------------------------------


class Engine:
    """The hooks of one attachment."""

    def __init__(self, stack: Stack, parts: Parts) -> None:
        self.stack = stack
        self.parts = parts
        self.spec = ModelSpec.from_config(parts.text_config)
        self.active = stack.active(self.spec)
        self.policies = [stack.visual_policy(layer, self.spec) for layer in range(self.spec.layers)]
        self.run = Run(self.spec)
        self._names = list(inspect.signature(parts.base.forward).parameters)

    def install(self) -> list[RemovableHandle]:
        """Register all hooks; the caller removes them."""
        base, layers = self.parts.base, self.parts.layers
        handles = [
            base.register_forward_pre_hook(self._before_base, with_kwargs=True),
            base.register_forward_hook(self._after_base, with_kwargs=True),
        ]
        for number, layer in enumerate(layers):
            # ours must run before hooks that record hidden states, which may be there already: prepend
            handles += [
                layer.register_forward_pre_hook(_BeforeLayer(number), with_kwargs=True),
                layer.register_forward_hook(_AfterLayer(number), with_kwargs=True, prepend=True),
            ]
            if self.policies[number] is not None:
                handles.append(layer.self_attn.register_forward_pre_hook(_before_attention, with_kwargs=True))
        return handles

    def _before_base(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        past_length = cache.get_seq_length() if cache is not None else 0
        encoded = given.get("mm_encoder_outputs") or {}
        visual = any(given.get(name) is not None for name in self.parts.family.visual_arguments) or any(
            output is not None for output in encoded.values()
        )
        layout = self._layout(given, past_length, visual)
        config = self.parts.text_config
        whole = bool(given.get("output_hidden_states", getattr(config, "output_hidden_states", False)))
        step = Step(self, layout, visual, cache, whole)
        if not step.idle:
            if given.get("output_attentions", getattr(config, "output_attentions", False)):
                raise UnsupportedModelError(
                    "output_attentions=True: layers hold different rows under a technique, so their attention "
                    "weights have different shapes. Detach, or ask without it."
                )
            if cache is not None:
                _check_cache_kind(cache)
            self._check_checkpointing()
        return args, {**kwargs, _STEP: step}

    def _layout(self, given: dict[str, Any], past_length: int, visual: bool) -> TokenLayout:
        input_ids, embeds, mask = given.get("input_ids"), given.get("inputs_embeds"), given.get("attention_mask")
        if input_ids is not None or embeds is None or not visual:
            tokens = input_ids if input_ids is not None else embeds[..., 0]
            return TokenLayout.from_inputs(self.parts.token_ids, tokens, mask, past_length, visual)
        # embeddings with separate image features: placeholders are told by their embedding, as the model does
        ids = torch.tensor(self.parts.token_ids, device=embeds.device)
        marks = self.parts.base.get_input_embeddings()(ids)  # (ids, D)
        found = (embeds[:, :, None] == marks).all(dim=-1).any(dim=-1)  # (B, S)
        return TokenLayout(found, valid_tokens(mask, found), past_length)

    def _check_checkpointing(self) -> None:
        layer = self.parts.layers[0]
        if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
            return
        options = getattr(layer._gradient_checkpointing_func, "keywords", {})
        if options.get("use_reentrant", True) or "__call__" in vars(GradientCheckpointingLayer):
            raise UnsupportedModelError(
                "Gradient checkpointing with use_reentrant=True loses gradients of rows that skip a layer. Use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, and a transformers release that checkpoints '
                "the layers' forward (5.23 does)."
            )

    def _after_base(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        outputs = list(output if isinstance(output, tuple) else output.values())  # last hidden state first
        cache = next((value for value in outputs if isinstance(value, Cache)), None)
        kwargs[_STEP].finish(cache, outputs[0].element_size())


class _BeforeLayer:
    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        step: Step | None = kwargs.get(_STEP)
        if step is None or step.idle:
            return None
        kwargs = dict(kwargs)
        return (step.enter(self.number, layer, args[0], kwargs), *args[1:]), kwargs


class _AfterLayer:
    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        step: Step | None = kwargs.get(_STEP)
        return None if step is None or step.idle else step.leave(self.number, output)


def _before_attention(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
    passive = kwargs.get(_PASSIVE)
    if passive is None:
        return None
    kwargs = {name: value for name, value in kwargs.items() if name != _PASSIVE}
    kwargs["past_key_values"] = _JoinedCache(kwargs.get("past_key_values"), *passive)
    return args, kwargs


# --- attaching --------------------------------------------------------------------------------------------------------

_LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}


def _check_model(stack: Stack, parts: Parts, spec: ModelSpec) -> None:
    """Everything that can be refused before the model is touched."""
    active = stack.active(spec)
    for technique in active:
        if parts.attention not in technique.backends:
            raise UnsupportedModelError(
                f"{technique!r} is not exact on the attention backend {parts.attention!r}. It is tested on: "
                f"{', '.join(technique.backends)}. Load the model with attn={technique.backends[-1]!r}."
            )
    if not active:
        return
    devices = {str(device) for device in getattr(parts.model, "hf_device_map", {}).values()}
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"The model is spread over {', '.join(sorted(devices))}; techniques work on one device. "
            'Load it with device="cuda" or device="cpu".'
        )
    kinds = getattr(parts.text_config, "layer_types", None) or ["full_attention"] * spec.layers
    if set(kinds) != {"full_attention"}:
        raise UnsupportedModelError(
            f"The decoder has layers of the kinds {', '.join(sorted(set(kinds)))}; techniques work on full attention."
        )
    if any(stack.visual_policy(layer, spec) is not None for layer in range(spec.layers)):
        for layer in parts.layers:
            names = {name for name, _ in layer.named_children()}
            inner = {name for name, _ in layer.self_attn.named_children()} if "self_attn" in names else set()
            module = sys.modules[type(layer.self_attn).__module__] if inner else None
            if names != _LAYER_PARTS or inner != _ATTENTION_PARTS or not hasattr(module, "apply_rotary_pos_emb"):
                raise UnsupportedModelError(
                    f"{type(layer).__name__} is not built of {', '.join(sorted(_LAYER_PARTS))} with "
                    f"{', '.join(sorted(_ATTENTION_PARTS))}; visual rows cannot be served exactly in it. "
                    "DyVTE does not need that."
                )


class Handle:
    """A stack attached to a model. ``run`` is what it does; :meth:`detach` leaves the model exactly as it was."""

    def __init__(self, stack: Stack, model: nn.Module) -> None:
        parts = find_parts(model)
        spec = ModelSpec.from_config(parts.text_config)
        stack.check(spec)
        _check_model(stack, parts, spec)
        for hook in parts.base._forward_pre_hooks.values():
            if isinstance(getattr(hook, "__self__", None), Engine):
                raise ConflictError(
                    f"{hook.__self__.stack!r} is attached to this model already. Detach it first, or attach both as "
                    "one Stack."
                )
        self.stack = stack
        self.model = parts.model
        self._engine = Engine(stack, parts)
        self._hooks = self._engine.install()

    @property
    def run(self) -> Run:
        """Counters and report of this attachment."""
        return self._engine.run

    def detach(self) -> None:
        """Remove every hook; doing it twice is harmless."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the stack as a folder that :func:`mllm.saving.load_techniques` reads."""
        from mllm.saving import save_techniques

        save_techniques(self.stack, folder, self.model)

    def __enter__(self) -> Run:
        return self.run

    def __exit__(self, *exception: object) -> None:
        self.detach()
