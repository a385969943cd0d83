"""Packing: documents -> token ids in rows for training, in passages for evaluation, and the order of batches.

Texts are one stream that is cut into windows. A conversation stands in one row from its beginning, cut to the row's
length, and a mask says which of its tokens are learned.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from growlm.data.cutting import cut_text, require
from growlm.data.encoding import encode_texts, start_tokens
from growlm.data.reading import Document
from growlm.data.records import one_line
from growlm.data.template import Template
from growlm.errors import ConfigError, DataError, setting
from growlm.progress import phase, say, track

if TYPE_CHECKING:
    import torch

# A tokenizer holds some 200 bytes for every token of a call, so a call gets so many texts of bounded length.
TOKENIZE_TEXTS = 256
TOKENIZE_CHARS = 1 << 15

LOSSES = ("answers", "all")  # what of conversations is learned
_NAMED = 3  # conversations in a remark
NOT_COUNTED = -1  # as a label


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """Rows of token ids: `tokens` (N, T + 1) int32, read-only, T the sequence length.

    Row i holds the inputs `[:-1]` and the labels `[1:]`. Every token of the stream of texts is a label exactly once,
    but for start tokens that begin a row, or where there are none, for the first: such rows overlap by one token.

    Attributes:
        counted: (N, T + 1) bool: which tokens are learned as labels, at least one in each row; None for all.
    """

    tokens: np.ndarray
    counted: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def joined(cls, parts: Sequence[PackedTokens]) -> PackedTokens:
        """The rows of several, one after another."""
        tokens = np.concatenate([part.tokens for part in parts])
        if all(part.counted is None for part in parts):
            return cls(tokens)
        masks = [np.ones(p.tokens.shape, dtype=bool) if p.counted is None else p.counted for p in parts]
        return cls(tokens, np.concatenate(masks))

    def __getitem__(self, indices: Sequence[int] | np.ndarray | slice) -> torch.LongTensor:
        """The rows at `indices` as a batch (b, T + 1) of int64."""
        import torch

        rows: Any = torch.from_numpy(self.tokens[indices].astype(np.int64))
        return rows

    def labels(self, indices: Sequence[int] | np.ndarray | slice) -> torch.LongTensor:
        """The labels (b, T) of the rows at `indices`, below 0 where they are not counted."""
        import torch

        found: Any = self[indices][:, 1:]
        if self.counted is not None:
            found = found.masked_fill(~torch.from_numpy(self.counted[indices][:, 1:]), NOT_COUNTED)
        return found

    @property
    def num_tokens(self) -> int:
        """Labels in all rows."""
        return len(self) * (self.tokens.shape[1] - 1)

    @property
    def num_counted(self) -> int:
        """Labels that are learned."""
        return self.num_tokens if self.counted is None else int(self.counted[:, 1:].sum())


def pack(
    documents: Iterable[Document],
    tokenizer: Any,
    sequence_length: int,
    *,
    max_tokens: int | None = None,
    loss: str = "answers",
) -> PackedTokens:
    """Rows of `sequence_length` labels: windows over all texts, each between `start_tokens` and end-of-text, then those
    of conversations. Every row begins with `start_tokens`, as every prompt does: a base that expects one reads text
    without it as no text that it knows, and an adapter would learn to mend that instead of learning the text.

    `tokenizer` is a `PreTrainedTokenizerFast`; special tokens written out in a text are letters. Texts of more than
    about thirty thousand characters are tokenized in pieces. At most `max_tokens` labels of texts and as many of
    conversations are kept, and an incomplete last window is dropped.

    Args:
        loss: of conversations: "answers" counts what the assistant says, with the end of its turn; "all" counts all.

    Raises `DataError` for less than one window and a conversation that the tokenizer's chat template cannot write,
    `ConfigError` for a tokenizer without an end-of-text token, or for conversations without a chat template.
    """
    require(setting("sequence_length"), sequence_length, 1)
    if max_tokens is not None:
        require("max_tokens", max_tokens, sequence_length)
    _require_loss(loss)
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-text token to join documents; set its eos_token")
    texts, talks = _parted(documents)
    parts = [_windows(texts, tokenizer, sequence_length, max_tokens)] if texts or not talks else []
    if talks:
        parts.append(_rows([talk for _, talk in talks], tokenizer, sequence_length, max_tokens, loss))
    return parts[0] if len(parts) == 1 else PackedTokens.joined(parts)


def _require_loss(loss: str) -> None:
    if loss not in LOSSES:
        raise ConfigError(f"{setting('loss')} {loss!r} is not one of {', '.join(LOSSES)}")


def _parted(documents: Iterable[Document]) -> tuple[Sequence[Document], list[tuple[int, Document]]]:
    """Texts, and conversations with their place."""
    documents = documents if isinstance(documents, Sequence) else list(documents)
    talks = [(place, document) for place, document in enumerate(documents) if document.turns]
    return ([d for d in documents if not d.turns] if talks else documents), talks


def _windows(
    documents: Sequence[Document], tokenizer: Any, sequence_length: int, max_tokens: int | None
) -> PackedTokens:
    begin = np.array(start_tokens(tokenizer), dtype=np.int32)
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    parts: list[np.ndarray] = []
    total = 0
    known = (len(documents), "documents") if max_tokens is None else (max_tokens, "tokens")
    with phase("tokenizing", *known) as tokenizing:
        for ids in _token_ids(documents, tokenizer):
            parts += [begin, ids, end]
            more = len(begin) + len(ids) + 1
            total += more
            tokenizing.advance(1 if max_tokens is None else more)
            # One more for each row, which may begin with a start token of the stream.
            if max_tokens is not None and total > max_tokens + len(begin) * (max_tokens // sequence_length):
                break
    if total <= sequence_length:
        found = f"{total} tokens, sequence length {sequence_length}"
        raise DataError(f"less than one sequence: {found}; give more text or a smaller --sequence-length")
    stream = np.concatenate(parts)
    if len(begin):
        return PackedTokens(_begun_rows(stream, begin, sequence_length, max_tokens))
    windows = np.lib.stride_tricks.sliding_window_view(
        stream[: None if max_tokens is None else max_tokens + 1], sequence_length + 1
    )
    return PackedTokens(windows[::sequence_length])


def _begun_rows(stream: np.ndarray, begin: np.ndarray, sequence_length: int, max_tokens: int | None) -> np.ndarray:
    """Rows (N, T + 1) that each begin with the start token, one of the stream's own where it stands there."""
    most = (len(stream) if max_tokens is None else max_tokens) // sequence_length
    found = np.empty((most, sequence_length + 1), dtype=stream.dtype)
    row = at = 0
    while row < most:
        own = 0 if at < len(stream) and stream[at] == begin[0] else 1
        taken = sequence_length + 1 - own
        if at + taken > len(stream):
            break
        found[row, :own], found[row, own:] = begin[:own], stream[at : at + taken]
        row, at = row + 1, at + taken
    found.flags.writeable = False
    return found[:row]


