"""Text that is recalled: what is found is what a walk over all places finds, however the text came there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disk import flip
from growlm.disk.tensors import write_tensors
from growlm.errors import IntegrityError
from growlm.recall.contexts import Contexts
from growlm.recall.suffixes import LONGEST, neighbours, separated, sorted_places
from growlm.recall.text import Found, Part, RecalledText

VOCABULARIES = [3, 255, 300, 65_535, 65_536, 65_537, 150_000]  # of both widths of a token, and of both orders of bytes
Documents = list[np.ndarray]


def tokens_of(vocab_size: int) -> st.SearchStrategy[int]:
    """Few different ones, so that contexts recur: with the smallest, the largest and those that bytes could confuse."""
    some = (0, 1, 2, 255, 256, 257, 65_535, 65_536, vocab_size - 1)
    return st.sampled_from(sorted({token for token in some if token < vocab_size}))


@st.composite
def texts(draw: Any, *, least: int = 1, documents: int = 6, tokens: int = 14) -> tuple[int, Documents]:
    """A vocabulary and documents."""
    vocab_size = draw(st.sampled_from(VOCABULARIES))
    one = st.lists(tokens_of(vocab_size), min_size=least, max_size=tokens)
    return vocab_size, [np.array(ids, dtype=np.int32) for ids in draw(st.lists(one, max_size=documents))]


def contexts_in(vocab_size: int, length: int = 5) -> st.SearchStrategy[np.ndarray]:
    """(q, l), the newest first, some of them shorter than l."""
    one = st.lists(tokens_of(vocab_size), max_size=length)
    padded = one.map(lambda ids: ids + [-1] * (length - len(ids)))
    return st.lists(padded, min_size=1, max_size=6).map(lambda rows: np.array(rows, dtype=np.int64))


def agreement(ids: Sequence[int], place: int, context: Sequence[int]) -> int:
    """Tokens of a document, from a place backwards, that agree with a context."""
    length = 0
    while length < len(context) and length <= place and ids[place - length] == context[length]:
        length += 1
    return length


def everywhere(documents: Documents, context: np.ndarray) -> list[tuple[int, int, int, int]]:
    """By a walk: (length, document, place in it, what follows) of all places that agree, the longest first."""
    found = [
        (agreement(ids.tolist(), place, context.tolist()), number, place, int(ids[place + 1]))
        for number, ids in enumerate(documents)
        for place in range(len(ids) - 1)
    ]
    return sorted((f for f in found if f[0]), key=lambda f: -f[0])


def assert_found(documents: Documents, contexts: np.ndarray, found: Any, where: Any, width: int) -> None:
    """
    Args:
        where: (document, place in it) of a row and column of what was found.
    """
    assert found.lengths.shape == found.places.shape == found.tokens.shape == (len(contexts), width)
    for row, context in enumerate(contexts):
        wanted = everywhere(documents, context)
        lengths = found.lengths[row].tolist()
        assert lengths == ([f[0] for f in wanted] + [0] * width)[:width]
        there = sum(length > 0 for length in lengths)
        assert (found.tokens[row, there:] == -1).all()
        mine = [(lengths[at], *where(row, at), int(found.tokens[row, at])) for at in range(there)]
        assert len(set(mine)) == len(mine)  # no place twice
        assert set(mine) <= set(wanted)


# One array


@given(text=texts(), data=st.data(), width=st.sampled_from([1, 2, 5, 64]))
def test_neighbours_are_what_a_walk_over_all_places_finds(text, data, width):
    vocab_size, documents = text
    whole = separated(documents, vocab_size)
    assert whole.dtype == (np.uint16 if vocab_size < 65_536 else np.int32)
    contexts = data.draw(contexts_in(vocab_size))
    found = neighbours(whole, sorted_places(whole, vocab_size), contexts, width)
    starts = np.cumsum([1, *(len(ids) + 1 for ids in documents)])

    def where(row: int, at: int) -> tuple[int, int]:
        place = int(found.places[row, at])
        document = int(np.searchsorted(starts, place, side="right")) - 1
        return document, place - int(starts[document])

    assert_found(documents, contexts, found, where, width)


@given(text=texts())
def test_every_place_that_something_follows_is_an_entry_once_in_the_order_of_what_stands_before(text):
    vocab_size, documents = text
    whole = separated(documents, vocab_size)
    order = sorted_places(whole, vocab_size)
    assert order.dtype == np.int32
    assert len(order) == sum(max(len(ids) - 1, 0) for ids in documents)
    assert len(set(order.tolist())) == len(order)
    backwards = [whole[place::-1].tolist() for place in order.tolist()]
    assert backwards == sorted(backwards)


def test_a_context_is_compared_as_far_as_it_is_given():
    ids = np.arange(1, 80, dtype=np.int32) % 7
    whole = separated([ids, ids], 7)
    order = sorted_places(whole, 7)
    for length in (1, 3, LONGEST):
        context = ids[40 : 40 - length : -1][None].astype(np.int64)
        found = neighbours(whole, order, context, 8)
        assert set(found.lengths[0].tolist()) == {length}
        assert set(found.tokens[0].tolist()) == {int(ids[41])}


def test_nothing_is_found_where_there_is_nothing():
    contexts = np.array([[1, 2], [-1, -1]])
    for documents in ([], [np.array([1], dtype=np.int32)], [np.array([], dtype=np.int32)] * 2):
        whole = separated(documents, 5)
        found = neighbours(whole, sorted_places(whole, 5), contexts, 3)
        assert found.lengths.tolist() == [[0] * 3] * 2
        assert found.tokens.tolist() == [[-1] * 3] * 2
    whole = separated([np.array([1, 2, 3], dtype=np.int32)], 5)
    assert neighbours(whole, sorted_places(whole, 5), contexts[:0], 3).tokens.shape == (0, 3)
    assert neighbours(whole, sorted_places(whole, 5), contexts[1:], 3).lengths.tolist() == [[0] * 3]


# Parts


def named(documents: Documents, first: int = 0) -> list[tuple[str, np.ndarray]]:
    return [(f"book-{number}.txt:ä{number}", ids) for number, ids in enumerate(documents, start=first)]


def held(text: RecalledText) -> list[tuple[str, list[int]]]:
    return [(source, ids.tolist()) for part in text.parts for source, ids in part.documents()]


def assert_same_parts(one: RecalledText, other: RecalledText) -> None:
    assert len(one.parts) == len(other.parts)
    for mine, theirs in zip(one.parts, other.parts, strict=True):
        for name, tensor in mine.tensors().items():
            assert torch.equal(tensor, theirs.tensors()[name]), name


def assert_agree(one: Found, other: Found) -> None:
    """Both found the same, but for which of equals lie within the width."""
    assert np.array_equal(one.lengths, other.lengths)
    for row, lengths in enumerate(one.lengths):
        sure = lengths > lengths[-1]
        pairs = [Counter(zip(lengths[sure], f.tokens[row][sure], strict=True)) for f in (one, other)]
        assert pairs[0] == pairs[1]


@given(text=texts(least=2), data=st.data(), most=st.integers(1, 30), width=st.sampled_from([1, 4, 64]))
def test_several_parts_find_what_one_finds(text, data, most, width):
    vocab_size, documents = text
    contexts = data.draw(contexts_in(vocab_size))
    whole = RecalledText.of(named(documents), vocab_size)
    parts = RecalledText.of(named(documents), vocab_size, most=most)
    assert len(whole.parts) == bool(documents)
    assert all(part.num_tokens <= most or len(part.starts) == 1 for part in parts.parts)
    assert held(parts) == held(whole) == [(source, ids.tolist()) for source, ids in named(documents)]
    for some in (whole, parts):
        assert (some.num_documents, some.num_tokens) == (len(documents), sum(map(len, documents)))
        assert list(some.sources()) == [source for source, _ in named(documents)]
    found = parts.find(contexts, width)
    assert_agree(whole.find(contexts, width), found)

    def where(row: int, at: int) -> tuple[int, int]:
        place = parts.place(int(found.parts[row, at]), int(found.places[row, at]))
        return int(place.source.partition("ä")[2]), place.token

    assert_found(documents, contexts, found, where, width)


@given(text=texts(least=2), most=st.integers(1, 30))
def test_a_place_is_told_by_its_document(text, most):
    vocab_size, documents = text
    parts = RecalledText.of(named(documents), vocab_size, most=most)
    numbered = iter(named(documents))
    for number, part in enumerate(parts.parts):
        for document, start in enumerate(part.starts.tolist()):
            source, ids = next(numbered)
            for token in range(len(ids)):
                place = parts.place(number, start + token)
                assert (place.part, place.document, place.token) == (number, document, token)
                assert (place.source, parts.before(place)) == (source, ids[:token].tolist())
    assert next(numbered, None) is None


def test_a_document_of_one_token_says_nothing_and_is_left_out():
    one, two = np.array([4], dtype=np.int32), np.array([4, 2], dtype=np.int32)
    assert RecalledText.of(named([one]), 9).parts == ()
    text = RecalledText.of(named([one, two, one]), 9, most=2)
    assert held(text) == [("book-1.txt:ä1", [4, 2])]
    assert held(text.with_more(named([one], 7), 9)) == held(text)


# Growing and forgetting


@given(text=texts(least=2), more=st.integers(0, 6), data=st.data())
def test_a_text_that_grew_finds_what_one_of_all_documents_finds(text, more, data):
    vocab_size, documents = text
    first = len(documents) - min(more, len(documents))
    whole = RecalledText.of(named(documents), vocab_size)
    grown = RecalledText.of(named(documents[:first]), vocab_size)
    grown = grown.with_more(named(documents[first:], first), vocab_size)
    assert held(grown) == held(whole)
    contexts = data.draw(contexts_in(vocab_size))
    assert_agree(grown.find(contexts), whole.find(contexts))
    if len(grown.parts) == len(whole.parts) == 1:
        assert_same_parts(grown, whole)


@pytest.mark.parametrize("sizes", [[4] * 60, list(range(60, 1, -1)), list(range(2, 60)), [500, *[3] * 40, 90, 2]])
def test_a_text_that_grows_and_grows_has_few_parts(sizes):
    draw = np.random.default_rng(0)
    text, documents, sorted_again = RecalledText([]), [], 0
    for number, size in enumerate(sizes):
        before = text.parts
        documents.append(draw.integers(0, 9, size).astype(np.int32))
        text = text.with_more(named(documents[-1:], number), 9)
        sorted_again += sum(p.num_tokens for p in text.parts if all(p is not old for old in before))
        assert len(text.parts) <= math.log2(text.num_tokens) + 1
    assert held(text) == [(source, ids.tolist()) for source, ids in named(documents)]
    # Nor is every token sorted anew each time.
    assert sorted_again <= 2 * text.num_tokens * math.log2(text.num_tokens)


@given(text=texts(least=2), most=st.integers(2, 30), data=st.data())
def test_what_is_taken_out_is_nowhere_and_other_parts_are_as_they_were(text, most, data):
    vocab_size, documents = text
    parts = RecalledText.of(named(documents), vocab_size, most=most)
    gone = data.draw(st.sets(st.sampled_from(range(len(documents))))) if documents else set()
    sources = {source for number, (source, _) in enumerate(named(documents)) if number in gone}
    left = parts.without(sources.__contains__, vocab_size)
    assert held(left) == [pair for pair in held(parts) if pair[0] not in sources]
    untouched = [part for part in parts.parts if not sources & {s for s, _ in part.documents()}]
    assert [id(part) for part in left.parts if any(part is old for old in parts.parts)] == list(map(id, untouched))
    kept = RecalledText.of([pair for pair in named(documents) if pair[0] not in sources], vocab_size)
    contexts = data.draw(contexts_in(vocab_size))
    assert_agree(left.find(contexts), kept.find(contexts))


def test_tokens_of_a_document_that_was_taken_out_are_in_no_array():
    documents = [np.array([1, 2, 3, 9], dtype=np.int32), np.array([5, 7, 5, 9], dtype=np.int32)]
    left = RecalledText.of(named(documents), 12).without(lambda source: source.startswith("book-1"), 12)
    (part,) = left.parts
    assert set(part.text.tolist()) == {1, 2, 3, 9, 12}
    assert b"book-1" not in part.names.tobytes()
    assert left.without(lambda source: True, 12).parts == ()


# Files


def saved(text: RecalledText, folder: Path) -> dict[str, str]:
    """The hashes of its files."""
    return {file: write_tensors(folder / file, tensors) for file, tensors in text.files().items()}


@pytest.mark.parametrize("vocab_size", [9, 70_000])
@pytest.mark.parametrize("verify", [True, False])
def test_a_text_is_read_as_it_was_saved(tmp_path, vocab_size, verify):
    documents = [np.arange(n, 3 * n, dtype=np.int32) % 9 for n in (1, 4, 7)]
    text = RecalledText.of(named(documents), vocab_size, most=10)
    files = saved(text, tmp_path)
    assert list(files) == ["text-000.safetensors", "text-001.safetensors"]
    again = RecalledText.open(tmp_path, files, vocab_size, verify=verify)
    assert_same_parts(again, text)
    assert held(again) == held(text)
    assert RecalledText.open(tmp_path, {}, vocab_size, verify=verify).find(np.array([[1]])).tokens.max() == -1


DAMAGES: dict[str, dict[str, Any]] = {
    "an entry behind the end": {"order": (0, 99)},
    "an entry before the beginning": {"order": (0, -1)},
    "an entry that nothing follows": {"order": (0, 4)},
    "a token that the base does not have": {"text": (2, 77)},
    "a document behind the end": {"starts": (1, 99)},
    "documents in no order": {"starts": (1, 1)},
    "a document that begins within another": {"starts": (1, 7)},
    "names in no order": {"name_ends": (0, 99)},
    "a name before the first": {"name_ends": (0, -3)},
}


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("vocab_size", [9, 70_000])
def test_numbers_that_no_text_has_are_refused(tmp_path, change, vocab_size):
    """Whoever wrote the file: its hash is the manifest's."""
    text = RecalledText.of(named([np.array(ids, dtype=np.int32) for ids in ([1, 2, 3, 4], [5, 6, 7])]), vocab_size)
    tensors = {name: tensor.clone() for name, tensor in text.parts[0].tensors().items()}
    for name, (at, value) in change.items():
        tensors[name][at] = value if name != "text" else vocab_size + 1
    file = tmp_path / "text-000.safetensors"
    digest = write_tensors(file, tensors)
    with pytest.raises(IntegrityError, match=r"text-000\.safetensors: is no sorted text") as caught:
        RecalledText.open(tmp_path, {file.name: digest}, vocab_size, verify=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "other", "short", "empty"])
