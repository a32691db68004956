"""Which tokens of a call exist in a layer, and which of them run it: gathers and their inverses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def key_order(alive: Rows, active: Rows, passive: Rows, width: int) -> Tensor:
    """(B, alive) position of each alive row in the concatenation [passive | active]."""
    batch, device = active.index.shape[0], active.index.device
    place = torch.zeros(batch, width + 1, dtype=torch.long, device=device)  # (B, S + 1), the last column is a bin
    for rows, offset in ((passive, 0), (active, passive.length)):
        index = rows.index if rows.valid is None else rows.index.masked_fill(~rows.valid, width)
        place.scatter_(1, index, (torch.arange(rows.length, device=device) + offset).expand(batch, -1))
    return place[:, :width] if alive.index is None else place.gather(1, alive.index)
