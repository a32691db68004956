"""The ragged key/value cache: whose keys its layers hold, and what later calls must know.

A layer holds keys for the rows that were alive in it. Which rows those are travels with the cache object, so that
``generate``, a second turn, or another thread finds it there and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from mllm.errors import UnsupportedModelError
from mllm.rows import Rows

CACHE_STATE = "mllm_state"  # attribute of a cache object


@dataclass(frozen=True, eq=False)
class CacheState:
    """Which tokens the keys of a ragged cache belong to.

    Attributes:
        length: tokens seen when this was written; keys that came later are held by every layer.
        rows: per layer, the tokens whose keys it holds, as columns of the whole sequence.
        store: what techniques keep for later calls on this cache, each under its own name.
    """

    length: int
    rows: tuple[Rows, ...]
    store: dict[str, dict[str, Any]] = field(default_factory=dict)

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
        return CacheState(length, tuple(rows[old] for old in self.rows), self.store)


class BranchLayer(DynamicLayer):
    """Keys and values that a layer branch keeps in the cache object, behind the model's own layers.

    They belong to some tokens of the sequence only, so the layer knows to which: cropping, beams and copies of the
    cache act on it as they do on the others.

    Attributes:
        place: number of the model's layer, key of the technique, and name of the memory.
        length: tokens of the sequence that were seen.
        columns: (B, N) long, the token that each key belongs to; -1 for fillers; None before the first key.
        whole: whether there are no fillers.
    """

    def __init__(self, place: tuple[int, str, str]) -> None:
        super().__init__()
        self.place = place
        self._forget()

    def _forget(self) -> None:
        self.length, self.columns, self.whole = 0, None, True

    def extend(self, keys: Tensor, values: Tensor, columns: Tensor, whole: bool) -> None:
        """Add ``keys`` and ``values``; ``columns`` is of all, as is ``whole``."""
        self.update(keys, values)
        self.columns, self.whole = columns, whole

    def crop(self, tokens_to_remove: int) -> None:
        self.length -= min(self.length, abs(tokens_to_remove))
        if self.columns is None or not tokens_to_remove:
            return
        kept = (self.columns >= 0) & (self.columns < self.length)  # (B, N)
        batch, rows = kept.shape[0], Rows.select(kept, kept.sum(dim=1).tolist())
        self.keys, self.values = (
            rows.take(part.transpose(1, 2), batch).transpose(1, 2) for part in (self.keys, self.values)
        )
        self.columns, self.whole = rows.take(self.columns, batch), rows.valid is None
        if rows.valid is not None:
            self.columns = self.columns.masked_fill(~rows.valid, -1)

    def reset(self) -> None:
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._choose(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._choose(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.columns is not None:
            self.columns = self.columns.repeat_interleave(repeats, dim=0)

    def _choose(self, rows: Tensor) -> None:
        if self.columns is not None:
            self.columns = self.columns[rows.to(self.columns.device)]


def branch_layers(cache: Cache, layers: int) -> dict[tuple[int, str, str], BranchLayer]:
    """The memories of branches, which lie behind the model's own ``layers``, by their places."""
    return {layer.place: layer for layer in cache.layers[layers:] if isinstance(layer, BranchLayer)}


class JoinedCache:
    """Stands in for the cache inside one attention call: passive keys and values join the active ones.

    Args:
        cache: the real one.
        keys, values: of the passive rows.
        order: see :class:`~mllm.rows.Split`.
        pieces: where all batch rows look the same, the runs of rows in their order: whether they are passive, and
            their first and last (exclusive) among those.
    """

    def __init__(
        self,
        cache: Cache | None,
        keys: Tensor,
        values: Tensor,
        order: Tensor,
        pieces: tuple[tuple[bool, int, int], ...] | None = None,
    ) -> None:
        self.cache, self.keys, self.values, self.order, self.pieces = cache, keys, values, order, pieces

    def _join(self, passive: Tensor, active: Tensor) -> Tensor:
        if self.pieces is not None:  # one copy instead of two
            return torch.cat([(passive if p else active)[:, :, low:high] for p, low, high in self.pieces], dim=2)
        joined = torch.cat((passive, active), dim=2)  # (B, kv_heads, P + A, head_dim)
        index = self.order[:, None, :, None].expand(-1, joined.shape[1], -1, joined.shape[3])
        return joined.gather(2, index)  # (B, kv_heads, alive, head_dim)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._join(self.keys, keys), self._join(self.values, values)
        if self.cache is None:
            return keys, values
        return self.cache.update(keys, values, *args, **kwargs)


def check_cache_kind(cache: Cache) -> None:
    """Refuse caches whose layers cannot hold different rows."""
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, BranchLayer):
            raise UnsupportedModelError(
                f"The key/value cache has a {type(layer).__name__}; techniques that drop or freeze rows need "
                "transformers' DynamicCache with plain layers. Leave cache_implementation unset."
            )


@dataclass(frozen=True, eq=False)
class Stash:
    """States of rows that have left, kept so that a later call can let them in again.

    Attributes:
        columns: (B, R) long, columns of the whole sequence.
        valid: (B, R) bool, False for fillers.
        states: (B, R, D) residual stream as it was when they left.
        cos, sin: (B, R, head_dim) their rotary tables.
        image: (B, R) long, which image of its row each belongs to.
        layer: (B, R) long, the layer that they were about to enter.
    """

    columns: Tensor
    valid: Tensor
    states: Tensor
    cos: Tensor
    sin: Tensor
    image: Tensor
    layer: Tensor

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in (self.states, self.cos, self.sin))

    def joined(self, other: Stash) -> Stash:
        """The rows of both that are no fillers, this one's first."""
        names = [item.name for item in fields(self)]
        both = {name: torch.cat([getattr(self, name), getattr(other, name)], dim=1) for name in names}
        valid = both.pop("valid")  # (B, R + R')
        rows = Rows.select(valid, valid.sum(dim=1).tolist())
        kept = {name: rows.take(value, valid.shape[0]) for name, value in both.items()}
        return Stash(valid=rows.take(valid, valid.shape[0]), **kept)


def lengths(cache: Cache) -> list[int]:
    """Keys per layer of the cache object."""
    return [layer.get_seq_length() for layer in cache.layers]
