"""Rooms: keys and values of many texts, those of like length side by side, so that one attention reads them together.

A text has a row in a room that holds texts of up to so many tokens, and moves to the next larger one as it grows. Rows
stay dense: when a text leaves, the last one takes its place. What rooms take at the most is known before anything runs
(`bytes_for`). Knows tensors; runs no layer and knows no module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from growlm.base.sizes import tensor_bytes

# r rows, h heads, s tokens, w head width

_SMALLEST = 128  # tokens of a room; each is twice the one before


class Room:
    """Texts of up to `size` tokens.

    Attributes:
        texts: by row.
        keys, values: (r, h, size, w) of each layer's slot, with rows to spare; zero or finite everywhere.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.texts: list[TextCache] = []
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def take(self, text: TextCache) -> int:
        """A row for a text."""
        rows = len(self.texts) + 1
        for tensors in (self.keys, self.values):
            for slot, tensor in tensors.items():
                if rows > len(tensor):
                    tensors[slot] = self._with_rows(tensor, slot, _rows(rows))
        self.texts.append(text)
        return rows - 1

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """The last text takes this row's place, and what is not needed any more is given back."""
        self.clear(row, self.texts[row].lengths)
        last = self.texts.pop()
        if row < len(self.texts):
            for slot, length in last.lengths.items():
                for tensor in (self.keys[slot], self.values[slot]):
                    tensor[row, :, :length] = tensor[last.row, :, :length]
            self.clear(last.row, last.lengths)
            self.texts[row], last.row = last, row
        rows = len(self.texts)
        held = {slot for text in self.texts for slot in text.lengths}
        for tensors in (self.keys, self.values):
            for slot, tensor in list(tensors.items()):
                if slot not in held:
                    del tensors[slot]
                elif len(tensor) > _most_rows(rows):
                    tensors[slot] = self._with_rows(tensor, slot, _rows(rows))

    def clear(self, row: int, lengths: dict[int, int]) -> None:
        """Leaves nothing of a text in a row: a number that is none would spoil what is read beside it, seen or not."""
        for slot, length in lengths.items():
            for tensors in (self.keys, self.values):
                if slot in tensors:
                    tensors[slot][row, :, :length] = 0

    def open(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Has a slot for keys and values like these (., h, ., w)."""
        if slot not in self.keys:
            rows = _rows(len(self.texts))
            sizes = [(rows, new.shape[1], self.size, new.shape[3]) for new in (keys, values)]
            self.keys[slot], self.values[slot] = keys.new_zeros(sizes[0]), values.new_zeros(sizes[1])

    def num_bytes(self) -> int:
        return tensor_bytes([*self.keys.values(), *self.values.values()])

    def _with_rows(self, tensor: Tensor, slot: int, rows: int) -> Tensor:
        grown = tensor.new_zeros(rows, *tensor.shape[1:])
        for row, text in enumerate(self.texts):  # not what nobody has written to: it may take no memory yet
            length = text.length(slot)
            grown[row, :, :length] = tensor[row, :, :length]
        return grown


def _rows(texts: int) -> int:
    """Rows that a room is made with."""
    return texts + texts // 8


def _most_rows(texts: int) -> int:
    """Rows that a room keeps as texts leave: to give back each one at once would copy the others each time."""
    return texts + texts // 4


class Rooms:
    """All rooms of one engine."""

    def __init__(self) -> None:
        self._rooms: dict[int, Room] = {}

    def new(self) -> TextCache:
        """For a text of which nothing was read."""
        return TextCache(self)

    @staticmethod
    def bytes_for(texts: Iterable[tuple[int, int]], slot_bytes: Sequence[int]) -> int:
        """What rooms take at the most that hold such texts, each of which has reserved all the tokens that it comes to.

        Args:
            texts: each one's tokens, and its slots: the first so many.
            slot_bytes: of one token in each slot; slots beyond are as large as the largest.
        """
        rooms: dict[int, list[int]] = {}
        for tokens, slots in texts:
            if slots:
                rooms.setdefault(room_size(tokens), []).append(slots)
        total = 0
        for size, held in rooms.items():
            most = max(held)
            token = sum(slot_bytes[:most]) + max(most - len(slot_bytes), 0) * max(slot_bytes)
            total += _most_rows(len(held)) * size * token
        return total

    def room(self, tokens: int) -> Room:
        """The smallest for so many tokens."""
        size = room_size(tokens)
        return self._rooms.setdefault(size, Room(size))

    def drop_empty(self) -> None:
        self._rooms = {size: room for size, room in self._rooms.items() if room.texts}

    def num_bytes(self) -> int:
        return sum(room.num_bytes() for room in self._rooms.values())


class TextCache:
    """Keys and values of one text.

    Attributes:
        room, row: where they are; None before anything was reserved, and when they were given up.
        lengths: tokens in each slot.
    """

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self.room: Room | None = None
        self.row = 0
        self.lengths: dict[int, int] = {}

    @torch.inference_mode()
    def reserve(self, tokens: int) -> None:
        """Has room for so many tokens in all."""
        if self.room is not None and self.room.size >= tokens:
            return
        old, old_row, new = self.room, self.row, self._rooms.room(tokens)
        row = new.take(self)
        try:
            for slot, length in self.lengths.items():
                assert old is not None
                new.open(slot, old.keys[slot], old.values[slot])
                new.keys[slot][row, :, :length] = old.keys[slot][old_row, :, :length]
                new.values[slot][row, :, :length] = old.values[slot][old_row, :, :length]
        except BaseException:  # no memory, say: it stays where it was
            new.clear(row, self.lengths)
            new.texts.pop()
            raise
        self.room, self.row = new, row
        if old is not None:
            old.texts[old_row] = leaving = TextCache(self._rooms)
            leaving.lengths, leaving.row = self.lengths, old_row
            old.leave(old_row)
            self._rooms.drop_empty()

    @torch.inference_mode()
    def update(self, slot: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds those of new tokens (1, h, n, w), for which there is room; returns those of all, (1, h, s, w)."""
        assert self.room is not None
        self.room.open(slot, keys, values)
        start = self.length(slot)
        end = start + keys.shape[2]
        self.room.keys[slot][self.row, :, start:end] = keys[0]
        self.room.values[slot][self.row, :, start:end] = values[0]
        self.lengths[slot] = end
        return self.of(slot)

    def of(self, slot: int) -> tuple[Tensor, Tensor]:
        """Keys and values (1, h, s, w) of a slot."""
        assert self.room is not None
        row, length = slice(self.row, self.row + 1), self.length(slot)
        return self.room.keys[slot][row, :, :length], self.room.values[slot][row, :, :length]

    def length(self, slot: int) -> int:
        return self.lengths.get(slot, 0)

    @torch.inference_mode()
    def cut(self, slots: int) -> None:
        """Keeps the first so many slots alone."""
        if self.room is not None:
            self.room.clear(self.row, {slot: n for slot, n in self.lengths.items() if slot >= slots})
        self.lengths = {slot: length for slot, length in self.lengths.items() if slot < slots}

    @torch.inference_mode()
    def take_back(self, tokens: int) -> None:
        """Forgets the newest so many tokens of every slot."""
        if not tokens or self.room is None:
            return
        for slot, length in self.lengths.items():
            for tensors in (self.room.keys, self.room.values):
                tensors[slot][self.row, :, length - tokens : length] = 0
            self.lengths[slot] = length - tokens

    def copy(self) -> TextCache:
        """The same for another text that goes on from here."""
        other = TextCache(self._rooms)
        other.reserve(max(self.lengths.values(), default=0))
        for slot in self.lengths:
            other.update(slot, *self.of(slot))
        return other

    def free(self) -> None:
        """Gives up the place."""
        if self.room is not None:
            self.room.leave(self.row)
            self.room, self.lengths = None, {}
            self._rooms.drop_empty()


def room_size(tokens: int) -> int:
    """Tokens that a room for such a text holds."""
    size = _SMALLEST
    while size < tokens:
        size *= 2
    return size


class Side:
    """Texts of one room that each read one more token: what their attention needs, once for a pass.

    Attributes:
        tokens: (n,) which of the pass's tokens are theirs, one a text.
        whole: whether these are all of the pass's tokens, in the order of their rows.
        first, last: the rows from the first text's to behind the last one's.
        rows, ends: (n,) the row of each text, and its tokens so far.
        longest: tokens of the longest text, the new one included.
    """

    def __init__(self, room: Room, texts: list[tuple[int, TextCache, int]], total: int, device: torch.device) -> None:
        texts = sorted(texts, key=lambda text: text[1].row)
        rows = [text.row for _, text, _ in texts]
        self.room, self.texts = room, [text for _, text, _ in texts]
        places = [place for place, _, _ in texts]
        self.first, self.last = rows[0], rows[-1] + 1
        self.whole = places == list(range(total)) and self.last - self.first == len(rows)
        self.tokens = torch.tensor(places, device=device)
        self.rows = torch.tensor(rows, device=device)
        self.ends = torch.tensor([past for _, _, past in texts], device=device)
        self.longest = max(past for _, _, past in texts) + 1

    @torch.inference_mode()
    def update(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Adds those of the texts' new tokens, of all the pass's (1, h, t, w)."""
        self.room.open(slot, keys, values)
        for tensors, new in ((self.room.keys, keys), (self.room.values, values)):
            own = new[0] if self.whole else new[0][:, self.tokens]
            tensors[slot][self.rows, :, self.ends] = own.transpose(0, 1)
        for text in self.texts:
            text.lengths[slot] = text.length(slot) + 1

    def of(self, slot: int) -> tuple[Tensor, Tensor]:
        """Keys and values (r, h, longest, w) of all rows from the first to the last."""
        rows = slice(self.first, self.last)
        return self.room.keys[slot][rows, :, : self.longest], self.room.values[slot][rows, :, : self.longest]

    def queries(self, query: Tensor) -> Tensor:
        """Those of the texts, of all the tokens of a pass (1, h, t, w), by row: (r, h, 1, w), zero where none is."""
        own = query[0] if self.whole else query[0][:, self.tokens]
        if self.last - self.first == len(self.rows):
            return own.transpose(0, 1)[:, :, None]
        spread = query.new_zeros(self.last - self.first, query.shape[1], 1, query.shape[3])
        spread[self.rows - self.first, :, 0] = own.transpose(0, 1)
        return spread

    def results(self, by_row: Tensor) -> Tensor:
        """Of what attention gives by row, (r, 1, h, w), those of the texts: (n, h, w)."""
        return by_row[:, 0] if self.last - self.first == len(self.rows) else by_row[self.rows - self.first, 0]

    def mask(self, window: int | None, like: Tensor) -> Tensor:
        """(r, 1, 1, longest), to be added to scores: as low as can be where a text has no token yet, or none within the
        window."""
        ends = self.ends.new_zeros(self.last - self.first)
        ends[self.rows - self.first] = self.ends
        places = torch.arange(self.longest, device=ends.device)[None]
        unseen = places > ends[:, None]
        if window is not None:
            unseen = unseen | (places <= ends[:, None] - window)
        mask = torch.zeros(unseen.shape, dtype=like.dtype, device=like.device)
        return mask.masked_fill_(unseen, torch.finfo(like.dtype).min)[:, None, None]
