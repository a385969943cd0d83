"""Rows in memory of tables that are elsewhere: always the right rows, never more bytes than were counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growlm.layers import PEER
from growlm.layers.row_cache import CachedPool, RowCache, cache_bytes

N = 40


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N, 6), torch.randn(N, 4, dtype=torch.bfloat16)


def bytes_of(rows: int) -> int:
    return 4 * N + rows * (6 * 4 + 4 * 2 + 12)


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
    cached = CachedPool(pool, 4 * 64 + rows * (2 * 12 * 4 + 12))
    assert cached.cache.capacity == rows
    torch.testing.assert_close(cached(hidden), wanted, rtol=1e-6, atol=1e-7)
    assert not any(p.shape[0] == 64 and p.shape[1] == 12 for p in cached.parameters() if p.ndim == 2)


def test_more_rows_at_once_than_fit_are_refused():
    cache = RowCache(tables(), bytes_of(4), 2)
    with pytest.raises(ValueError, match="5 different rows at once, in a cache of 4"), cache.reading(torch.arange(5)):
        pass


def test_no_tokens_from_the_disk():
    pool = PEER(6, N, 2, 4).eval()
    cached = CachedPool(pool, 1 << 20)
    assert cached(torch.zeros(2, 0, 6)).shape == (2, 0, 6)