def _rows(
    talks: Sequence[Document], tokenizer: Any, sequence_length: int, max_tokens: int | None, loss: str
) -> PackedTokens:
    """Conversations, each in the row with the least room that has enough for it; the rest of a row is end-of-text."""
    end, size = tokenizer.eos_token_id, sequence_length + 1
    rows: list[list[tuple[np.ndarray, np.ndarray]]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # rows by how much room they have
    rooms = 0  # bit i: some row has room for i tokens and no more
    total = 0
    written = _written(talks, tokenizer, size, loss)
    for _, tokens, counted in track(written, "tokenizing", "conversations", total=len(talks)):
        # A document ends with end-of-text, which is not learned: a template writes what ends an answer.
        if len(tokens) < size and tokens[-1] != end:
            tokens, counted = [*tokens, end], [*counted, False]
        fitting = rooms >> len(tokens)
        if fitting:
            room = len(tokens) + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            row, room = len(rows), size
            rows.append([])
        mask = np.array(counted, dtype=bool)
        mask[0] = False  # it is predicted from nothing, or another's end
        rows[row].append((np.array(tokens, dtype=np.int32), mask))
        room -= len(tokens)
        with_room[room].append(row)
        rooms |= 1 << room
        total += len(tokens)
        if max_tokens is not None and total > max_tokens:
            break
    if not rows:
        raise DataError(
            f"no conversation has an answer within {sequence_length} tokens; give a larger --sequence-length"
        )
    shape = (len(rows), size)
    ids, masks = np.full(shape, end, dtype=np.int32), np.zeros(shape, dtype=bool)
    for row, parts in enumerate(rows):
        at = 0
        for part, mask in parts:
            ids[row, at : at + len(part)], masks[row, at : at + len(part)] = part, mask
            at += len(part)
    most = None if max_tokens is None else max_tokens // sequence_length
    return PackedTokens(ids[:most], masks[:most])


def _written(
    talks: Sequence[Document], tokenizer: Any, size: int, loss: str
) -> Iterator[tuple[int, list[int], list[bool]]]:
    """Place, token ids and what of them is learned, of every conversation that has something to learn among its first
    `size` tokens.

    Raises:
        DataError: the template cannot write one.
    """
    template = Template(tokenizer)
    lost = []
    for place, talk in enumerate(talks):
        try:
            found = template.write(talk.turns)
        except Exception as error:  # a template's own words, or what its language finds wrong with it
            raise DataError(
                f"{talk.source}: the base's chat template cannot write this conversation ({one_line(error)}); correct "
                "it or drop it"
            ) from error
        tokens = found.tokens[:size]
        counted = found.answers[:size] if loss == "answers" else [True] * len(tokens)
        if any(counted[1:]):
            yield place, tokens, counted
        else:
            lost.append(talk.source)
    if lost:
        named = ", ".join(lost[:_NAMED]) + (", ..." if len(lost) > _NAMED else "")
        many = f"{len(lost):,} of {len(talks):,} conversations"
        say(f"{many} have no answer within {size - 1:,} tokens and are left out: {named}")


@dataclass(frozen=True, slots=True)
class Passage:
    """Consecutive token ids of one document after the start token, and that document's place in what was given."""

    tokens: list[int]
    document_index: int
    counted: list[bool] | None = None  # which tokens of a conversation are scored; None for all

    @property
    def num_scored(self) -> int:
        return len(self.tokens) - 1 if self.counted is None else sum(self.counted[1:])

    def beginning(self, num_tokens: int) -> Passage:
        """Its first tokens, at most so many."""
        counted = None if self.counted is None else self.counted[:num_tokens]
        return replace(self, tokens=self.tokens[:num_tokens], counted=counted)


def passages(
    documents: Iterable[Document],
    tokenizer: Any,
    sequence_length: int,
    *,
    limit: int | None = None,
    loss: str = "answers",
) -> list[Passage]:
    """Every document by itself in pieces of at most `sequence_length` tokens, for evaluation one by one.

    Every piece begins with `start_tokens`, which count. There is no end-of-text, and pieces of less than two
    tokens, which predict nothing, are dropped. At most `limit` passages, the first ones, are returned.

    A conversation is one passage, cut to the length, in which the same tokens count as in training (`pack`).
    """
    require(setting("sequence_length"), sequence_length, 2)
    _require_loss(loss)
    texts, talks = _parted(documents)
    if talks:
        places = [place for place, _ in talks]
        where = sorted(set(range(len(texts) + len(talks))) - set(places))
        found = [
            replace(p, document_index=where[p.document_index]) for p in passages(texts, tokenizer, sequence_length)
        ]
        for place, tokens, counted in _written([talk for _, talk in talks], tokenizer, sequence_length, loss):
            found.append(Passage(tokens, places[place], counted))
        return sorted(found, key=lambda p: p.document_index)[:limit]
    begin = start_tokens(tokenizer)
    room = sequence_length - len(begin)
    tokenized = track(_token_ids(texts, tokenizer), "tokenizing", "documents", total=len(texts))
    pieces = (
        Passage(begin + ids[at : at + room].tolist(), index)
        for index, ids in enumerate(tokenized)
        for at in range(0, len(begin) + len(ids) - 1, room)  # without a start token, not from the last token alone
    )
    return list(itertools.islice(pieces, limit))


def masks_of(found: Sequence[Passage]) -> list[list[bool]] | None:
    """Which tokens of passages are scored; None for all."""
    if all(p.counted is None for p in found):
        return None
    return [[True] * len(p.tokens) if p.counted is None else p.counted for p in found]


def whole(documents: Sequence[Document], tokenizer: Any) -> Iterator[np.ndarray]:
    """All token ids (n,) int32 of each document in turn, a conversation as the chat template writes it.

    Raises:
        DataError: a conversation that the template cannot write.
        ConfigError: conversations without a chat template.
    """
    texts, talks = _parted(documents)
    if not talks:
        yield from _token_ids(documents, tokenizer)
        return
    written, plain = _written([talk for _, talk in talks], tokenizer, 1 << 40, "all"), _token_ids(texts, tokenizer)
    for document in documents:
        yield np.array(next(written)[1], dtype=np.int32) if document.turns else next(plain)


def _token_ids(documents: Iterable[Document], tokenizer: Any) -> Iterator[np.ndarray]:
    """Token ids (n,) int32 of each document in turn."""
    parts: list[np.ndarray] = []
    pieces = _pieces(documents)
    while batch := list(itertools.islice(pieces, TOKENIZE_TEXTS)):
        for (_, last), ids in zip(batch, encode_texts(tokenizer, [piece for piece, _ in batch]), strict=True):
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
