"""Packing: documents -> token ids in windows for training, in passages for evaluation, and the order of batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from growlm.data.cutting import cut_text, require
from growlm.data.reading import Document
from growlm.errors import ConfigError, DataError
from growlm.progress import phase, track

if TYPE_CHECKING:
    import torch

# A tokenizer holds some 200 bytes for every token of a call, so a call gets so many texts of bounded length.
TOKENIZE_TEXTS = 256
TOKENIZE_CHARS = 1 << 15


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """Windows of one stream of token ids: `tokens` (N, T + 1) int32, read-only, T the sequence length.

    Row i holds the inputs `[:-1]` and the labels `[1:]`. Rows overlap by one token, so that every token of
    the stream but the first is a label exactly once.
    """

    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, indices: Sequence[int] | np.ndarray | slice) -> torch.LongTensor:
        """The rows at `indices` as a batch (b, T + 1) of int64."""
        import torch

        rows: Any = torch.from_numpy(self.tokens[indices].astype(np.int64))
        return rows

    @property
    def num_tokens(self) -> int:
        """Labels in all rows."""
        return len(self) * (self.tokens.shape[1] - 1)


def start_tokens(tokenizer: Any) -> list[int]:
    """The start token, if the tokenizer by itself begins a text with one, as some bases expect; else nothing.

    Prompts begin with it, and so does every text that a module, the router or an evaluation is shown.
    """
    start = tokenizer.bos_token_id
    return [start] if start is not None and tokenizer("")["input_ids"][:1] == [start] else []


def pack(
    documents: Iterable[Document],
    tokenizer: Any,
    sequence_length: int,
    *,
    max_tokens: int | None = None,
) -> PackedTokens:
    """Windows of `sequence_length` labels over all documents, each between `start_tokens` and end-of-text.

    `tokenizer` is a `PreTrainedTokenizerFast`; special tokens written out in a text become those tokens.
    Texts of more than about thirty thousand characters are tokenized in pieces. At most `max_tokens`
    labels are kept, and an incomplete last window is dropped.

    Raises `DataError` for less than one window, `ConfigError` for a tokenizer without an end-of-text token.
    """
    require("sequence_length", sequence_length, 1)
    if max_tokens is not None:
        require("max_tokens", max_tokens, sequence_length)
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-text token to join documents; set its eos_token")
    begin = np.array(start_tokens(tokenizer), dtype=np.int32)
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    parts: list[np.ndarray] = []
    total = 0
    known = (_number(documents), "documents") if max_tokens is None else (max_tokens, "tokens")
    with phase("tokenizing", *known) as tokenizing:
        for ids in _token_ids(documents, tokenizer):
            parts += [begin, ids, end]
            more = len(begin) + len(ids) + 1
            total += more
            tokenizing.advance(1 if max_tokens is None else more)
            if max_tokens is not None and total > max_tokens:
                break
    if total <= sequence_length:
        found = f"{total} tokens, sequence length {sequence_length}"
        raise DataError(f"less than one sequence: {found}; give more text or a smaller --sequence-length")
    stream = np.concatenate(parts)[: None if max_tokens is None else max_tokens + 1]
    windows = np.lib.stride_tricks.sliding_window_view(stream, sequence_length + 1)
    return PackedTokens(windows[::sequence_length])


@dataclass(frozen=True, slots=True)
class Passage:
    """Consecutive token ids of one document after the start token, and that document's place in what was given."""

    tokens: list[int]
    document_index: int


def passages(
    documents: Iterable[Document], tokenizer: Any, sequence_length: int, *, limit: int | None = None
) -> list[Passage]:
    """Every document by itself in pieces of at most `sequence_length` tokens, for evaluation one by one.

    Every piece begins with `start_tokens`, which count. There is no end-of-text, and pieces of less than two
    tokens, which predict nothing, are dropped. At most `limit` passages, the first ones, are returned.
    """
    require("sequence_length", sequence_length, 2)
    begin = start_tokens(tokenizer)
    room = sequence_length - len(begin)
    tokenized = track(_token_ids(documents, tokenizer), "tokenizing", "documents", total=_number(documents))
    found = (
        Passage(begin + ids[at : at + room].tolist(), index)
        for index, ids in enumerate(tokenized)
        for at in range(0, len(begin) + len(ids) - 1, room)  # without a start token, not from the last token alone
    )
    return list(itertools.islice(found, limit))


def _number(documents: Iterable[Document]) -> int | None:
    return len(documents) if isinstance(documents, Sized) else None


def _token_ids(documents: Iterable[Document], tokenizer: Any) -> Iterator[np.ndarray]:
    """Token ids (n,) int32 of each document in turn."""
    parts: list[np.ndarray] = []
    pieces = _pieces(documents)
    while batch := list(itertools.islice(pieces, TOKENIZE_TEXTS)):
        encoded = tokenizer(
            [piece for piece, _ in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a document may well be longer than the model's context
        )
        for (_, last), ids in zip(batch, encoded["input_ids"], strict=True):
            parts.append(np.array(ids, dtype=np.int32))
            if last:
                yield np.concatenate(parts)
                parts = []


def _pieces(documents: Iterable[Document]) -> Iterator[tuple[str, bool]]:
    """(text to tokenize at once, whether it ends its document)"""
    for document in documents:
        *pieces, last = cut_text(document.text, TOKENIZE_CHARS)
        yield from ((piece, False) for piece in pieces)
        yield last, True


def batches(num_rows: int, batch_size: int, *, seed: int, epoch: int) -> list[np.ndarray]:
    """Row indices of an epoch's batches: each row once, shuffled by seed and epoch; the last may be short."""
    require("batch_size", batch_size, 1)
    require("seed", seed, 0)
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)
    return [order[start : start + batch_size] for start in range(0, num_rows, batch_size)]


def schedule(num_rows: int, batch_size: int, *, wanted: int, seed: int) -> list[np.ndarray]:
    """Batches of one epoch after another until `wanted` rows are read, and what is left of the last batch."""
    require("num_rows", num_rows, 1)
    order: list[np.ndarray] = []
    read = 0
    for epoch in itertools.count():
        for rows in batches(num_rows, batch_size, seed=seed, epoch=epoch):
            if read >= wanted:
                return order
            order.append(rows)
            read += len(rows)
    raise AssertionError  # epochs do not end
