"""Segments: a pass over new tokens of several texts computes what each text's own pass computes, in every family."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growlm.base import Base
from growlm.base.cache import KVCache
from growlm.base.rooms import Rooms, TextCache
from growlm.base.segments import Segment
from tiny import FAMILIES, make_base, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")

BASES: dict[str, Base] = {}


def base_of(family: str) -> Base:
    if family not in BASES:
        BASES[family] = make_base(family)
    return BASES[family]


def alone(base: Base, ids: torch.Tensor, past: int, cache: KVCache) -> torch.Tensor:
    """States (1, n, d) of a text's new tokens after `past` others, in a pass of its own."""
    hidden, shared = base.begin(ids, past=past, cache=cache)
    return base.run(base.embed_positions(hidden, shared.positions), base.layers_to_run(), shared)


def together(base: Base, news: list[torch.Tensor], pasts: list[int], caches: list[TextCache]) -> list[torch.Tensor]:
    for ids, past, cache in zip(news, pasts, caches, strict=True):
        cache.reserve(past + ids.shape[1])
    segments = [Segment(ids.shape[1], past, cache) for ids, past, cache in zip(news, pasts, caches, strict=True)]
    hidden = base.embedding(torch.cat(news, dim=1))
    shared = base.pass_of_segments(hidden, segments)
    hidden = base.run(base.embed_positions(hidden, shared.positions), base.layers_to_run(), shared)
    return list(hidden.split([s.tokens for s in segments], dim=1))


@torch.no_grad()
def check(base: Base, pieces: list[list[int]]) -> None:
    """Each text's tokens in pieces of these sizes, all texts' first pieces in one pass, then their second ones."""
    texts = [random_ids(1, sum(sizes), seed=number) for number, sizes in enumerate(pieces)]
    rooms = Rooms()
    caches, own = [rooms.new() for _ in pieces], [KVCache(base.num_layers) for _ in pieces]
    for turn in range(max(map(len, pieces))):
        now = [number for number, sizes in enumerate(pieces) if turn < len(sizes)]
        pasts = [sum(pieces[number][:turn]) for number in now]
        news = [texts[n][:, past : past + pieces[n][turn]] for n, past in zip(now, pasts, strict=True)]
        found = together(base, news, pasts, [caches[n] for n in now])
        for number, past, ids, states in zip(now, pasts, news, found, strict=True):
            torch.testing.assert_close(states, alone(base, ids, past, own[number]), rtol=1e-4, atol=1e-5)
    for cache, expected in zip(caches, own, strict=True):
        for slot, other in enumerate(expected.layers):
            keys, values = cache.of(slot)
            torch.testing.assert_close(keys, other.keys, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(values, other.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_in_one_pass_are_read_as_each_alone(family):
    # Windows of 12: some texts are within it, some pass it, in the middle of a piece and with a single token.
    check(base_of(family), [[5, 1, 1, 9], [17, 1, 1], [1, 1], [3, 20, 1, 1], [12, 1]])


@pytest.mark.parametrize("family", ["llama", "growlm"])
@given(pieces=st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=4), min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
def test_any_texts_in_any_pieces_are_read_as_each_alone(family, pieces):
    check(base_of(family), pieces)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_whose_segments_were_told_apart_computes_what_it_did(family):
    base, ids = make_base(family), random_ids(2, 15)
    with torch.no_grad():
        before, model_before = base.logits(ids), base.model(ids).logits
        together(base, [ids[:1]], [0], [Rooms().new()])
        assert torch.equal(base.logits(ids), before)
        assert torch.equal(base.model(ids).logits, model_before)
