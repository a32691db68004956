"""Keys and values of pictures, kept for the next question about the same picture.

Where visual rows attend to nothing but themselves, their keys and values depend on the picture and its position alone.
They are found again by a hash of what entered the decoder for the picture, and of its rotary tables.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mllm.rows import Rows


@dataclass(eq=False)
class Entry:
    """One picture: per layer its keys and values, (kv_heads, T, head_dim) each; layers that never ran are missing."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers.values())


class ImageCache:
    """The pictures used last, up to a number of them.

    Args:
        size: pictures that are kept at most.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.hits = self.misses = 0
        self._weights: Hashable = None
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values that are kept."""
        return sum(entry.nbytes for entry in self._entries.values())

    def clear(self) -> None:
        """Forget all pictures."""
        self._entries.clear()

    def belong_to(self, weights: Hashable) -> None:
        """Forget all pictures that were read with other weights."""
        if weights != self._weights:
            self.clear()
            self._weights = weights

    def get(self, key: bytes) -> Entry | None:
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return entry

    def put(self, key: bytes, entry: Entry) -> None:
        self._entries[key] = entry
        self._entries.move_to_end(key)
        while len(self._entries) > self.size:
            self._entries.popitem(last=False)


Compute = Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor, Tensor]]


class Reuse:
    """Which pictures of one call are known, and which passive rows must be computed.

    Args:
        cache: where pictures are kept.
        rows: the call's passive rows, (B, P).
        states: (B, P, D) what enters layer 0.
        rotary: (B, P, head_dim) cosines and sines.
        image: (B, P) long, number of the picture within its batch row.
    """

    def __init__(
        self, cache: ImageCache, rows: Rows, states: Tensor, rotary: tuple[Tensor, Tensor], image: Tensor
    ) -> None:
        self.cache = cache
        self.batch, self.width = states.shape[:2]
        self.new: list[tuple[bytes, Entry, int, int]] = []  # key, entry, flat start and stop
        self.known: list[tuple[Entry, int, int]] = []
        cos, sin = (table.expand(self.batch, -1, -1) for table in rotary)
        valid = torch.ones_like(image, dtype=torch.bool) if rows.valid is None else rows.valid
        numbers = image.masked_fill(~valid, -1).tolist()
        missing = torch.zeros(self.batch * self.width, dtype=torch.bool)
        for row, images in enumerate(numbers):
            start = 0
            for stop in range(1, self.width + 1):
                if stop < self.width and images[stop] == images[start]:
                    continue
                if images[start] >= 0:
                    self._find(row, start, stop, (states, cos, sin), missing)
                start = stop
        # (M,) flat numbers of the rows to compute; None: all of them
        self.missing = None if not self.known else missing.nonzero()[:, 0].to(states.device)
        self.covered = sum(stop - start for _, start, stop in self.known) == missing.numel()

    def _find(self, row: int, start: int, stop: int, parts: tuple[Tensor, ...], missing: Tensor) -> None:
        digest = hashlib.sha256()  # processors have instructions for it
        for part in parts:
            digest.update(part[row, start:stop].detach().contiguous().view(torch.uint8).cpu().numpy())
        key, flat = digest.digest(), row * self.width
        entry = self.cache.get(key)
        if entry is not None:
            self.known.append((entry, flat + start, flat + stop))
            return
        self.new.append((key, Entry(), flat + start, flat + stop))
        missing[flat + start : flat + stop] = True

    @property
    def computed(self) -> int:
        """Rows that are computed."""
        return self.batch * self.width if self.missing is None else self.missing.shape[0]

    def serve(
        self, layer: int, states: Tensor, rotary: tuple[Tensor, Tensor], compute: Compute
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values, (B, kv_heads, P, head_dim) each, and the rows' next states, (B, P, D), of one layer.

        States of known pictures stay as they were: nothing reads them again.
        """
        if self.covered:  # nothing to compute, nothing to fill up
            held = (torch.cat([entry.layers[layer][n] for entry, _, _ in self.known], dim=1) for n in (0, 1))
            keys, values = (part.unflatten(1, (self.batch, self.width)).transpose(0, 1) for part in held)
            return keys, values, states
        if self.missing is None:
            keys, values, states = compute(states, rotary)
        elif self.computed:
            flat = states.flatten(0, 1)  # (B * P, D)
            tables = tuple(t.expand(self.batch, -1, -1).flatten(0, 1)[self.missing][None] for t in rotary)
            some_keys, some_values, some = compute(flat[self.missing][None], tables)  # (1, kv_heads, M, head_dim)
            states = flat.index_copy(0, self.missing, some[0]).view_as(states)
            keys, values = (self._spread(part) for part in (some_keys, some_values))
        else:
            keys, values = (self._empty(*self.known[0][0].layers[layer][n].shape[::2], states) for n in (0, 1))
        flat_keys, flat_values = keys.transpose(1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1)
        for entry, start, stop in self.known:  # (T, kv_heads, head_dim)
            flat_keys[start:stop] = entry.layers[layer][0].transpose(0, 1)
            flat_values[start:stop] = entry.layers[layer][1].transpose(0, 1)
        shape = (self.batch, self.width)
        if self.known:
            keys = flat_keys.unflatten(0, shape).transpose(1, 2)
            values = flat_values.unflatten(0, shape).transpose(1, 2)
        for _, entry, start, stop in self.new:
            entry.layers[layer] = (
                flat_keys[start:stop].transpose(0, 1).detach().clone(),
                flat_values[start:stop].transpose(0, 1).detach().clone(),
            )
        return keys, values, states

    def _empty(self, heads: int, head_dim: int, like: Tensor) -> Tensor:
        return like.new_zeros(self.batch, heads, self.width, head_dim)

    def _spread(self, some: Tensor) -> Tensor:
        """(B, kv_heads, P, head_dim) with the computed rows, (1, kv_heads, M, head_dim), at their places."""
        flat = some.new_zeros(self.batch * self.width, some.shape[1], some.shape[3])
        flat[self.missing] = some[0].transpose(0, 1)
        return flat.unflatten(0, (self.batch, self.width)).transpose(1, 2)

    def finish(self) -> None:
        """Keep the new pictures, once all layers have run."""
        for key, entry, _, _ in self.new:
            self.cache.put(key, entry)
