"""Rows in memory of tables that are elsewhere: always the right rows, never more bytes than were counted."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growlm.layers import PEER, row_cache
from growlm.layers.row_cache import CachedPool, RowCache, cache_bytes

N = 40


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N, 6), torch.randn(N, 4, dtype=torch.bfloat16)


def bytes_of(rows: int) -> int:
    return 4 * N + rows * (6 * 4 + 4 * 2 + 16)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(8, N),
    calls=st.lists(st.lists(st.integers(0, N - 1), min_size=1, max_size=8), min_size=1, max_size=12),
)
def test_every_call_finds_its_rows(rows, calls):
    whole = tables()
    cache = RowCache(whole, bytes_of(rows), 8)
    assert cache.capacity == rows
    for call in calls:
        ids = torch.tensor(call)
        with cache.reading(ids) as slots:
            assert all(torch.equal(slab[slots], table[ids]) for slab, table in zip(cache.slabs, whole, strict=True))
        assert cache.num_bytes() == bytes_of(rows)


def test_what_was_read_last_stays():
    cache = RowCache(tables(), bytes_of(4), 2)
    for ids in ([0, 1], [2, 3], [0, 1], [4]):  # 4 takes the place of 2 or 3
        with cache.reading(torch.tensor(ids)):
            pass
    reads = cache.reads
    with cache.reading(torch.tensor([0, 1, 4])):
        pass
    assert (reads, cache.reads) == (5, 5)
    with cache.reading(torch.tensor([2, 3])):
        pass
    assert cache.reads > reads


def test_a_cache_larger_than_its_tables_holds_them_all():
    cache = RowCache(tables(), 1 << 20, 8)
    assert cache.capacity == N
    assert cache.num_bytes() == cache_bytes(tables(), 1 << 20, 8) == bytes_of(N)


def test_too_little_for_one_token_is_refused_with_what_it_takes():
    with pytest.raises(ValueError, match=rf"1,000 bytes; the rows of one token take {bytes_of(32):,}"):
        RowCache(tables(), 1000, 32)


@pytest.mark.parametrize("rows", [8, 20, 64])
def test_a_pool_with_few_rows_in_memory_computes_the_same(rows):
    torch.manual_seed(0)
    pool = PEER(12, 64, num_heads=2, top_k=4).eval()
    hidden = torch.randn(3, 11, 12)
    with torch.no_grad():
        wanted = pool(hidden)
    cached = CachedPool(pool, 4 * 64 + rows * (2 * 12 * 4 + 16))
    assert cached.cache.capacity == rows
    torch.testing.assert_close(cached(hidden), wanted, rtol=1e-6, atol=1e-7)
    assert not any(p.shape[0] == 64 and p.shape[1] == 12 for p in cached.parameters() if p.ndim == 2)


def test_more_rows_at_once_than_fit_are_refused():
    cache = RowCache(tables(), bytes_of(4), 2)
    with pytest.raises(ValueError, match="5 different rows at once, in a cache of 4"), cache.reading(torch.arange(5)):
        pass


def test_rows_are_read_in_parts(monkeypatch):
    monkeypatch.setattr(row_cache, "_AT_ONCE", 60)
    whole = tables()
    cache = RowCache(whole, bytes_of(30), 8)
    for first in (0, 20):
        ids = torch.arange(first, first + 20)
        with cache.reading(ids) as slots:
            assert all(torch.equal(slab[slots], table[ids]) for slab, table in zip(cache.slabs, whole, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    stops=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    calls=st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=4), min_size=2, max_size=8),
)
def test_after_an_interrupt_every_row_is_the_right_one(stops, calls):
    """Wherever it comes while rows are read in."""
    whole = tables()
    cache = RowCache(whole, bytes_of(4), 4)
    parts = ["_row_of", "_read_at", "_slot_of"]
    for n, call in enumerate(calls):
        stop = stops[n % len(stops)]
        if stop < len(parts):
            held = getattr(cache, parts[stop])
            setattr(cache, parts[stop], held.as_subclass(Interrupting))
            with suppress(KeyboardInterrupt), cache.reading(torch.tensor(call)):
                pass
            setattr(cache, parts[stop], held)
        ids = torch.tensor(call)
        with cache.reading(ids) as slots:
            assert all(torch.equal(slab[slots], table[ids]) for slab, table in zip(cache.slabs, whole, strict=True))


class Interrupting(torch.Tensor):
    def __setitem__(self, index, value):
        raise KeyboardInterrupt


def test_it_counts_for_years():
    cache = RowCache(tables(), bytes_of(4), 2)
    cache._now = 2**31 - 2
    for ids in ([0, 1], [2, 3], [1, 4], [0, 5]):
        with cache.reading(torch.tensor(ids)) as slots:
            assert torch.equal(cache.slabs[0][slots], cache._tables[0][ids])


def test_a_pool_that_fits_goes_in_one_part():
    cached = CachedPool(PEER(6, 7, 2, 4).eval(), 1 << 20)  # a token may choose 8, of 7
    calls = []
    reading = cached.cache.reading
    cached.cache.reading = lambda ids: calls.append(ids) or reading(ids)
    cached(torch.randn(5, 6))
    assert len(calls) == 1


def test_no_tokens_from_the_disk():
    pool = PEER(6, N, 2, 4).eval()
    cached = CachedPool(pool, 1 << 20)
    assert cached(torch.zeros(2, 0, 6)).shape == (2, 0, 6)
