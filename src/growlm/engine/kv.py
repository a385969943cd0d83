"""Keys and values of a batch, and those of finished texts kept for their continuation.

A cache belongs to one module set: the set's digest is part of every key, and a continuation under another set never
sees it (guarantee 4). Knows tensors and token ids; runs no layer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# b batch, h heads, t tokens, d head width

_SPARE = 64  # tokens of room beyond what is needed now


class _Slot:
    """Keys and values of one layer, (b, h, t, d) each, in buffers with room to grow."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.length = 0

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + keys.shape[2]
        if self.keys is None or self.values is None or self.keys.shape[2] < self.length:
            self.keys = _grown(self.keys, keys, start, self.length)
            self.values = _grown(self.values, values, start, self.length)
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        if start == 0:
            return keys, values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def select(self, rows: Tensor) -> _Slot:
        chosen = _Slot()
        if self.keys is not None and self.values is not None:
            chosen.keys, chosen.values = self.keys[rows], self.values[rows]
        chosen.length = self.length
        return chosen


def _grown(old: Tensor | None, new: Tensor, start: int, length: int) -> Tensor:
    room = length + max(_SPARE, length // 2)
    grown = new.new_empty(new.shape[0], new.shape[1], room, new.shape[3])
    if old is not None:
        grown[:, :, :start] = old[:, :, :start]
    return grown


class KVCache:
    """Keys and values of a batch, one slot a layer. Attention calls `update`, by its `layer_idx`."""

    def __init__(self, slots: int) -> None:
        self._slots = [_Slot() for _ in range(slots)]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        return self._slots[layer_idx].update(keys, values)

    def select(self, rows: Tensor | None, start: int = 0, stop: int | None = None) -> KVCache:
        """Slots `start` to `stop` with these rows of the batch, copied; the slots outside are empty.

        With `rows` None the slots are this cache's own, not copies.
        """
        stop = len(self._slots) if stop is None else stop
        chosen = KVCache(len(self._slots))
        chosen._slots[start:stop] = [s if rows is None else s.select(rows) for s in self._slots[start:stop]]
        return chosen

    def extended(self, slots: int) -> KVCache:
        """The same slots and empty ones behind them, `slots` in all."""
        cache = KVCache(max(slots - len(self._slots), 0))
        cache._slots = [*self._slots, *cache._slots]
        return cache

    def joined(self, other: KVCache, fork: int) -> KVCache:
        """This cache's slots below `fork`, the other's from there on."""
        cache = KVCache(0)
        cache._slots = self._slots[:fork] + other._slots[fork:]
        return cache

    def length(self, slot: int) -> int:
        return self._slots[slot].length

    def num_bytes(self) -> int:
        tensors = [t for s in self._slots for t in (s.keys, s.values) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass
class Prefix:
    """What is kept of one finished text: its tokens, and their keys and values under one module set."""

    digest: str
    tokens: tuple[int, ...]
    cache: KVCache


class PrefixCache:
    """Finished texts, for the next turn of a conversation; bounded in bytes, least recently used goes first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[tuple[str, tuple[int, ...]], Prefix] = OrderedDict()

    def put(self, digest: str, tokens: Sequence[int], cache: KVCache) -> None:
        key = (digest, tuple(tokens))
        self._entries[key] = Prefix(digest, key[1], cache)
        self._entries.move_to_end(key)
        while sum(e.cache.num_bytes() for e in self._entries.values()) > self._limit:
            self._entries.popitem(last=False)

    def take(self, digest: str, tokens: Sequence[int]) -> Prefix | None:
        """The longest text kept under module set `digest` that `tokens` continues by at least one token. It leaves the
        cache: who continues it writes into it."""
        wanted = tuple(tokens)
        fits = [k for k in self._entries if k[0] == digest and len(k[1]) < len(wanted) and wanted[: len(k[1])] == k[1]]
        return self._entries.pop(max(fits, key=lambda k: len(k[1]))) if fits else None

    def clear(self) -> None:
        self._entries.clear()
