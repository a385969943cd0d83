"""Row cache: the rows of large tables that were read last, in memory. The tables may be views of a file on the disk.

Holds a fixed number of rows, allocated once: what is counted as memory is what it takes. Knows tensors; no files.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from growlm.layers.peer import PEER

# N rows of a table, c rows in memory, n tokens, s rows that a token reads, w width of a row

_INDEX = 4  # bytes a row of the tables, for where it is
_SLOT = 16  # bytes a row in memory, for which it is and when it was read
_AT_ONCE = 4 << 20  # bytes of rows on their way from a table to the cache


class RowCache:
    """Rows of tables (N, w_i) that share their ids; the least recently read make room for others.

    Args:
        num_bytes: that it may take, its own bookkeeping included.
        at_once: rows that must fit together.
        device: where the rows are kept.

    Raises:
        ValueError: fewer than `at_once` rows fit.
    """

    def __init__(
        self, tables: Sequence[Tensor], num_bytes: int, at_once: int, device: torch.device | str = "cpu"
    ) -> None:
        self._tables = tuple(tables)
        self.capacity = rows_within(tables, num_bytes, at_once)
        self.num_rows = n = len(tables[0])
        self.slabs = tuple(torch.empty(self.capacity, t.shape[1], dtype=t.dtype, device=device) for t in tables)
        self._slot_of = torch.full((n,), -1, dtype=torch.int32)
        self._row_of = torch.full((self.capacity,), -1, dtype=torch.int64)
        self._read_at = torch.zeros(self.capacity, dtype=torch.int64)
        self._now = 0
        self._lock = threading.Lock()
        self.reads = 0  # of rows, from the tables

    def num_bytes(self) -> int:
        held = (*self.slabs, self._slot_of, self._row_of, self._read_at)
        return sum(t.numel() * t.element_size() for t in held)

    @contextmanager
    def reading(self, ids: Tensor) -> Iterator[Tensor]:
        """Where rows `ids` (any shape) lie in the slabs, as long as the block lasts; at most `capacity` different ones.

        One thread at a time.

        Raises:
            ValueError: there are more.
        """
        with self._lock:
            yield self._slots(ids.cpu()).to(ids.device)

    def _slots(self, ids: Tensor) -> Tensor:
        self._now += 1
        slots = self._slot_of[ids]
        found = slots >= 0
        held = slots[found].long()
        self._read_at[held] = self._now
        missing = ids[~found].unique()
        self.reads += len(missing)
        if len(missing):
            wanted = len(missing) + len(held.unique())
            if wanted > self.capacity:
                raise ValueError(f"{wanted} different rows at once, in a cache of {self.capacity}")
            # What was never filled was read at 0, what this call needs was read now.
            free = self._read_at.topk(len(missing), largest=False).indices
            before = self._row_of[free]
            self._slot_of[before[before >= 0]] = -1
            # Whatever stops this in between: a row is found only once it is there.
            self._row_of[free] = missing
            for slab, table in zip(self.slabs, self._tables, strict=True):
                count = max(_AT_ONCE // (table.shape[1] * table.element_size()), 1)
                for to, rows in zip(free.split(count), missing.split(count), strict=True):
                    slab.index_copy_(0, to.to(slab.device), table.index_select(0, rows).to(slab.device))
            self._read_at[free] = self._now
            self._slot_of[missing] = free.int()
            slots = self._slot_of[ids]
        return slots.long()


def rows_within(tables: Sequence[Tensor], num_bytes: int, at_once: int) -> int:
    """Rows that a cache of so many bytes holds: all of them at the most.

    Raises:
        ValueError: fewer than `at_once`; says how many bytes those take.
    """
    n = len(tables[0])
    row = sum(t.shape[1] * t.element_size() for t in tables) + _SLOT
    fit = min((num_bytes - n * _INDEX) // row, n)
    if fit < min(at_once, n):
        needed = n * _INDEX + min(at_once, n) * row
        raise ValueError(f"a row cache of {num_bytes:,} bytes; the rows of one token take {needed:,}")
    return fit


def cache_bytes(tables: Sequence[Tensor], num_bytes: int, at_once: int) -> int:
    """Bytes that a cache made with these arguments takes. (Tables on the meta device will do.)"""
    row = sum(t.shape[1] * t.element_size() for t in tables) + _SLOT
    return len(tables[0]) * _INDEX + rows_within(tables, num_bytes, at_once) * row


class CachedPool(nn.Module):
    """A pool of experts whose tables stay where they are, with the rows read last in memory. For serving: it has no
    gradient.

    Args:
        pool: gives up its tables.
        num_bytes: for rows in memory.

    Raises:
        ValueError: the rows of one token do not fit.
    """

    def __init__(self, pool: PEER, num_bytes: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self._per_token = pool.keys.num_heads * pool.keys.top_k
        self.cache = RowCache((pool.up.data, pool.down.data), num_bytes, self._per_token, device)
        del pool.up, pool.down
        self.pool = pool

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., d). Tokens go in parts whose rows fit together."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        found = self.pool.retrieve(tokens)
        up, down = self.cache.slabs
        all_fit = self.cache.capacity == self.cache.num_rows
        size = max(len(tokens) if all_fit else self.cache.capacity // self._per_token, 1)
        parts = []
        for at in range(0, len(tokens), size):
            part = slice(at, at + size)
            with self.cache.reading(found.experts[part]) as slots:
                parts.append(self.pool.combine(tokens[part], up, down, slots, found.gates[part]))
        return torch.cat([tokens[:0], *parts]).view(hidden.shape).to(hidden.dtype)
