"""Keys and values of texts that were read, for texts that begin alike.

They lie in blocks of tokens, each known by its tokens, all those before it and whose it is: what texts have in common
at their beginning is held once, as in vLLM's prefix caching (Kwon et al., 2023). Below a fork they are the base's, and
serve every module; with them are the hidden states with which modules branch off. What lies above is a module set's
own: its digest is part of every key, and a text under another set, or another version, never meets it (guarantee 4).
Knows token ids and tensors; runs no layer.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from growlm.base.rooms import TextCache
from growlm.base.sizes import tensor_bytes

# h heads, n tokens of a text, w head width, d hidden size

BLOCK = 32  # tokens
BASE = ""  # whose keys and values lie below every fork; no digest is empty


@dataclass(eq=False)
class Block:
    """So many tokens' keys and values (h, BLOCK, w) by slot, and hidden states (BLOCK, d) by the layer before which
    they are."""

    slots: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)

    def num_bytes(self) -> int:
        return tensor_bytes([t for pair in self.slots.values() for t in pair] + list(self.states.values()))


@dataclass(frozen=True)
class Beginning:
    """The blocks of a text's first tokens."""

    blocks: Sequence[Block]

    @property
    def tokens(self) -> int:
        return BLOCK * len(self.blocks)

    def fill(self, cache: TextCache, slots: Collection[int]) -> None:
        """Copies its keys and values into a text's slots, which are empty."""
        for slot in slots if self.blocks else ():
            pairs = [block.slots[slot] for block in self.blocks]
            cache.update(slot, torch.cat([k for k, _ in pairs], 1)[None], torch.cat([v for _, v in pairs], 1)[None])

    def states(self, layer: int) -> Tensor:
        """(1, n, d)."""
        return torch.cat([block.states[layer] for block in self.blocks])[None]


class PrefixCache:
    """Blocks of texts, bounded in bytes: what was used least recently goes first, a text's end before its beginning.

    Args:
        limit: bytes that there may be now.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        # A text's blocks are marked as used from its last to its first, so that none outlives what it continues.
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def num_bytes(self) -> int:
        return self._bytes

    def find(
        self,
        owner: str,
        tokens: Sequence[int],
        slots: Collection[int],
        states: Collection[int] = (),
        *,
        salt: str = "",
    ) -> Beginning:
        """The longest beginning of `tokens`, without the last of them, of which all these slots and states are there.

        Args:
            owner: BASE, or a module set's digest.
            salt: texts with another one are never met.
        """
        with self._lock:
            found: list[tuple[bytes, Block]] = []
            for key in _keys(owner, salt, tokens[:-1]):
                block = self._blocks.get(key)
                if block is None or not (block.slots.keys() >= set(slots) and block.states.keys() >= set(states)):
                    break
                found.append((key, block))
            self._use([key for key, _ in found])
            return Beginning([block for _, block in found])

    @torch.inference_mode()
    def put(
        self,
        owner: str,
        tokens: Sequence[int],
        cache: TextCache,
        slots: Collection[int],
        states: Mapping[int, Tensor] | None = None,
        *,
        salt: str = "",
    ) -> None:
        """Copies what is not there yet of a text whose keys and values are in `cache`, as far as there is room.

        Args:
            states: (1, n, d) by layer.
        """
        states, limit = {} if states is None else states, self._limit()
        with self._lock:
            mine: list[bytes] = []
            for number, key in enumerate(_keys(owner, salt, tokens)):
                block = self._blocks.get(key)
                if block is not None:
                    mine.append(key)
                else:
                    block = Block()
                part = slice(BLOCK * number, BLOCK * (number + 1))
                new = Block()
                for slot in set(slots) - block.slots.keys():
                    keys, values = cache.of(slot)
                    new.slots[slot] = keys[0, :, part], values[0, :, part]
                new.states = {layer: h[0, part] for layer, h in states.items() if layer not in block.states}
                if not new.slots and not new.states:
                    continue
                if not self._make_room(limit - new.num_bytes(), mine):
                    break
                self._bytes += new.num_bytes()
                block.slots |= {slot: (keys.clone(), values.clone()) for slot, (keys, values) in new.slots.items()}
                block.states |= {layer: hidden.clone() for layer, hidden in new.states.items()}
                if key not in self._blocks:
                    self._blocks[key] = block
                    mine.append(key)
            self._use(mine)

    def shrink(self) -> None:
        """Lets go of what there is no room for any more."""
        limit = self._limit()
        with self._lock:
            self._make_room(limit, ())

    def clear(self) -> None:
        with self._lock:
            self._blocks.clear()
            self._bytes = 0

    def _use(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            self._blocks.move_to_end(key)

    def _make_room(self, limit: int, keep: Collection[bytes]) -> bool:
        """Lets go of others until there are no more bytes than that, if that is enough."""
        if self._bytes <= limit:
            return True
        if sum(self._blocks[key].num_bytes() for key in keep) > limit:
            return False
        self._use(list(keep))
        while self._bytes > limit and len(self._blocks) > len(keep):
            _, block = self._blocks.popitem(last=False)
            self._bytes -= block.num_bytes()
        return self._bytes <= limit


def _keys(owner: str, salt: str, tokens: Sequence[int]) -> list[bytes]:
    """Of a text's whole blocks."""
    key = hashlib.sha256(f"{len(salt)}:{salt}{owner}".encode("utf-8", "surrogatepass")).digest()
    keys = []
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        key = hashlib.sha256(key + array("q", tokens[start : start + BLOCK]).tobytes()).digest()
        keys.append(key)
    return keys
