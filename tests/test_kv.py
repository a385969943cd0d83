"""Prefixes: what texts have in common at their beginning, and nothing of anyone else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growlm.base.rooms import Rooms, TextCache
from growlm.engine.kv import BASE, BLOCK, PrefixCache

WIDTH = 4


def value(owner: str, salt: str, tokens: list[int], at: int, slot: int) -> float:
    """What stands for the keys of a token: it depends on all tokens before it, and on whose it is."""
    return float(hash((owner, salt, tuple(tokens[: at + 1]), slot)) % 10**6)


def read(owner: str, salt: str, tokens: list[int], slots: range) -> TextCache:
    cache = Rooms().new()
    cache.reserve(len(tokens))
    for slot in slots:
        each = [value(owner, salt, tokens, at, slot) for at in range(len(tokens))]
        keys = torch.tensor(each)[None, None, :, None].expand(1, 1, len(tokens), WIDTH)
        cache.update(slot, keys, -keys)
    return cache


def states_of(tokens: list[int], layer: int) -> torch.Tensor:
    return torch.tensor([[[value(BASE, "", tokens, at, layer)] for at in range(len(tokens))]])


TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(
    lambda parts: [*[token for part in parts for token in [part] * BLOCK][:-3], 7]
)


@given(
    steps=st.lists(
        st.tuples(
            st.booleans(), st.sampled_from([BASE, "a", "b"]), st.sampled_from(["", "x"]), TEXTS, st.integers(1, 3)
        ),
        max_size=40,
    ),
    blocks=st.integers(0, 12),
)
@settings(max_examples=150, deadline=None)
def test_what_is_found_is_what_reading_would_give(steps, blocks):
    limit = blocks * BLOCK * WIDTH * 2 * 4
    prefixes = PrefixCache(lambda: limit)
    known: set[tuple[str, str, tuple[int, ...], int]] = set()
    for puts, owner, salt, tokens, depth in steps:
        if puts:
            prefixes.put(owner, tokens, read(owner, salt, tokens, range(depth)), range(depth), salt=salt)
            for end in range(BLOCK, len(tokens) + 1, BLOCK):
                known |= {(owner, salt, tuple(tokens[:end]), slot) for slot in range(depth)}
        else:
            found = prefixes.find(owner, tokens, range(depth), salt=salt)
            assert found.tokens % BLOCK == 0
            assert found.tokens < len(tokens)
            assert not found.tokens or {(owner, salt, tuple(tokens[: found.tokens]), s) for s in range(depth)} <= known
            whole, filled = read(owner, salt, tokens, range(depth)), Rooms().new()
            filled.reserve(len(tokens))
            found.fill(filled, range(depth))
            for slot in range(depth) if found.tokens else ():
                for own, expected in zip(filled.of(slot), whole.of(slot), strict=True):
                    assert torch.equal(own, expected[:, :, : found.tokens])
        assert prefixes.num_bytes() <= limit
    prefixes.clear()
    assert prefixes.num_bytes() == 0


def test_a_beginning_that_two_texts_share_is_held_once():
    prefixes = PrefixCache(lambda: 10**9)
    common, one, other = [1] * (2 * BLOCK), [2] * BLOCK, [3] * BLOCK
    prefixes.put("a", common + one, read("a", "", common + one, range(2)), range(2))
    before = prefixes.num_bytes()
    prefixes.put("a", common + other, read("a", "", common + other, range(2)), range(2))
    assert prefixes.num_bytes() == before * 4 / 3
    assert prefixes.find("a", [*common, *other, 9], range(2)).tokens == 3 * BLOCK


def test_layers_and_states_that_come_later_are_added():
    prefixes, tokens = PrefixCache(lambda: 10**9), [5] * BLOCK + [6]
    prefixes.put(BASE, tokens, read(BASE, "", tokens, range(2)), range(2), {2: states_of(tokens, 2)})
    assert prefixes.find(BASE, tokens, range(3), [2]).tokens == 0
    prefixes.put(BASE, tokens, read(BASE, "", tokens, range(4)), range(4), {4: states_of(tokens, 4)})
    found = prefixes.find(BASE, tokens, range(4), [2, 4])
    assert found.tokens == BLOCK
    for layer in (2, 4):
        assert torch.equal(found.states(layer), states_of(tokens, layer)[:, :BLOCK])


def test_the_last_token_is_always_read():
    """Something has to say what comes next."""
    prefixes, tokens = PrefixCache(lambda: 10**9), [5] * (2 * BLOCK)
    prefixes.put("a", tokens, read("a", "", tokens, range(1)), range(1))
    assert prefixes.find("a", tokens, range(1)).tokens == BLOCK
    assert prefixes.find("a", [*tokens, 1], range(1)).tokens == 2 * BLOCK


def test_the_end_of_a_text_goes_before_its_beginning():
    limit = 3 * BLOCK * WIDTH * 2 * 4
    prefixes = PrefixCache(lambda: limit)
    long, short = [1] * (3 * BLOCK), [2] * BLOCK
    prefixes.put("a", long, read("a", "", long, range(1)), range(1))
    prefixes.put("a", short, read("a", "", short, range(1)), range(1))
    assert prefixes.find("a", [*long, 9], range(1)).tokens == 2 * BLOCK
    assert prefixes.find("a", [*short, 9], range(1)).tokens == BLOCK


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_it_shrinks_when_others_need_the_room(blocks):
    limit = 10**9
    prefixes, tokens = PrefixCache(lambda: limit), [1] * (3 * BLOCK)
    prefixes.put("a", tokens, read("a", "", tokens, range(1)), range(1))
    limit = blocks * BLOCK * WIDTH * 2 * 4
    prefixes.shrink()
    assert prefixes.num_bytes() == limit
    assert prefixes.find("a", [*tokens, 9], range(1)).tokens == blocks * BLOCK


def test_what_is_kept_is_a_copy():
    prefixes, tokens = PrefixCache(lambda: 10**9), [1] * BLOCK
    cache = read("a", "", tokens, range(1))
    prefixes.put("a", tokens, cache, range(1))
    cache.free()
    other = cache._rooms.new()
    other.reserve(BLOCK)
    other.update(0, torch.full((1, 1, BLOCK, WIDTH), 77.0), torch.full((1, 1, BLOCK, WIDTH), 77.0))
    filled = Rooms().new()
    filled.reserve(BLOCK)
    prefixes.find("a", [*tokens, 2], range(1)).fill(filled, range(1))
    assert torch.equal(filled.of(0)[0], read("a", "", tokens, range(1)).of(0)[0])
