"""Suffix array: the places of a text in the order of what stands before them: those like a context lie together.

Entry e of the array is a place p of the text; entries are sorted by the tokens T[p], T[p-1], ... read backwards (Manber
and Myers 1993, on the reversed text). A context is found by one binary search: its neighbours on both sides are the
places whose tokens before agree with it longest, and what follows them, T[p+1], is what the text would say next (the
infinity-gram model, Liu et al. 2024). Knows arrays of numbers; not what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# q contexts, l tokens of each, n entries, w neighbours of a context

LONGEST = 32  # tokens before a place that are compared


@dataclass(frozen=True)
class Neighbours:
    """Places like each context, those that agree longest first.

    Attributes:
        lengths: (q, w) tokens that agree, up to `LONGEST`; 0 where there is no neighbour.
        places: (q, w) in the text: the last token that agrees.
        tokens: (q, w) what follows; -1 where there is no neighbour.
    """

    lengths: np.ndarray
    places: np.ndarray
    tokens: np.ndarray

    @classmethod
    def none(cls, contexts: int, width: int) -> Neighbours:
        empty = np.zeros((contexts, width), dtype=np.int64)
        return cls(empty, empty, np.full_like(empty, -1))


def separated(documents: Sequence[np.ndarray], separator: int) -> np.ndarray:
    """Documents one after another with the separator, a number above all tokens, before each and at the end."""
    dtype = np.uint16 if separator < 1 << 16 else np.int32
    end = np.array([separator], dtype=dtype)
    parts = [part for ids in documents for part in (end, ids.astype(dtype))]
    return np.concatenate([*parts, end])


def sorted_places(text: np.ndarray, separator: int) -> np.ndarray:
    """The array's entries (n,) int32: all places of `text` that are followed by a token of their own document."""
    from pydivsufsort import divsufsort

    backwards = np.ascontiguousarray(text[::-1])
    order = (len(text) - 1 - divsufsort(backwards)).astype(np.int32)
    last = len(text) - 1
    kept = (text[order] != separator) & (text[np.minimum(order + 1, last)] != separator) & (order < last)
    return order[kept]


def neighbours(text: np.ndarray, order: np.ndarray, contexts: np.ndarray, width: int) -> Neighbours:
    """Up to `width` places for each context.

    Args:
        text: as `separated` makes it.
        order: as `sorted_places` makes it.
        contexts: (q, l) the tokens before, the newest first; -1 where a context is shorter.
    """
    if not len(order) or not len(contexts):
        return Neighbours.none(len(contexts), width)
    at = _insertion(text, order, contexts)
    half = min(width, len(order))
    # As many on either side as there may be all in all: the longest can lie on one side alone.
    entries = at[:, None] + np.arange(-half, half)
    inside = (entries >= 0) & (entries < len(order))
    places = order[np.where(inside, entries, 0)].astype(np.int64)
    lengths = np.where(inside, _agreement(text, places, contexts[:, None]), 0)
    # Of equals those nearest by: what stands before is most alike.
    ranked = np.argsort(-lengths * (2 * half + 1) + np.abs(np.arange(-half, half) + 0.5), axis=1)[:, :width]
    lengths, places = (np.take_along_axis(found, ranked, axis=1) for found in (lengths, places))
    tokens = np.where(lengths > 0, text[places + 1].astype(np.int64), -1)
    if lengths.shape[1] < width:
        room = ((0, 0), (0, width - lengths.shape[1]))
        lengths, places = np.pad(lengths, room), np.pad(places, room)
        tokens = np.pad(tokens, room, constant_values=-1)
    return Neighbours(lengths, places, tokens)


def _insertion(text: np.ndarray, order: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    """How many entries lie before each context, (q,)."""
    low, high = np.zeros(len(contexts), dtype=np.int64), np.full(len(contexts), len(order), dtype=np.int64)
    rows = np.arange(len(contexts))
    for _ in range(len(order).bit_length()):
        middle = (low + high) // 2
        places = order[np.minimum(middle, len(order) - 1)].astype(np.int64)
        before = _before(text, places, contexts.shape[1])
        first = (before != contexts).argmax(axis=1)
        less = before[rows, first] < contexts[rows, first]
        searching = low < high
        low = np.where(searching & less, middle + 1, low)
        high = np.where(searching & ~less, middle, high)
    return low


def _agreement(text: np.ndarray, places: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    """How many tokens before places agree with contexts that broadcast with them."""
    different = _before(text, places, contexts.shape[-1]) != contexts
    first = different.argmax(axis=-1)
    return np.where(different.any(axis=-1), first, contexts.shape[-1])


def _before(text: np.ndarray, places: np.ndarray, many: int) -> np.ndarray:
    """The tokens at places and before them, the newest first. The text begins with a separator: nothing lies before."""
    return text[np.maximum(places[..., None] - np.arange(many), 0)].astype(np.int64)
