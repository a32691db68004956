"""The engine: forward hooks that let a stock decoder process fewer rows, exactly.

One call of the model makes one :class:`Step`. A pre-hook on the multimodal base model reads the call's
:class:`~mllm.layout.TokenLayout` and passes the step down as a keyword argument, which stock transformers models hand
on to every decoder layer and its attention. Nothing about a call is kept on a module, so threads, several models and
recomputation cannot mix calls up. In each layer three sets of rows matter:

* ``alive``: rows of the call that exist in this layer; their keys are what the layer's cache grows by;
* ``active``: alive rows that run the layer, through the stock layer itself;
* ``passive``: alive visual rows that only offer keys and values (and what their policy adds).

Rows that are not alive are physically absent: the tensor that travels from layer to layer holds the active rows only,
and masks, positions and rotary tables are gathered for them. Text keeps its original positions. After the last layer
the rows are put back in place, so that the caller sees the input's length.

The cache is ragged: a layer holds keys for its alive rows. Layer 0 always holds all of them, because transformers
reads the length of the sequence there. Which rows a cached key belongs to travels with the cache object. Rows that
left can be kept as they left, and enter a later call again: they stand before its own rows.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from mllm.attention import NAMES, STEP, Segment, additive, attend_segments, attend_to
from mllm.cost import LayerWork, ModelSpec
from mllm.errors import CacheError, ConfigError, ConflictError, DidNotFireError, InputError, UnsupportedModelError
from mllm.families import Parts, find_parts
from mllm.layout import TokenLayout, valid_tokens
from mllm.ragged import (
    CACHE_STATE,
    BranchLayer,
    CacheState,
    JoinedCache,
    Stash,
    branch_layers,
    check_cache_kind,
    lengths,
)
from mllm.reuse import ImageCache, Reuse
from mllm.rows import Rows, Split, key_order
from mllm.run import Run
from mllm.technique import BranchView, LayerView, Memory, Opened, Revived, Technique
from mllm.versions import CACHE, cache_of

if TYPE_CHECKING:
    from mllm.roles import ChatFormat
    from mllm.technique import Stack, VisualPolicy

_PASSIVE = "mllm_passive"  # keyword that carries passive keys and values into a layer's attention
_BRANCH = "mllm_branch"  # keyword that carries what a layer's branch needs
_LABELS = "mllm_labels"  # keyword that carries training labels to the base model


# --- one call ---------------------------------------------------------------------------------------------------------


class Step:
    """One forward call of the model."""

    def __init__(
        self,
        engine: Engine,
        read: Callable[[], TokenLayout],
        shape: tuple[int, int],
        past_length: int,
        visual: bool,
        cache: Cache | None,
        whole: bool,
        mask: Tensor | None = None,
        cached: bool = False,
        masked: bool = False,
    ) -> None:
        self.engine = engine
        self._read = read
        self.mask = mask  # (B, past + S), 1 for real tokens, where there is padding
        self.masked = masked  # the caller hides more than padding and what is later
        self.batch, self.new = shape
        self.past_length = past_length
        self.visual = visual
        self.whole = whole  # hidden states of every layer must have full length
        self.cache = cache
        if not past_length and hasattr(cache, CACHE_STATE):  # the cache was reset
            delattr(cache, CACHE_STATE)
        self.past: CacheState | None = getattr(cache, CACHE_STATE, None)
        # nothing to do in the layers: no visual rows in this call, and none dropped in an earlier one
        acts = engine.active if visual else [t for t in engine.active if t.acts_on_text]
        self.idle = not acts and self.past is None
        self._plain = False  # the layers need not be told anything about this call, see enter()
        # a later question can concern a technique that did its work when the picture was read
        for technique in engine.active if self.new > 1 else acts:
            if technique in acts or technique.crosses_turns:
                technique.check_call(self.layout, lambda: self._valid_columns().sum(dim=1), cached or cache is not None)
        self.memories = {} if cache is None else branch_layers(cache, engine.spec.layers)
        if cache is not None and past_length:
            self._check_cache(cache)
        self.store = {} if self.past is None else {name: dict(kept) for name, kept in self.past.store.items()}
        self.scratch: dict[str, dict[str, Any]] = {}
        self.outputs: dict[str, dict[str, Any]] = {}
        self.revived = self._revive()
        self._entering = set() if self.revived is None else set(self.revived.layer.unique().tolist())
        self.width = self.new  # of the call's own tokens and those that came back
        if self.revived is not None:
            if whole:
                raise UnsupportedModelError(
                    "output_hidden_states=True: rows of an earlier turn that enter again have no place there. Ask "
                    "without."
                )
            self.layout = self._extended(self.layout)
            self.width = self.layout.visual.shape[1]
        self.opened: tuple[Opened, ...] = ()
        if visual:
            self.opened = tuple(opened for technique in engine.active for opened in technique.opens(self.layout))
        self.reduced: Tensor | None = None  # (B, S) bool, alive rows once a technique has dropped some
        everything = Rows(None, None, self.width)
        self.split = self._whole_split = Split(everything, everything)
        if self.revived is not None:
            layout = self.layout
            self.reduced = layout.valid & (self._numbers() >= layout.revived)  # they enter later
            own = torch.arange(layout.revived, self.width, device=layout.visual.device).expand(self.batch, -1)
            rows = Rows(own, None, self.new)
            self.split = Split(rows, rows)
        self.visual_per_layer: list[Tensor] = []
        self.splits: list[Split] = []
        self.segments: list[tuple[Segment, ...] | None] = []
        self.work: Counter[LayerWork] = Counter()
        self.extra_flops = 0
        self.fired: set[Technique] = set()
        self.evicted: list[tuple[int, Tensor]] = []  # before which layer, and (B, S) bool which rows
        self.reuse: Reuse | None = None
        self._full: Tensor | None = None  # (B, S, D) states of the rows that do not travel
        self._passive: Tensor | None = None  # (B, P, D)
        self._embeddings: Tensor | None = None  # (B, S, D) what entered layer 0, for branches
        self.entered: Tensor | None = None  # the same, where hidden states are asked for
        self._rotary: tuple[Tensor, Tensor] | None = None  # of all rows
        self._no_past = Rows(None, None, past_length)
        self._counted: tuple[Tensor, Tensor] | None = None  # alive rows, and how many of them are visual
        self._known: dict[tuple, Split] = {}
        self._gathered: dict[tuple, Any] = {}
        self._pattern: list[bool] | str | None = "unknown"

    @cached_property
    def layout(self) -> TokenLayout:
        """The call's tokens; read when first asked for, which while an answer is written mostly nobody does."""
        return self._read()

    @property
    def rests(self) -> bool:
        """Whether the layers run as they would without this step."""
        return self.idle or self._plain

    def _check_cache(self, cache: Cache) -> None:
        """The cache must hold what the state says: every layer the same number of keys, or the recorded ones."""
        length = self.past_length
        layers = self.engine.spec.layers
        found = lengths(cache)[:layers]
        if self.past is not None and length < self.past.length:  # cropped, as assisted decoding does
            cropped = self.past.cropped(length)
            if cropped is None:
                raise CacheError(
                    f"The cache was cropped to {length} of the {self.past.length} tokens that were read together with "
                    "images, into rows that layers have dropped. Start again with an empty cache."
                )
            self.past = cropped
            setattr(cache, CACHE_STATE, cropped)
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
        own = [(layer.place[:2], layer.length == length) for layer in self.memories.values()]
        complete = {place for place, whole in own if whole} - {place for place, whole in own if not whole}
        for number, branches in enumerate(self.engine.branches):
            for technique in branches:
                if (number, self.engine.key(technique)) not in complete:
                    raise CacheError(
                        f"{technique!r} has not seen the {length} tokens that the cache holds: it was filled without "
                        "it, or under another stack. Start again with an empty cache."
                    )

    # -- rows of earlier calls

    def _revive(self) -> Revived | None:
        """Rows that a technique lets in again; only where new tokens are read, not while an answer is written."""
        if self.past is None or self.new == 1:
            return None
        for technique in self.engine.active:
            revived = technique.revive(self.layout, self.store.get(self.engine.key(technique), {}))
            if revived is not None:
                return revived
        return None

    def _extended(self, layout: TokenLayout) -> TokenLayout:
        """The layout with the rows that came back in front."""
        stash = self.revived.stash
        count = stash.valid.shape[1]
        return TokenLayout(
            torch.cat([stash.valid, layout.visual], dim=1),
            torch.cat([stash.valid, layout.valid], dim=1),
            layout.past_length,
            None if layout.roles is None else layout.roles.padded(count),
            count,
            stash.image,
            None if layout.markers is None else nn.functional.pad(layout.markers, (count, 0)),
            None if layout.ids is None else nn.functional.pad(layout.ids, (count, 0), value=-1),
            layout.pictures,
        )

    def _numbers(self) -> Tensor:
        """(1, S) long, the number of each row of the call."""
        return torch.arange(self.width, device=self.layout.visual.device)[None]

    def _valid_columns(self) -> Tensor:
        """(B, past + S) bool, columns of the whole sequence that are not padding."""
        layout = self.layout
        own = layout.valid[:, layout.revived :]
        if self.mask is not None:
            return self.mask.bool()
        return nn.functional.pad(own, (layout.past_length, 0), value=True)

    def _columns_of(self, rows: Rows) -> Tensor:
        """(B or 1, N) columns of the whole sequence in which rows of this call stand."""
        revived = self.layout.revived
        index = self._numbers() if rows.index is None else rows.index
        own = index - revived + self.layout.past_length
        if self.revived is None:
            return own
        columns = self.revived.stash.columns  # (B, R)
        back = columns.gather(1, index.expand(self.batch, -1).clamp(max=revived - 1))
        return torch.where(index < revived, back, own)

    # -- into a layer

    def enter(self, number: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Prepare ``kwargs`` for layer ``number`` and return the rows that run it, (B, active, D)."""
        policy = self.engine.policies[number] if self.visual or self.revived is not None else None
        if number == 0:
            self.cache = cache_of(kwargs)  # the decoder makes one where it was given none
            self._start(hidden)
            if self._needs_nothing(kwargs.get("attention_mask")):
                self._plain = True
                return hidden
        rotary = self._tables(kwargs["position_embeddings"])
        before = self.split
        self._reduce(number, hidden)
        self.split = split = self._divide(policy)
        self.splits.append(split)
        if split is not before or self.whole:
            self._full = full = hidden if self.whole else self._restore(before, hidden)
            hidden = split.active.take(full, self.batch)
            self._passive = None if split.passive is None else split.passive.take(full, self.batch)
        past = self._past(number)
        computed = 0
        if split.passive is not None:
            tables = self._take("rotary", split.passive, rotary)
            # kept keys carry no gradient, and states of all layers are not kept
            pictures = self.engine.run.image_cache
            if number == 0 and pictures is not None and not torch.is_grad_enabled() and not self.whole:
                pictures.belong_to(self.engine.weights())
                image = split.passive.take(self.layout.image_index, self.batch)  # (B, P)
                self.reuse = Reuse(pictures, split.passive, self._passive, tables, image)
            keys_values = self._serve(number, layer, policy, tables)
            passive = (*keys_values, split.order)
            computed = self.batch * split.passive.length if self.reuse is None else self.reuse.computed
        segments = self._segments(split, past)
        self.segments.append(segments)
        if split.passive is not None:
            kwargs[_PASSIVE] = (*passive, None if segments is None else self._pieces())
        kwargs["attention_mask"] = (
            None if segments is not None else self._mask(kwargs.get("attention_mask"), split, past, hidden)
        )
        if not split.is_whole:
            kwargs["position_embeddings"] = self._take("rotary", split.active, rotary)
            kwargs["position_ids"] = None  # read by attention only to find packed sequences, which gaps look like
        if self.engine.branches[number]:
            kwargs[_BRANCH] = {"residual": hidden}
        # booked as the plain model is: every query with every key of the layer, whatever a kernel spares
        scores = split.active.length * (past.length + split.alive.length)
        self.work[
            LayerWork(
                self.batch * split.active.length,
                self.batch * scores,
                computed,
                bool(computed and policy.own_value),
                bool(computed and policy.ffn),
            )
        ] += 1
        return hidden

    def leave(self, number: int, hidden: Tensor) -> Tensor | None:
        """Put all rows back in place, (B, S, D), where the caller needs them; None leaves the output alone."""
        last = number == self.engine.spec.layers - 1
        if last and self.reuse is not None:
            self.reuse.finish()
        if self.revived is not None:
            if not last:
                return None
            return self._restore(self.split, hidden)[:, self.layout.revived :]
        if self.split.is_whole or not (self.whole or last):
            return None
        return self._restore(self.split, hidden)

    def _needs_nothing(self, mask: Tensor | None) -> bool:
        """Whether one further token simply sees all keys of every layer, as many as each holds."""
        return (
            self.new == 1
            and mask is None
            and not self.visual
            and not any(self.engine.branches)
            and self.past is not None
            and all(rows.valid is None for rows in self.past.rows)
        )

    def _start(self, hidden: Tensor) -> None:
        self.entered = hidden if self.whole else None
        if any(self.engine.branches):
            self._embeddings = hidden
        if self.revived is not None:
            self._full = torch.cat([self.revived.stash.states.to(hidden.dtype), hidden], dim=1)  # (B, S, D)

    def _tables(self, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all rows, (B or 1, S, head_dim)."""
        if self._rotary is None:
            if rotary[0].shape[-2] != self.new:  # Qwen does so for a second turn without position_ids
                raise InputError(
                    f"The model made positions for {rotary[0].shape[-2]} tokens in a call of {self.new}. Give "
                    "position_ids of the new tokens, as generate does."
                )
            if self.revived is not None:
                stash = self.revived.stash
                rotary = tuple(
                    torch.cat([old.to(new.dtype), new.expand(self.batch, -1, -1)], dim=1)
                    for old, new in zip((stash.cos, stash.sin), rotary, strict=True)
                )
            self._rotary = rotary
        return self._rotary

    def _reduce(self, number: int, hidden: Tensor) -> None:
        """Let rows in that come back here, and ask the techniques which rows stay."""
        spec, layout = self.engine.spec, self.layout
        if number in self._entering:
            layer = self.revived.layer if self.revived.layer.ndim == 2 else self.revived.layer[:, None]
            entering = (layer == number).expand(-1, layout.revived)  # (B, revived)
            entering = nn.functional.pad(entering, (0, self.new), value=False)  # (B, S)
            self.reduced = self.reduced | (entering & layout.valid)
        if not (self.visual or self.revived is not None):
            return
        alive = layout.valid if self.reduced is None else self.reduced
        for technique in self.engine.active:
            if technique.visual_policy(number, spec) is not None:
                self.fired.add(technique)
            key = self.engine.key(technique)
            view = LayerView(
                number,
                spec,
                layout,
                alive,
                partial(self._states, hidden),
                self._spend,
                self.engine.modules.get(technique),
                self.store.setdefault(key, {}),
                self.scratch.setdefault(key, {}),
                self.outputs.setdefault(technique.name, {}),
                partial(self._stash, number, hidden),
                partial(self._evict_later, number),
            )
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

    def _stash(self, number: int, hidden: Tensor, wanted: Tensor) -> Stash:
        rows = Rows.select(wanted, wanted.sum(dim=1).tolist())
        cos, sin = (rows.take(table, self.batch) for table in self._rotary)
        valid = torch.ones_like(rows.index, dtype=torch.bool) if rows.valid is None else rows.valid
        states = rows.take(self._states(hidden), self.batch)
        image = rows.take(self.layout.image_index, self.batch)
        return Stash(self._columns_of(rows), valid, states, cos, sin, image, torch.full_like(image, number))

    def _evict_later(self, number: int, rows: Tensor) -> None:
        self.evicted.append((number, rows))

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
                split = Split(rows, active, passive, key_order(rows, active, passive, self.width))
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

    def _serve(
        self, number: int, layer: nn.Module, policy: VisualPolicy, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the passive rows, (B, kv_heads, P, head_dim) each; then what the policy does to them."""
        compute = partial(_serve, layer, policy)
        if self.reuse is None:
            keys, values, self._passive = compute(self._passive, rotary)
        else:
            keys, values, self._passive = self.reuse.serve(number, self._passive, rotary, compute)
        return keys, values

    # -- attention

    def attend(
        self,
        stock: Any,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """One layer's attention over its rows; keeps nothing, since recomputation calls it again."""
        number = module.layer_idx
        branch = kwargs.pop(_BRANCH, None)
        segments = self.segments[number]

        def run(values: Tensor, **changed: Any) -> Tensor:
            options = {**kwargs, **changed}
            if segments is None:
                return stock(module, query, key, values, mask, **options)[0]
            return attend_segments(stock, segments, module, query, key, values, options)

        if branch is not None:
            branch["mixed"] = self._mix(number, key, run)
        return run(value), None

    def _mix(self, number: int, key: Tensor, run: Any) -> Tensor | None:
        """(B, A, c) a branch's channels, weighted as the layer's attention weighs its values, summed over heads."""
        technique = self.engine.branches[number][0]
        batch, kv_heads, length, head_dim = key.shape
        channels = technique.channels(number, self._key_positions(number), self.engine.modules[technique])
        if channels is None:
            return None
        self._spend(4 * batch * self.splits[number].active.length * length * self.engine.spec.q_width)
        padded = nn.functional.pad(channels.to(key.dtype), (0, head_dim - channels.shape[-1]))  # (B, K, head_dim)
        values = padded[:, None].expand(batch, kv_heads, length, head_dim)
        return run(values, dropout=0.0)[..., : channels.shape[-1]].sum(dim=2)

    def _key_positions(self, number: int) -> Tensor:
        """(B, K) long, for each key of a layer the number of real tokens before it."""
        past, alive = self._past(number), self.splits[number].alive
        cached = ("key positions", past, alive)
        if cached not in self._gathered:
            valid = self._valid_columns()  # (B, past + S)
            positions = (valid.long().cumsum(dim=1) - 1).clamp(min=0)
            keys = self._key_columns(past, alive)
            self._gathered[cached] = positions.gather(1, keys)
        return self._gathered[cached]

    def add_branch(self, module: nn.Module, output: Tensor, branch: dict[str, Any]) -> Tensor:
        """A layer's attention output with its branch added."""
        number = module.layer_idx
        (technique,) = self.engine.branches[number]
        self.fired.add(technique)
        key = self.engine.key(technique)
        view = BranchView(
            number,
            self.engine.spec,
            self.layout,
            self._columns_of(self._whole_split.alive),
            branch["residual"] + output,
            self._embeddings,
            self._rotary,
            sys.modules[type(module).__module__].apply_rotary_pos_emb,
            branch["mixed"],
            self.engine.modules[technique],
            self.scratch.setdefault(key, {}),
            self._spend,
            partial(self._extend, number, key),
            self._attend_to,
            partial(self._report, technique),
        )
        return output + technique.branch(view).to(output.dtype)

    def _report(self, technique: Technique, name: str, number: int, value: Tensor) -> None:
        self.outputs.setdefault(technique.name, {}).setdefault(name, {})[number] = value

    # -- memories of branches

    def _extend(
        self, number: int, key: str, name: str, rows: Rows | None, keys: Tensor | None, values: Tensor | None
    ) -> Memory | None:
        """All keys of a branch's memory; they lie in the cache object, behind the model's layers."""
        if self.cache is None:
            return None if rows is None else Memory(keys, values, *self._columns_with(None, True, rows))
        layers, place = self.cache.layers, (number, key, name)
        while len(layers) < self.engine.spec.layers:  # the model's come first
            layers.append(DynamicLayer())
        layer = self.memories.get(place)
        if layer is None:
            layer = self.memories[place] = BranchLayer(place)
            layers.append(layer)
        layer.length = self.layout.past_length + self.new
        if rows is not None:
            layer.extend(keys, values, *self._columns_with(layer.columns, layer.whole, rows))
        return None if layer.columns is None else Memory(layer.keys, layer.values, layer.columns, layer.whole)

    def _columns_with(self, before: Tensor | None, whole: bool, rows: Rows) -> tuple[Tensor, bool]:
        """(B, N) columns of a memory's keys once ``rows`` are added, and whether there are no fillers."""
        key = ("columns", id(before), rows)
        if key not in self._gathered:
            own = self._columns_of(rows).expand(self.batch, -1)  # (B, n)
            if rows.valid is not None:
                own = own.masked_fill(~rows.valid, -1)
            whole = whole and rows.valid is None
            # what was there is kept beside, so that its id stays its own
            self._gathered[key] = (before, own if before is None else torch.cat([before, own], dim=1), whole)
        return self._gathered[key][1:]

    def _attend_to(self, queries: Tensor, memory: Memory, last: Tensor | None = None) -> Tensor:
        """(B, S, heads, head_dim) attention of the call's rows to a memory; 0 for rows that see none of it."""
        batch, heads, length, head_dim = queries.shape
        # booked in full, as a layer's own attention is
        self._spend(4 * batch * heads * length * memory.columns.shape[1] * head_dim)
        if length == 1 and last is None and memory.whole:  # all keys are earlier
            return attend_to(queries, memory.keys, memory.values)
        key = ("seen", id(memory.columns), id(last))
        if key not in self._gathered:
            upto = self._columns_of(self._whole_split.alive) if last is None else last  # (B or 1, S)
            segments = self._memory_segments(memory, upto)
            mask = None
            if segments is None:
                columns = memory.columns[:, None, :]  # (B, 1, N)
                mask = ((columns >= 0) & (columns <= upto[:, :, None]))[:, None]  # (B, 1, S, N)
            self._gathered[key] = (memory.columns, last, segments, mask)
        return attend_to(queries, memory.keys, memory.values, *self._gathered[key][2:])

    def _memory_segments(self, memory: Memory, last: Tensor) -> tuple[Segment, ...] | None:
        """Row ranges that look into a memory without masks; None where batch rows differ."""
        columns = memory.columns
        if not memory.whole or last.shape[1] == 1:
            return None
        same = (columns == columns[:1]).all() & (last == last[:1]).all() & self.layout.valid.all()
        if not bool(same):
            return None
        held, upto = columns[0].tolist(), last[0].tolist()
        counts = [bisect_right(held, column) for column in upto]  # how many keys each row sees, never fewer than before
        segments, start = [], 0
        while start < len(counts):
            stop, grows = start + 1, None
            while stop < len(counts):
                step = counts[stop] - counts[stop - 1]
                if step not in (0, 1) or (grows is not None and step != grows) or (step and not counts[start]):
                    break
                stop, grows = stop + 1, step
            segments.append(Segment((start, stop), ((0, counts[stop - 1]),), causal=bool(grows)))
            start = stop
        return tuple(segments)

    def _segments(self, split: Split, past: Rows) -> tuple[Segment, ...] | None:
        """Row ranges that attend without masks, where all batch rows have the same shape; None where they do not."""
        if split.passive is None and not self.opened:
            return None
        key = ("segments", split, past)
        if key not in self._gathered:
            self._gathered[key] = self._make_segments(split, past)
        return self._gathered[key]

    def _make_segments(self, split: Split, past: Rows) -> tuple[Segment, ...] | None:
        ragged = (split.alive.valid, split.active.valid, past.valid)
        if not self.engine.owns_attention or self.reduced is not None or any(valid is not None for valid in ragged):
            return None
        if self._uniform() is None:
            return None
        segments, before, offset = [], 0, past.length
        for visual, start, stop in self._runs():
            if split.passive is not None:
                if not visual:
                    rows = (before, before + stop - start)
                    segments.append(Segment(rows, ((0, offset + stop),)))
                    before = rows[1]
                continue
            later = self._later(start, stop) if visual else ()
            if later is None:
                return None
            spans = tuple((offset + low, offset + high) for low, high in later if low >= stop)
            whole = any(low < stop for low, _ in later)  # the picture's own rows are open to each other
            if not spans:
                segments.append(Segment((start, stop), ((0, offset + stop),), causal=not whole))
            else:
                keys = ((0, offset + start), *spans, (offset + start, offset + stop))
                segments.append(Segment((start, stop), keys, causal=not whole))
        return tuple(segments)

    def _runs(self) -> list[tuple[bool, int, int]]:
        """Runs of visual and of other columns, where they are the same in all batch rows; see :meth:`_uniform`."""
        visual, runs, start = self._uniform(), [], 0
        for stop in range(1, self.width + 1):
            if stop == self.width or visual[stop] != visual[start]:
                runs.append((visual[start], start, stop))
                start = stop
        return runs

    def _pieces(self) -> tuple[tuple[bool, int, int], ...]:
        """The same runs, counted among the visual columns and among the others."""
        if "pieces" not in self._gathered:
            done, pieces = {True: 0, False: 0}, []
            for visual, start, stop in self._runs():
                pieces.append((visual, done[visual], done[visual] + stop - start))
                done[visual] += stop - start
            self._gathered["pieces"] = tuple(pieces)
        return self._gathered["pieces"]

    def _uniform(self) -> list[bool] | None:
        """Which columns are visual, if all batch rows agree, nothing is padding and attention is causal."""
        if self._pattern == "unknown":
            layout = self.layout
            same = (layout.visual == layout.visual[:1]).all() & layout.valid.all()
            same = same & self._valid_columns().all() & (not self.masked)  # also what an earlier call padded
            for opened in self.opened:
                for part in (opened.low, opened.high, opened.group):
                    same = same & (part == part[:1]).all()
            self._pattern = layout.visual[0].tolist() if bool(same) else None
        return self._pattern

    def _later(self, start: int, stop: int) -> list[tuple[int, int]] | None:
        """Ranges of keys opened to the rows from ``start`` to ``stop``; None where these rows differ in them."""
        numbers = self._numbers()
        # rows with the same bounds see the same keys: one of each kind is looked at, not (rows, S)
        bounds = torch.cat([part[0, start:stop, None] for o in self.opened for part in (o.low, o.high)], dim=1)
        kind = bounds.unique(dim=0, return_inverse=True)[1]  # (rows,)
        earliest = torch.full_like(kind, self.width).scatter_reduce(0, kind, numbers[0, start:stop], "amin")
        chosen = earliest[earliest < self.width][None]  # (1, kinds)
        allowed = torch.zeros(chosen.shape[1], self.width, dtype=torch.bool, device=numbers.device)  # (kinds, S)
        for opened in self.opened:
            one = Opened(opened.low[:1], opened.high[:1], opened.group[:1])
            allowed |= one.allowed(chosen, numbers)[0]
        own = allowed[:, start:stop]
        outside = allowed.clone()
        outside[:, :stop] = False
        if bool((outside != outside[:1]).any()) or (bool(own.any()) and not bool(own.all())):
            return None
        seen = outside[0].tolist()
        ranges = [(start, stop)] if bool(own.any()) else []
        first = None
        for column in range(stop, self.width + 1):
            inside = column < self.width and seen[column]
            if inside and first is None:
                first = column
            elif not inside and first is not None:
                ranges.append((first, column))
                first = None
        return ranges

    # -- masks

    def _mask(self, mask: Tensor | None, split: Split, past: Rows, hidden: Tensor) -> Tensor | None:
        """The layer's mask for the active rows and the keys it holds; made once for the layers that share them."""
        if split.is_whole and past.index is None and not self.opened:
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
        # one new token sees every key; a square causal block is what no mask means
        square = split.passive is None and past.length == 0 and not self.opened
        if mask is None and all_valid and self.revived is None and (self.width == 1 or square):
            return None
        device = hidden.device
        queries = self._columns_of(split.active)  # (B or 1, A)
        keys = self._key_columns(past, split.alive)  # (B, K)
        if self.revived is not None:
            valid = self._valid_columns()  # (B, past + S)
            made = (keys[:, None, :] <= queries[:, :, None]) & valid.gather(1, keys)[:, None]  # (B, A, K)
        elif mask is None:
            made = keys[:, None, :] <= queries[:, :, None]  # (B, A, K)
        else:
            rows = torch.arange(self.batch, device=device)[:, None, None] % mask.shape[0]  # (B, 1, 1)
            length = self.layout.past_length
            made = mask[rows, 0, (queries - length)[:, :, None], keys[:, None, :]]  # (B, A, K)
        for opened in self.opened:
            made = self._open(made, opened, split, keys)
        if past.valid is not None or split.alive.valid is not None:
            valid = torch.cat([self._valid(past, device), self._valid(split.alive, device)], dim=1)[:, None, :]
            if made.dtype == torch.bool:
                made = made & valid
            else:
                made = made.masked_fill(~valid, torch.finfo(made.dtype).min)
        made = made[:, None]  # (B, 1, A, K)
        if made.dtype == torch.bool and self.engine.backend == "eager":
            return additive(made, hidden.dtype)
        return made

    def _open(self, made: Tensor, opened: Opened, split: Split, keys: Tensor) -> Tensor:
        """(B, A, K) the mask with what ``opened`` allows besides."""
        index = self._numbers() if split.active.index is None else split.active.index
        layout = self.layout
        own = (keys - layout.past_length + layout.revived).masked_fill(keys < layout.past_length, -1)  # (B, K)
        allowed = opened.allowed(index.expand(self.batch, -1), own)  # (B, A, K)
        allowed = allowed & layout.valid.gather(1, own.clamp(min=0))[:, None]
        return made | allowed if made.dtype == torch.bool else made.masked_fill(allowed, 0.0)

    def _key_columns(self, past: Rows, alive: Rows) -> Tensor:
        """(B, K) columns of the whole sequence that a layer's keys stand for."""
        device = self.layout.visual.device
        before = torch.arange(past.length, device=device)[None] if past.index is None else past.index
        return torch.cat([part.expand(self.batch, -1) for part in (before, self._columns_of(alive))], dim=1)

    def _valid(self, rows: Rows, device: torch.device) -> Tensor:
        if rows.valid is None:
            return torch.ones(self.batch, rows.length, dtype=torch.bool, device=device)
        return rows.valid

    # -- after the last layer

    def finish(self, cache: Cache | None, bytes_per_value: int) -> None:
        """Book the call, and leave on the cache what later calls must know."""
        engine = self.engine
        length = self.past_length + self.new
        layers = engine.spec.layers
        if not self.rests and len(self.splits) != layers:
            raise DidNotFireError(
                f"{len(self.splits)} of {layers} decoder layers were called through their hooks, while this call needs "
                "all of them. Attach after the model is complete, and not to a compiled or rebuilt copy."
            )
        if self.visual:
            if self.opened:
                self.fired.update(t for t in engine.active if _opens(t))
            missing = [technique for technique in engine.active if technique not in self.fired]
            if missing:
                raise DidNotFireError(
                    f"{', '.join(map(repr, missing))} saw visual tokens and did nothing. Its arguments or its code "
                    "leave this model unchanged; a technique that means to must say so in is_neutral()."
                )
            visual = self.layout.visual.sum(dim=1)  # (B,)
            engine.run.record_visual(visual, self.visual_per_layer or [visual] * layers)
        told = {name: output for name, output in self.outputs.items() if output}
        # what was read, not what is written, one token or some guessed ones at a time
        if self.visual or (self.new > 1 and (told or not self.past_length)):
            engine.run.outputs = told
        if self.idle:
            self.work[LayerWork(self.batch * self.new, self.batch * self.new * length)] = layers
            held = [length] * layers
        elif self._plain:
            held = [rows.length + length - self.past.length for rows in self.past.rows]
            self.work.update(LayerWork(self.batch, self.batch * keys) for keys in held)
        else:
            held = [self._past(n).length + split.alive.length for n, split in enumerate(self.splits)]
        engine.run.count(self.work, self.extra_flops, self.batch, self.new, length)
        if cache is None:
            engine.run.count_cache([], 0, 0, 0)
            return
        if not self.idle and (self.visual or self.revived is not None):
            check_cache_kind(cache)
        rows = None
        if self.evicted:
            rows = self._evict(cache)
            held = [kept.length for kept in rows]
        store = {name: kept for name, kept in self.store.items() if kept}
        extra = sum(value.nbytes for kept in store.values() for value in kept.values() if hasattr(value, "nbytes"))
        own = list(branch_layers(cache, layers).values())
        extra += sum(layer.keys.nbytes + layer.values.nbytes for layer in own if layer.columns is not None)
        held += [layer.get_seq_length() for layer in own]
        engine.run.count_cache(held, self.batch, length, bytes_per_value, extra)
        if self.idle:
            return
        changed = self.reduced is not None or store or own
        if changed and (self.visual or self.revived is not None or self.past is None):
            setattr(cache, CACHE_STATE, CacheState(length, rows or self._held(), store))

    def _evict(self, cache: Cache) -> tuple[Rows, ...]:
        """Take the keys of evicted rows out of the layers before; per layer, the tokens whose keys are left."""
        layout = self.layout
        columns = self._columns_of(Rows(None, None, self.width)).expand(self.batch, -1)  # (B, S)
        length = layout.past_length + self.new
        held = list(self._held())
        for before, gone in self.evicted:
            known: dict[Rows, tuple[Rows, Rows]] = {}
            lost = nn.functional.pad(~self._valid_columns(), (0, 1))  # (B, past + S + 1), the last one is a bin
            lost.scatter_(1, columns.masked_fill(~gone, length), True)
            for number in range(1, before):
                old = held[number]
                if old not in known:
                    index = torch.arange(old.length, device=gone.device)[None] if old.index is None else old.index
                    index = index.expand(self.batch, -1)  # (B, K)
                    wanted = ~lost.gather(1, index) & self._valid(old, gone.device)
                    left = Rows.select(wanted, wanted.sum(dim=1).tolist())
                    known[old] = left, Rows(index.gather(1, left.index), left.valid, left.length)
                left, held[number] = known[old]
                layer = cache.layers[number]
                layer.keys, layer.values = (
                    left.take(part.transpose(1, 2), self.batch).transpose(1, 2) for part in (layer.keys, layer.values)
                )
        return tuple(held)

    def _held(self) -> tuple[Rows, ...]:
        """Per layer, the tokens whose keys the cache now holds; layers that hold the same share one object."""
        device = self.layout.visual.device
        known: dict[tuple, Rows] = {}
        held = []
        for number, split in enumerate(self.splits):
            past, alive = self._past(number), split.alive
            key = (past if past.index is not None else None, alive)
            if key not in known:
                if past.index is None and alive.index is None:
                    known[key] = Rows(None, None, self.layout.past_length + self.width)
                else:
                    index = self._key_columns(past, alive)  # (B, K)
                    ragged = past.valid is not None or alive.valid is not None
                    valid = torch.cat([self._valid(past, device), self._valid(alive, device)], 1) if ragged else None
                    known[key] = Rows(index, valid, index.shape[1])
            held.append(known[key])
        return tuple(held)


def _serve(
    layer: nn.Module, policy: VisualPolicy, states: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values, (B, kv_heads, P, head_dim), and next states, (B, P, D), of rows that attend to nothing else."""
    attention = layer.self_attn
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
    return keys, values, states


# --- hooks ------------------------------------------------------------------------------------------------------------


class Engine:
    """The hooks of one attachment."""

    def __init__(
        self, stack: Stack, parts: Parts, modules: dict[Technique, nn.Module], chat: ChatFormat | None
    ) -> None:
        self.stack = stack
        self.parts = parts
        self.modules = modules
        self.chat = chat
        self.spec = ModelSpec.from_config(parts.text_config)
        self.active = stack.active(self.spec)
        self.policies = [stack.visual_policy(layer, self.spec) for layer in range(self.spec.layers)]
        #: per layer, the techniques that have a branch there (one at most)
        self.branches = [
            tuple(t for t in self.active if n in t.branch_layers(self.spec)) for n in range(self.spec.layers)
        ]
        pictures = max((getattr(t, "image_cache", 0) for t in self.active), default=0)
        self.run = Run(self.spec, image_cache=ImageCache(pictures) if pictures else None)
        #: the attention backend that the model was loaded with
        self.backend = parts.attention
        self.owns_attention = (
            any(policy is not None for policy in self.policies)
            or any(self.branches)
            or any(_opens(t) for t in self.active)
        )
        self._guards = [t for t in self.active if type(t).check_labels is not Technique.check_labels]
        self._names = list(inspect.signature(parts.base.forward).parameters)

    def key(self, technique: Technique) -> str:
        """Name under which a technique keeps things on a cache."""
        return f"{self.active.index(technique)}.{technique.name}"

    def weights(self) -> tuple[tuple[int, int], ...]:
        """Where the decoder's weights lie, and how often they were written to."""
        parameters = (parameter for layer in self.parts.layers for parameter in layer.parameters())
        return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)

    def install(self) -> list[RemovableHandle]:
        """Register all hooks; the caller removes them."""
        base, layers = self.parts.base, self.parts.layers
        handles = [
            base.register_forward_pre_hook(self._before_base, with_kwargs=True),
            base.register_forward_hook(self._after_base, with_kwargs=True),
            self.parts.text.register_forward_hook(_after_text, with_kwargs=True),
        ]
        for number, layer in enumerate(layers):
            # ours must run before hooks that record hidden states, which may be there already: prepend
            handles += [
                layer.register_forward_pre_hook(_BeforeLayer(number), with_kwargs=True),
                layer.register_forward_hook(_AfterLayer(number), with_kwargs=True, prepend=True),
            ]
            if self.policies[number] is not None:
                handles.append(layer.self_attn.register_forward_pre_hook(_before_attention, with_kwargs=True))
            if self.branches[number]:
                handles.append(layer.self_attn.register_forward_hook(_after_attention, with_kwargs=True))
        if self._guards:
            handles.append(self.parts.model.register_forward_pre_hook(_before_model, with_kwargs=True))
        if self.owns_attention:
            self.parts.text.config._attn_implementation = NAMES[self.backend]
        return handles

    def uninstall(self) -> None:
        """Give the decoder its attention back."""
        if self.owns_attention:
            self.parts.text.config._attn_implementation = self.backend

    def _before_base(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        labels = kwargs.pop(_LABELS, None)
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache = cache_of(given)
        past_length = cache.get_seq_length() if cache is not None else 0
        encoded = given.get("mm_encoder_outputs") or {}
        visual = any(given.get(name) is not None for name in self.parts.family.visual_arguments) or any(
            output is not None for output in encoded.values()
        )
        tokens = given.get("input_ids")
        shape = tuple((tokens if tokens is not None else given["inputs_embeds"]).shape[:2])
        read = lru_cache(maxsize=1)(
            lambda: replace(self._layout(given, past_length, visual), pictures=self._pictures(given, encoded))
        )
        config = self.parts.text_config
        whole = bool(given.get("output_hidden_states", getattr(config, "output_hidden_states", False)))
        if labels is not None and visual:
            for technique in self._guards:
                technique.check_labels(labels, read())
        mask = given.get("attention_mask")
        own = mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2)
        masked = own or _is_packed(given)
        self._check_mask(own and visual, masked and (visual or any(self.branches)))
        mask = None if own else mask
        cached = given.get("use_cache")
        cached = bool(getattr(config, "use_cache", False) if cached is None else cached)
        step = Step(self, read, shape, past_length, visual, cache, whole, mask, cached, masked)
        if not step.idle:
            if given.get("output_attentions", getattr(config, "output_attentions", False)):
                raise UnsupportedModelError(
                    "output_attentions=True: layers hold different rows under a technique, so their attention "
                    "weights have different shapes. Detach, or ask without it."
                )
            if cache is not None:
                check_cache_kind(cache)
            self._check_checkpointing()
        return args, {**kwargs, STEP: step}

    def _check_mask(self, own: bool, masked: bool) -> None:
        """Refuse masks of the caller's own, and packed prompts, where a technique would look past them."""
        reading = next((branches[0] for branches in self.branches if branches), None) if masked else None
        opening = next((t for t in self.active if _opens(t) and (own or (masked and t.crosses_turns))), None)
        if reading is not None:
            raise InputError(
                f"{reading!r} reads all that is earlier in a row, also what a mask of your own or packed prompts hide. "
                "Give a padding mask (batch, length), and one prompt a row."
            )
        if opening is not None:
            raise InputError(
                f"{opening!r} opens keys that the rule of causal attention hides, and cannot tell them from those that "
                "a mask of your own or packed prompts hide. Give a padding mask (batch, length), and one prompt a row."
            )

    def _layout(self, given: dict[str, Any], past_length: int, visual: bool) -> TokenLayout:
        input_ids, embeds, mask = given.get("input_ids"), given.get("inputs_embeds"), given.get("attention_mask")
        if input_ids is not None or embeds is None or not visual:
            tokens = input_ids if input_ids is not None else embeds[..., 0]
            parts = self.parts
            layout = TokenLayout.from_inputs(parts.token_ids, tokens, mask, past_length, visual, parts.marker_ids)
            if input_ids is None:
                return layout
            known = self.chat is not None and tokens.shape[1] > 1
            return replace(layout, ids=input_ids, roles=self.chat.roles(input_ids, layout.valid) if known else None)
        # embeddings with separate image features: placeholders are told by their embedding, as the model does
        found = self._find(self.parts.token_ids, embeds)  # (B, S)
        markers = self._find(self.parts.marker_ids, embeds) if self.parts.marker_ids else None
        return TokenLayout(found, valid_tokens(mask, found), past_length, markers=markers)

    def _pictures(self, given: dict[str, Any], encoded: dict[str, Any]) -> int:
        """Pictures of a call; ``generate`` has encoded them beforehand."""
        image = encoded.get("image")
        entries = given.get(self.parts.family.picture_argument) if image is None else image.pooler_output
        return 0 if entries is None else len(entries)

    def _find(self, ids: tuple[int, ...], embeds: Tensor) -> Tensor:
        """(B, S) bool, rows of ``embeds`` (B, S, D) that are the embedding of one of ``ids``."""
        marks = self.parts.base.get_input_embeddings()(torch.tensor(ids, device=embeds.device))  # (ids, D)
        return (embeds[:, :, None] == marks).all(dim=-1).any(dim=-1)

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
        kwargs[STEP].finish(cache, outputs[0].element_size())


def _is_packed(given: dict[str, Any]) -> bool:
    """Whether positions start again within a row: several prompts in one, which must not see each other."""
    positions = given.get("position_ids")
    if given.get("attention_mask") is not None or not isinstance(positions, Tensor):
        return False
    if positions.ndim == 3:  # Qwen's, of which the first of four are those of text
        if positions.shape[0] != 4:
            return False
        positions = positions[0]
    return positions.shape[-1] > 1 and bool((positions.diff(dim=-1) != 1).any())


def _after_text(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """The recorder of hidden states takes what entered layer 0 behind our hook: put all rows back."""
    step: Step | None = kwargs.get(STEP)
    states = getattr(output, "hidden_states", None)
    if step is None or step.rests or not states or states[0] is None or step.entered is None:
        return None
    output["hidden_states"] = (step.entered, *states[1:])
    return output


class _BeforeLayer:
    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        step: Step | None = kwargs.get(STEP)
        if step is None or step.rests:
            return None
        kwargs = dict(kwargs)
        return (step.enter(self.number, layer, args[0], kwargs), *args[1:]), kwargs


class _AfterLayer:
    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        step: Step | None = kwargs.get(STEP)
        return None if step is None or step.rests else step.leave(self.number, output)


def _before_attention(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
    passive = kwargs.get(_PASSIVE)
    if passive is None:
        return None
    kwargs = {name: value for name, value in kwargs.items() if name != _PASSIVE}
    kwargs[CACHE] = JoinedCache(cache_of(kwargs), *passive)
    return args, kwargs


def _after_attention(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple) -> tuple | None:
    step: Step | None = kwargs.get(STEP)
    if step is None or step.rests:
        return None
    return step.add_branch(module, output[0], kwargs[_BRANCH]), *output[1:]


def _before_model(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
    labels = kwargs.get("labels")
    return None if labels is None else (args, {**kwargs, _LABELS: labels})


def _opens(technique: Technique) -> bool:
    return type(technique).opens is not Technique.opens


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
    compiled = [module for module in (parts.model, parts.base, parts.text, *parts.layers) if _is_compiled(module)]
    if compiled:
        raise UnsupportedModelError(
            f"{type(compiled[0]).__name__} is compiled (torch.compile); techniques choose rows while the model runs, "
            "which a compiled graph cannot. Attach to the uncompiled model."
        )
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
    serving = [t for t in active if any(t.visual_policy(layer, spec) is not None for layer in range(spec.layers))]
    beside = [t for t in active if t.branch_layers(spec)]
    for layer in parts.layers if serving or beside else []:
        names = {name for name, _ in layer.named_children()}
        inner = {name for name, _ in layer.self_attn.named_children()} if "self_attn" in names else set()
        rotary = inner and hasattr(sys.modules[type(layer.self_attn).__module__], "apply_rotary_pos_emb")
        # a branch needs to know where the residual stream is, not how keys and values are made
        if names != _LAYER_PARTS or not rotary or (serving and inner != _ATTENTION_PARTS):
            raise UnsupportedModelError(
                f"{type(layer).__name__} is not built of {', '.join(sorted(_LAYER_PARTS))} with "
                f"{', '.join(sorted(_ATTENTION_PARTS))}; {(serving or beside)[0].name} cannot be exact in it. "
                "DyVTE does not need that."
            )


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


class Handle:
    """A stack attached to a model. ``run`` is what it does; :meth:`detach` leaves the model exactly as it was.

    Learned parts live here, not in the model: :attr:`modules` and :meth:`parameters` are what an optimizer trains.
    """

    def __init__(self, stack: Stack, model: nn.Module, processor: Any = None, freeze: bool = True) -> None:
        from mllm.saving import check_base

        parts = find_parts(model)
        spec = ModelSpec.from_config(parts.text_config)
        for technique in stack.techniques:  # arguments that were trained for another model need not fit this one
            learned = getattr(technique, "learned", None)
            if learned is not None:
                check_base(learned.base_model, parts.model, learned.source)
        stack.check(spec)
        for hook in parts.base._forward_pre_hooks.values():
            if isinstance(getattr(hook, "__self__", None), Engine):
                raise ConflictError(
                    f"{hook.__self__.stack!r} is attached to this model already. Detach it first, or attach both as "
                    "one Stack."
                )
        _check_model(stack, parts, spec)
        chat = _chat_format(stack, spec, processor)
        self.stack = stack
        self.model = parts.model
        #: learned parts of each technique, None where it has none
        self.modules = [_learned_parts(technique, parts, spec) for technique in stack.techniques]
        by_technique = dict(zip(stack.techniques, self.modules, strict=True))
        self._engine = Engine(stack, parts, by_technique, chat)
        self._frozen: list[nn.Parameter] = []
        if freeze and any(module is not None for module in self.modules):
            self._frozen = [parameter for parameter in parts.model.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._hooks = self._engine.install()

    @property
    def run(self) -> Run:
        """Counters and report of this attachment."""
        return self._engine.run

    def parameters(self) -> Iterator[nn.Parameter]:
        """Learned parameters of all techniques."""
        for module in self.modules:
            if module is not None:
                yield from module.parameters()

    def detach(self) -> None:
        """Remove every hook; doing it twice is harmless."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._engine.uninstall()
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the stack and its learned parts as a folder that :func:`mllm.saving.load_techniques` reads."""
        from mllm.saving import save_techniques

        save_techniques(self.stack, folder, self.model, self.modules)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save and upload the folder to a model hub; ``options`` go to ``huggingface_hub.upload_folder``."""
        from huggingface_hub import create_repo, upload_folder

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            create_repo(repo_id, exist_ok=True, **{key: options[key] for key in ("token",) if key in options})
            return str(upload_folder(repo_id=repo_id, folder_path=folder, **options))

    def __enter__(self) -> Run:
        return self.run

    def __exit__(self, *exception: object) -> None:
        self.detach()


def _chat_format(stack: Stack, spec: ModelSpec, processor: Any) -> ChatFormat | None:
    """How the processor's prompts tell questions from answers; None where it is not given and not needed."""
    active = stack.active(spec)
    needing = [technique for technique in active if technique.needs_roles]
    if not needing and (processor is None or not any(technique.wants_roles for technique in active)):
        return None
    if processor is None:
        raise ConfigError(
            f"{needing[0]!r} must tell questions from answers, which only the processor's chat template says. Attach "
            "it with the processor: technique(model, processor)."
        )
    from mllm.roles import ChatFormat

    return processor if isinstance(processor, ChatFormat) else ChatFormat.from_processor(processor)


def _learned_parts(technique: Technique, parts: Parts, spec: ModelSpec) -> nn.Module | None:
    """The technique's live copy of its learned parts, on the model's device and in its number format."""
    module = technique.build(spec)
    if module is None:
        return None
    learned = getattr(technique, "learned", None)
    if learned is not None:
        learned.load_into(module, parts.model)
    like = next(parts.layers[0].parameters())
    dtype = like.dtype if like.is_floating_point() else None  # 8-bit and 4-bit weights are no numbers to compute in
    return module.to(device=like.device, dtype=dtype).train(parts.model.training)
