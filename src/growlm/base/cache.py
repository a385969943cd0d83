"""Cache: keys and values of a batch, as transformers' layers fill and read them.

A subclass of transformers' own cache, so that its protocol is inherited, whatever a release adds to it; what is ours
is room to grow and that slots can be shared and selected. Knows tensors; runs no layer, knows no module.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from growlm.base.sizes import tensor_bytes

# b batch, h heads, t tokens, d head width

_SPARE = 64  # tokens of room beyond what is needed now

# What the installed transformers calls a cache in arguments and outputs: `cache` from 5.24 on.
CACHE_NAME = next(
    name for name in ("cache", "past_key_values") if name in {f.name for f in fields(BaseModelOutputWithPast)}
)


def cache_of(output: Any) -> Any:
    """The cache in a transformers model's output, None if there is none."""
    return getattr(output, CACHE_NAME)


class _Slot(DynamicLayer):
    """Keys and values of one layer, (b, h, t, d) each: the filled part of buffers with room to grow."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._rooms: tuple[Tensor, Tensor] | None = None
        self._filled: tuple[Tensor, Tensor] | None = None  # `keys` and `values`, where they are views of the rooms

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        length = start + key_states.shape[2]
        ours = self._filled is not None and self.keys is self._filled[0] and self.values is self._filled[1]
        if self._rooms is None or not ours or self._rooms[0].shape[2] < length:
            self._rooms = (
                _room(self.keys, key_states, start, length),
                _room(self.values, value_states, start, length),
            )
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, start:length] = new
        self._filled = (self._rooms[0][:, :, :length], self._rooms[1][:, :, :length])
        self.keys, self.values = self._filled
        return (key_states, value_states) if start == 0 else self._filled

    def select(self, rows: Tensor) -> _Slot:
        """A slot with these rows of the batch, copied."""
        chosen = _Slot()
        if self.is_initialized:
            chosen.lazy_initialization(self.keys, self.values)
            chosen.keys, chosen.values = self.keys[rows], self.values[rows]
        return chosen

    def num_bytes(self) -> int:
        held = self._rooms if self._rooms is not None else (self.keys, self.values)
        return tensor_bytes(t for t in held if t is not None)


def _room(old: Tensor, new: Tensor, start: int, length: int) -> Tensor:
    room = length + max(_SPARE, length // 2)
    grown = new.new_empty(new.shape[0], new.shape[1], room, new.shape[3])
    if start:
        grown[:, :, :start] = old
    return grown


class KVCache(Cache):
    """Keys and values of a batch, one slot a layer. Attention calls `update`, by its `layer_idx`."""

    layers: list[_Slot]  # type: ignore[assignment]

    def __init__(self, slots: int) -> None:
        super().__init__(layers=[_Slot() for _ in range(slots)])

    def select(self, rows: Tensor | None, start: int = 0, stop: int | None = None) -> KVCache:
        """Slots `start` to `stop` with these rows of the batch, copied; the slots outside are empty.

        With `rows` None the slots are this cache's own, not copies.
        """
        stop = len(self.layers) if stop is None else stop
        chosen = KVCache(len(self.layers))
        chosen.layers[start:stop] = [s if rows is None else s.select(rows) for s in self.layers[start:stop]]
        return chosen

    def length(self, slot: int) -> int:
        """Tokens in a slot."""
        return self.layers[slot].get_seq_length()

    def num_bytes(self) -> int:
        return sum(slot.num_bytes() for slot in self.layers)
