"""Rooms: whatever texts come, grow, leave or are copied, each has its own keys and values; and thin products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from growlm.base.rooms import Rooms, TextCache
from growlm.layers import thin
from growlm.layers.thin import ThinLinear, allow_thin_products, thin_products

SLOTS = 2


class Known:
    """A text and what its keys should be: one number a token and slot."""

    def __init__(self, cache: TextCache, tokens: int = 0) -> None:
        self.cache, self.tokens = cache, [list(range(tokens)) for _ in range(SLOTS)]

    def grow(self, count: int, mark: int) -> None:
        self.cache.reserve(len(self.tokens[0]) + count)
        for slot in range(SLOTS):
            new = [1000 * mark + n for n in range(count)]
            states = torch.tensor(new, dtype=torch.float32)[None, None, :, None].expand(1, 2, -1, 3)
            self.cache.update(slot, states + slot, -states)
            self.tokens[slot] += new

    def check(self) -> None:
        for slot in range(SLOTS):
            keys, values = self.cache.of(slot)
            wanted = torch.tensor(self.tokens[slot], dtype=torch.float32)
            assert keys.shape == (1, 2, len(wanted), 3)
            assert bool((keys == wanted[None, None, :, None] + slot).all())
            assert bool((values == -wanted[None, None, :, None]).all())


@given(
    steps=st.lists(st.tuples(st.sampled_from("ngggglc"), st.integers(0, 9), st.integers(1, 200)), max_size=40),
)
@settings(max_examples=100, deadline=None)
def test_each_text_keeps_its_own(steps):
    rooms, texts = Rooms(), []
    for mark, (what, which, count) in enumerate(steps, start=1):
        if what == "n" or not texts:
            texts.append(Known(rooms.new()))
            texts[-1].grow(count, mark)
        text = texts[which % len(texts)]
        if what == "g":
            text.grow(count, mark)
        elif what == "l":
            text.cache.free()
            texts.remove(text)
        elif what == "c":
            copied = Known(text.cache.copy())
            copied.tokens = [list(tokens) for tokens in text.tokens]
            texts.append(copied)
        for known in texts:
            known.check()
    least = sum(8 * SLOTS * 2 * 3 * len(text.tokens[0]) for text in texts)
    assert rooms.num_bytes() >= least
    for text in texts:
        text.cache.free()
    assert rooms.num_bytes() == 0


def test_memory_is_given_back_as_texts_leave():
    rooms = Rooms()
    texts = [Known(rooms.new()) for _ in range(64)]
    for number, text in enumerate(texts):
        text.grow(100, number)
    most = rooms.num_bytes()
    for text in texts[4:]:
        text.cache.free()
    assert rooms.num_bytes() <= most / 8
    for text in texts[:4]:
        text.check()


@given(
    lengths=st.lists(st.tuples(st.integers(1, 300), st.integers(1, SLOTS)), min_size=1, max_size=40),
    draws=st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_rooms_never_take_more_than_was_said(lengths, draws):
    """Of texts that come and go, each of which has reserved all that it comes to, in more or fewer slots."""
    rooms, held = Rooms(), []
    token = 2 * 2 * 4 * torch.float32.itemsize  # keys and values of two heads of width 4
    for tokens, slots in lengths:
        cache = rooms.new()
        cache.reserve(tokens)
        held.append(((tokens, slots), cache))
        for slot in range(slots):
            states = torch.zeros(1, 2, draws.randint(1, tokens), 4)
            cache.update(slot, states, states)
        while held and draws.random() < 0.4:
            held.pop(draws.randrange(len(held)))[1].free()
        assert rooms.num_bytes() <= Rooms.bytes_for([text for text, _ in held], [token] * SLOTS)
    for _, cache in held:
        cache.free()
    assert rooms.num_bytes() == 0


def test_slots_that_no_text_uses_are_given_back():
    rooms = Rooms()
    deep, shallow = rooms.new(), rooms.new()
    states = torch.zeros(1, 2, 5, 4)
    for cache, slots in ((deep, 4), (shallow, 1)):
        cache.reserve(5)
        for slot in range(slots):
            cache.update(slot, states, states)
    deep.free()
    assert rooms.num_bytes() == Rooms.bytes_for([(5, 1)], [2 * 2 * 4 * 4])


def test_slots_beyond_the_known_ones_count_as_the_largest():
    assert Rooms.bytes_for([(100, 5)], [1, 3]) == 128 * (1 + 3 + 3 * 3)


def test_slots_that_are_cut_are_read_again_from_the_beginning():
    rooms = Rooms()
    text = Known(rooms.new())
    text.grow(5, 1)
    text.cache.cut(1)
    assert [text.cache.length(slot) for slot in range(SLOTS)] == [5, 0]


def test_a_text_that_finds_no_memory_to_grow_stays_where_it_was(monkeypatch):
    rooms = Rooms()
    texts = [Known(rooms.new()) for _ in range(3)]
    for number, text in enumerate(texts):
        text.grow(100, number)

    def full(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("growlm.base.rooms.Room.open", full)
        with pytest.raises(MemoryError):
            texts[0].cache.reserve(500)
    for text in texts:
        text.check()
    texts[0].cache.free()
    other = Known(rooms.new())
    other.grow(50, 9)
    for text in [*texts[1:], other]:
        text.check()


def test_nothing_of_a_text_that_left_is_read_beside_another():
    """Zero times what is no number is no number: what is not seen counts for nothing only if it is one."""
    rooms = Rooms()
    broken, other = Known(rooms.new()), Known(rooms.new())
    broken.grow(90, 1)
    assert broken.cache.room is not None
    room = broken.cache.room
    with torch.inference_mode():
        room.values[0][broken.cache.row, :, :90] = torch.nan
    other.grow(3, 2)
    broken.cache.free()
    assert bool(torch.stack([room.keys[0], room.values[0]]).isfinite().all())


# Thin products


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(thin, "thin_rows", lambda dtype: range(2, 1000))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 256), (1, 7, 256), (3, 5, 256), (13, 256)])
def test_a_thin_product_is_the_linear_layer(always, bias, shape):
    torch.manual_seed(0)
    linear = nn.Linear(256, 300, bias=bias)
    x = torch.randn(shape)
    wanted = linear(x)
    model = nn.Sequential(linear, nn.Linear(8, 8))
    allow_thin_products(model)
    assert [type(part) for part in model] == [ThinLinear, nn.Linear]
    assert torch.equal(linear(x), wanted)  # as long as nobody wants them
    with thin_products():
        found = linear(x)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(linear(x), wanted)


def test_rows_are_those_that_are_measured_to_be_faster():
    rows = thin.thin_rows(torch.float32)
    assert rows == thin.thin_rows(torch.float32)
    assert rows.start in (0, *thin._TRIED)
    assert rows.stop - 1 in (-1, *thin._TRIED)


def test_rows_are_made_up_to_whole_tiles():
    best = [thin.best_rows(rows) for rows in range(1, 33)]
    assert best[:16] == [1, 2, 4, 4, 5, 6, 8, 8, 9, *[16] * 7]
    assert best[16:] == [rows + 16 for rows in best[:16]]