def test_a_file_that_is_no_text_of_this_base_is_named(tmp_path, damage):
    documents = named([np.arange(9, dtype=np.int32)])
    files = saved(RecalledText.of(documents, 70_000 if damage == "other" else 9), tmp_path)
    (file,) = tmp_path.iterdir()
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:60])
    elif damage == "flipped":
        flip(file)
    elif damage in ("short", "empty"):
        part = Part.of(documents, 9).tensors()
        part |= {"starts": part["starts"][:0]} if damage == "empty" else {"text": part["text"][:3]}
        files[file.name] = write_tensors(file, part)
    with pytest.raises(IntegrityError, match=r"text-000\.safetensors: ") as caught:
        RecalledText.open(tmp_path, files, 9, verify=True)
    assert "\n" not in str(caught.value)


# Contexts


@given(
    rows=st.lists(st.lists(st.integers(-1, 9), min_size=4, max_size=4), min_size=1, max_size=3),
    more=st.sampled_from([0, 1, 30, 40]),
    count=st.integers(0, 4),
)
def test_contexts_are_the_tokens_up_to_each_place(rows, more, count):
    seen = torch.tensor([[*range(10, 10 + more), *row] for row in rows])
    found = Contexts.of(seen, count)
    assert found.tokens.shape == (len(rows), count, LONGEST)
    assert found.repeated.shape == (len(rows), count)
    for row, ids in enumerate(seen.tolist()):
        for at in range(count):
            before = ids[: len(ids) - count + at + 1][::-1][:LONGEST]
            assert found[row, at].tokens.tolist() == before + [-1] * (LONGEST - len(before))
            assert int(found.repeated[row, at]) == longest_repeat(ids[: len(ids) - count + at + 1])


def longest_repeat(ids: list[int]) -> int:
    """How many of the last tokens, without one that is none, stand earlier as well."""
    for length in range(min(LONGEST, len(ids) - 1), 0, -1):
        last = ids[-length:]
        if min(last) >= 0 and any(ids[at : at + length] == last for at in range(len(ids) - length)):
            return length
    return 0


@pytest.mark.parametrize("times", [1, 2, 40])
def test_a_context_that_repeats_itself_is_as_long_as_what_is_looked_at(times):
    ids = [3, 1, 4] * times
    assert int(Contexts.of(torch.tensor([ids]), 1).repeated[0, 0]) == min(max(len(ids) - 3, 0), LONGEST)
