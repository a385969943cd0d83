"""Recalled text: the documents of a domain in token ids, sorted for search, in parts that are files.

A part holds its tokens, its suffix array and where each document came from. Parts are found in together, so that a text
grows by one more part, and a document goes by making its part anew. Knows arrays and files; not what is predicted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from growlm.disk.tensors import map_tensors, require_kinds
from growlm.errors import IntegrityError
from growlm.progress import phase
from growlm.recall import FILE
from growlm.recall.suffixes import Neighbours, neighbours, separated, sorted_places

WIDTH = 64  # places that a context finds
_LOOKED_AT = 1 << 20  # numbers that are checked together
_READ_AHEAD = 1 << 30  # bytes of a file at the most
_PART = (
    1 << 25
)  # tokens of a part, at the most: to sort so many takes 0.5 GB of memory, 1.4 GB where tokens take 4 bytes


@dataclass(frozen=True)
class Place:
    """Where a token stands.

    Attributes:
        part, document: of which part, and which of its documents.
        token: how many of the document's tokens come before.
        source: of the document, as it was read.
    """

    part: int
    document: int
    token: int
    source: str


@dataclass(frozen=True)
class Part:
    """Documents that were sorted together.

    Attributes:
        text: (n,) uint16 or int32: token ids, with a separator, the size of the vocabulary, around every document.
        order: (m,) int32, the suffix array (`growlm.recall.suffixes`).
        starts: (d,) int64: where each document begins in the text.
        names: (c,) uint8 and (d,) int64: the documents' sources in UTF-8 one after another, and where each ends.
    """

    text: np.ndarray
    order: np.ndarray
    starts: np.ndarray
    names: np.ndarray
    name_ends: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[tuple[str, np.ndarray]], vocab_size: int) -> Part:
        """Sorts documents, given as source and token ids."""
        text = separated([ids for _, ids in documents], vocab_size)
        lengths = np.array([len(ids) + 1 for _, ids in documents], dtype=np.int64)
        names = [source.encode("utf-8", "surrogateescape") for source, _ in documents]
        return cls(
            text,
            sorted_places(text, vocab_size),
            np.cumsum(lengths) - lengths + 1,
            np.frombuffer(b"".join(names), dtype=np.uint8).copy(),
            np.cumsum([len(name) for name in names], dtype=np.int64),
        )

    @property
    def num_tokens(self) -> int:
        return len(self.text) - len(self.starts) - 1

    def tensors(self) -> dict[str, Tensor]:
        """As it is saved."""
        return {name: torch.from_numpy(getattr(self, name)) for name in _TENSORS}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], vocab_size: int, where: Path, *, whole: bool) -> Part:
        """
        Args:
            whole: look at every number, and not at the sizes alone.

        Raises:
            IntegrityError: tensors that are no sorted text of such a vocabulary.
        """
        tokens = torch.uint16 if vocab_size < 1 << 16 else torch.int32
        require_kinds(where, tensors, {name: (dtype or tokens, 1) for name, dtype in _TENSORS.items()})
        part = cls(**{name: tensor.numpy() for name, tensor in tensors.items()})
        if not part._fits(vocab_size, whole):
            raise IntegrityError(f"{where}: is no sorted text of this base's tokens; restore it or learn it again")
        return part

    def _fits(self, vocab_size: int, whole: bool) -> bool:
        if len(self.starts) != len(self.name_ends) or len(self.order) >= len(self.text):
            return False
        if not whole:
            return True
        last = len(self.text) - 1
        ends = []
        for at in range(0, len(self.text), _LOOKED_AT):  # at so many at a time: the file is not copied into memory
            text, order = self.text[at : at + _LOOKED_AT], self.order[at : at + _LOOKED_AT]
            if text.min() < 0 or text.max() > vocab_size:
                return False
            if len(order) and not (order.min() > 0 and order.max() < last):
                return False
            if (self.text[order + 1] == vocab_size).any():
                return False
            ends.append(np.flatnonzero(text == vocab_size) + at)
        around = np.array_equal(np.concatenate(ends), np.append(self.starts - 1, last))
        names = (np.diff(self.name_ends, prepend=0) >= 0).all() and self.name_ends[-1] <= len(self.names)
        return bool(around and names)

    def documents(self) -> Iterator[tuple[str, np.ndarray]]:
        """Source and token ids of each, as `of` takes them."""
        for number in range(len(self.starts)):
            yield self.source(number), self.ids(number)

    def source(self, document: int) -> str:
        begin = self.name_ends[document - 1] if document else 0
        return self.names[begin : self.name_ends[document]].tobytes().decode("utf-8", "surrogateescape")

    def ids(self, document: int) -> np.ndarray:
        end = self.starts[document + 1] if document + 1 < len(self.starts) else len(self.text)
        return self.text[self.starts[document] : end - 1]


_TENSORS: dict[str, torch.dtype | None] = {
    "text": None,
    "order": torch.int32,
    "starts": torch.int64,
    "names": torch.uint8,
    "name_ends": torch.int64,
}


@dataclass(frozen=True)
class Found:
    """Neighbours in all parts together: `lengths`, `places`, `tokens` and `parts`, (q, w)."""

    lengths: np.ndarray
    places: np.ndarray
    tokens: np.ndarray
    parts: np.ndarray


class RecalledText:
    """All parts of a domain's text."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)

    @classmethod
    def of(cls, documents: Iterable[tuple[str, np.ndarray]], vocab_size: int, *, most: int = _PART) -> RecalledText:
        """Sorts documents (source, token ids), in as many parts as they need. Those of a single token, which nothing
        follows, are left out."""
        parts: list[Part] = []
        some: list[tuple[str, np.ndarray]] = []
        size = 0
        for source, ids in documents:
            if len(ids) < 2:
                continue
            if some and size + len(ids) > most:
                parts.append(_sorted(some, vocab_size))
                some, size = [], 0
            some.append((source, ids))
            size += len(ids)
        return cls([*parts, *([_sorted(some, vocab_size)] if some else [])])

    @classmethod
    def open(cls, folder: Path, files: Mapping[str, str], vocab_size: int, *, verify: bool) -> RecalledText:
        """The parts that lie in a folder, mapped: what is looked at is read when it is looked at.

        Args:
            files: names and sha256.
            verify: compare the hashes.

        Raises:
            IntegrityError: a file is missing, cut, changed, or not of this vocabulary.
        """
        parts = []
        for name, digest in files.items():
            _read_ahead(folder / name)
            tensors = map_tensors(folder / name, lambda _: True, sha256=digest if verify else None)
            parts.append(Part.restore(tensors, vocab_size, folder / name, whole=verify))
        return cls(parts)

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)

    @property
    def num_documents(self) -> int:
        return sum(len(part.starts) for part in self.parts)

    def find(self, contexts: np.ndarray, width: int = WIDTH) -> Found:
        """Up to `width` places like each of the contexts (q, l), the newest token first; -1 where it is shorter."""
        found = [neighbours(part.text, part.order, contexts, width) for part in self.parts]
        if not found:
            found = [Neighbours.none(len(contexts), width)]
        lengths, places, tokens = (
            np.concatenate([getattr(part, name) for part in found], axis=1) for name in ("lengths", "places", "tokens")
        )
        parts = np.repeat(np.arange(len(found)), width)[None].repeat(len(contexts), axis=0)
        if len(found) == 1:
            return Found(lengths, places, tokens, parts)
        ranked = np.argsort(-lengths, axis=1, kind="stable")[:, :width]
        return Found(*(np.take_along_axis(array, ranked, axis=1) for array in (lengths, places, tokens, parts)))

    def following(self, context: np.ndarray, most: int) -> tuple[int, list[int]]:
        """How many tokens agree with a context (1, l), the newest first, where most do, and up to so many tokens that
        follow there in the same document."""
        found = self.find(context, 1)
        length, part, place = int(found.lengths[0, 0]), int(found.parts[0, 0]), int(found.places[0, 0])
        if not length:
            return 0, []
        text = self.parts[part].text
        after = text[place + 1 : place + 1 + most].astype(np.int64)
        ends = np.flatnonzero(after == text[0])  # the text begins with what separates documents
        return length, after[: ends[0] if len(ends) else None].tolist()

    def place(self, number: int, at: int) -> Place:
        """Of a token of a part's text."""
        part = self.parts[number]
        document = int(np.searchsorted(part.starts, at, side="right")) - 1
        start = int(part.starts[document])
        return Place(number, document, at - start, part.source(document))

    def before(self, place: Place) -> list[int]:
        """The document's tokens that come before a place."""
        return self.parts[place.part].ids(place.document)[: place.token].astype(np.int64).tolist()

    def with_more(self, documents: Iterable[tuple[str, np.ndarray]], vocab_size: int) -> RecalledText:
        """With further documents. Parts at the end that are less than twice as large as what comes after are sorted
        with it: each part has at least twice the tokens of the next, so that of n tokens there are log n parts."""
        new = list(documents)
        size, kept = sum(len(ids) for _, ids in new), list(self.parts)
        while kept and kept[-1].num_tokens < 2 * size and kept[-1].num_tokens + size <= _PART:
            part = kept.pop()
            new = [*part.documents(), *new]
            size += part.num_tokens
        return RecalledText([*kept, *RecalledText.of(new, vocab_size).parts])

    def without(self, leaves: Callable[[str], bool], vocab_size: int) -> RecalledText:
        """Without the documents whose source `leaves`: only parts that hold one are made anew."""
        parts: list[Part] = []
        for part in self.parts:
            stay = [n for n in range(len(part.starts)) if not leaves(part.source(n))]
            if len(stay) == len(part.starts):
                parts.append(part)
            elif stay:
                parts.append(_sorted([(part.source(n), part.ids(n)) for n in stay], vocab_size))
        return RecalledText(parts)

    def sources(self) -> Iterator[str]:
        """Of every document."""
        for part in self.parts:
            yield from (part.source(number) for number in range(len(part.starts)))

    def files(self) -> dict[str, dict[str, Tensor]]:
        """As they are saved, by file."""
        return {FILE.format(number): part.tensors() for number, part in enumerate(self.parts)}


def _read_ahead(path: Path) -> None:
    """Has the system bring a file into its cache while other things are done: a search touches pages all over it."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError), open(path, "rb", buffering=0) as f:
            os.posix_fadvise(f.fileno(), 0, _READ_AHEAD, os.POSIX_FADV_WILLNEED)


def _sorted(documents: Sequence[tuple[str, np.ndarray]], vocab_size: int) -> Part:
    many = sum(len(ids) for _, ids in documents)
    with phase("sorting text", note=f"{many:,} tokens"):
        return Part.of(documents, vocab_size)
