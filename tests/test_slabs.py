"""Slabs: differences of several owners in one product are those that each owner's own products make."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from growlm.layers import slabs as module
from growlm.layers.slabs import Slabs

NUM_IN, NUM_OUT = 12, 10


def difference(owner: int, rank: int, parts: int = 1):
    """What this owner has of a matrix, in so many parts."""
    draw = torch.Generator().manual_seed(owner)
    return [
        (
            torch.randn(rank, NUM_IN, generator=draw),
            torch.randn(NUM_OUT, rank, generator=draw),
            0.5 + owner + part,
        )
        for part in range(parts)
    ]


def one_by_one(hidden, plain, each, ends):
    out, start = plain.clone(), 0
    for end, own in zip(ends, each, strict=True):
        for a, b, counts in own or ():
            out[:, start:end] += counts * hidden[:, start:end] @ a.t() @ b.t()
        start = end
    return out


def run(slabs: Slabs, matrix: nn.Linear, owners: dict[int, int], each) -> torch.Tensor | None:
    """A pass of owners with so many tokens each, held against each one's own products."""
    names, counts = list(owners), list(owners.values())
    ends = torch.tensor(counts).cumsum(0).tolist()
    slabs.look()
    slabs.begin([f"owner {name}" for name in names], ends)
    hidden = torch.randn(1, ends[-1], NUM_IN)
    plain = matrix(hidden).detach()
    found = slabs.added(matrix, hidden, plain, each)
    if found is not None:
        torch.testing.assert_close(found, one_by_one(hidden, plain, each, ends), rtol=1e-4, atol=1e-4)
    return found


PASSES = st.lists(st.dictionaries(st.integers(0, 7), st.integers(1, 5), min_size=2, max_size=4), min_size=1, max_size=8)


@given(passes=PASSES, without=st.sets(st.integers(0, 7), max_size=3), matrices=st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_whoever_comes_and_goes_each_gets_his_own(passes, without, matrices):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_OWNERS", 4)  # so that slots change hands
        slabs, layers = Slabs(), [nn.Linear(NUM_IN, NUM_OUT, bias=False) for _ in range(matrices)]
        for owners in passes:
            for number, matrix in enumerate(layers):
                has = [owner not in without or (owner + number) % 2 == 0 for owner in owners]
                each = [
                    difference(owner, (1 + owner % 3) * (1 + number), 1 + owner % 2) if one else None
                    for owner, one in zip(owners, has, strict=True)
                ]
                assert (run(slabs, matrix, owners, each) is not None) == (sum(has) > 1)


def test_one_owner_or_too_many_or_too_many_tokens_are_left_to_others():
    slabs, matrix = Slabs(), nn.Linear(NUM_IN, NUM_OUT)
    assert run(slabs, matrix, {0: 3}, [difference(0, 2)]) is None
    many = dict.fromkeys(range(module.MOST_OWNERS + 1), 1)
    assert run(slabs, matrix, many, [difference(owner, 2) for owner in many]) is None
    long = {0: 1, 1: module.MOST_TOKENS}
    assert run(slabs, matrix, long, [difference(owner, 2) for owner in long]) is None
    assert slabs.num_bytes() == 0


def test_they_keep_to_their_room_and_give_it_back():
    room = 10**6
    slabs, matrix, owners = Slabs(lambda: room), nn.Linear(NUM_IN, NUM_OUT), {0: 1, 1: 1}
    each = [difference(owner, 2) for owner in owners]
    assert run(slabs, matrix, owners, each) is not None
    assert slabs.num_bytes() == 2 * 2 * (NUM_IN + NUM_OUT) * 4
    slabs.shrink()
    assert slabs.num_bytes()
    room = slabs.num_bytes() - 1
    slabs.shrink()
    assert slabs.num_bytes() == 0
    assert run(slabs, matrix, owners, each) is None
    room += 1
    assert run(slabs, matrix, owners, each) is not None
    slabs.clear()
    assert slabs.num_bytes() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_stay_with_their_owner(bad):
    slabs, matrix = Slabs(), nn.Linear(NUM_IN, NUM_OUT)
    broken = difference(2, 2)
    broken[0][1][3, 1] = bad
    assert run(slabs, matrix, {0: 1, 2: 1}, [difference(0, 2), broken]) is None
    assert run(slabs, matrix, {0: 1, 1: 2}, [difference(0, 2), difference(1, 2)]) is not None


def test_what_counts_too_much_for_its_numbers_stays_with_its_owner():
    slabs, matrix = Slabs(), nn.Linear(NUM_IN, NUM_OUT).half()
    large = [(a.half(), b.half() * 0 + 40000, 2.0) for a, b, _ in difference(1, 2)]
    slabs.begin(["owner 0", "owner 1"], [1, 2])
    hidden, plain = torch.ones(1, 2, NUM_IN).half(), torch.zeros(1, 2, NUM_OUT).half()
    small = [(a.half(), b.half(), counts) for a, b, counts in difference(0, 2)]
    assert slabs.added(matrix, hidden, plain, [small, large]) is None


def test_what_is_too_large_in_anothers_slot_spoils_no_other():
    """For the first owner's token, the second one's A comes to no number."""
    slabs, matrix = Slabs(), nn.Linear(NUM_IN, NUM_OUT, bias=False)
    each = [difference(0, 2), [(a * 1e30, b, counts) for a, b, counts in difference(1, 2)]]
    slabs.begin(["owner 0", "owner 1"], [1, 2])
    hidden, plain = torch.randn(1, 2, NUM_IN), torch.zeros(1, 2, NUM_OUT)
    hidden[0, 0] = 1e20
    hidden[0, 1] = 1e-20
    found = slabs.added(matrix, hidden, plain, each)
    assert found is not None
    torch.testing.assert_close(found[:, :1], one_by_one(hidden, plain, each, [1, 2])[:, :1], rtol=1e-4, atol=1e-4)


def test_matrices_of_other_ranks_have_masks_of_their_own():
    """Three slots of rank 4 and two of rank 6 have as many columns."""
    slabs, query, value = Slabs(), nn.Linear(NUM_IN, NUM_OUT), nn.Linear(NUM_IN, NUM_OUT)
    assert run(slabs, query, {0: 1, 1: 1, 2: 1}, [difference(owner, 4) for owner in range(3)]) is not None
    for _ in range(2):
        assert run(slabs, query, {0: 2, 1: 1}, [difference(owner, 4) for owner in range(2)]) is not None
        assert run(slabs, value, {0: 2, 1: 1}, [difference(owner, 6) for owner in range(2)]) is not None


def test_they_may_be_cleared_by_another_thread_at_any_time():
    slabs, over = Slabs(lambda: 10**9), threading.Event()
    matrices = [nn.Linear(NUM_IN, NUM_OUT) for _ in range(3)]

    def clear() -> None:
        while not over.is_set():
            slabs.clear()
            slabs.shrink()

    other = threading.Thread(target=clear)
    other.start()
    try:
        for number in range(150):
            owners = {number % 3: 1, 3 + number % 2: 2}
            for matrix in matrices:
                run(slabs, matrix, owners, [difference(owner, 2) for owner in owners])
    finally:
        over.set()
        other.join()
