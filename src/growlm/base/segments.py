"""Segments: new tokens of several texts in one pass, each text after keys and values of its own.

The tokens stand one after another in a single row (1, t), so that a layer's matrices meet all of them at once and no
text is padded to another's length; attention alone tells them apart. Knows how transformers' layers ask for attention
and hand over keys and values; not what a text is for.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from growlm.base.rooms import Side, TextCache

# t new tokens of all texts together, n those of one, s its tokens so far and new ones, h heads, w head width

_PREFIX = "growlm-"  # of what attention is called that tells segments apart


@dataclass(frozen=True)
class Segment:
    """The new tokens of one text.

    Attributes:
        tokens: how many.
        past: how many of the text's tokens are in `cache` already, which has room for these too.
    """

    tokens: int
    past: int
    cache: TextCache


class SegmentCache(Cache):
    """Takes the keys and values of all segments together and hands each segment's to its own text.

    Attributes:
        starts: where each segment's tokens begin among all.
        sides: segments of a single token, by the room that their texts are in.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        super().__init__(layers=[])
        self.segments = tuple(segments)
        self.starts = [0, *itertools.accumulate(segment.tokens for segment in segments)]
        self.total = self.starts.pop()
        self.slot = 0
        by_room: dict[int, list[tuple[int, TextCache, int]]] = {}
        self.longer: list[int] = []  # segments of more than one token
        for number, (start, segment) in enumerate(zip(self.starts, segments, strict=True)):
            if segment.tokens > 1:
                self.longer.append(number)
                continue
            assert segment.cache.room is not None
            by_room.setdefault(segment.cache.room.size, []).append((start, segment.cache, segment.past))
        self.sides: list[Side] = []
        for texts in by_room.values():
            room = texts[0][1].room
            assert room is not None
            self.sides.append(Side(room, texts, self.total, device))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Of the new tokens (1, h, t, w). What attention is to see is found through `SegmentMask`."""
        self.slot = layer_idx
        for side in self.sides:
            side.update(layer_idx, key_states, value_states)
        for number in self.longer:
            own, segment = self.tokens_of(number), self.segments[number]
            segment.cache.update(layer_idx, key_states[:, :, own], value_states[:, :, own])
        return key_states, value_states

    def tokens_of(self, number: int) -> slice:
        """Which of all tokens are a segment's."""
        return slice(self.starts[number], self.starts[number] + self.segments[number].tokens)


OfOne = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class SegmentMask:
    """What a layer is given for a mask: which tokens are of one text, and each text's own mask.

    Attributes:
        masks: (1, 1, n, s) for each segment, or None for plain causal.
        side_masks: (r, 1, 1, s) for each of the cache's sides.
    """

    cache: SegmentCache
    masks: tuple[Tensor | None, ...]
    side_masks: tuple[Tensor, ...]

    def attend(self, query: Tensor, of_one: OfOne) -> Tensor:
        """Attention (1, t, h, w) of all tokens, those of a single new token of many texts at once.

        Args:
            query: (1, h, t, w).
            of_one: makes of queries (b, h, n, w), keys and values (b, h, s, w) and a mask what attention gives,
                (b, n, h, w).
        """
        cache = self.cache
        if len(cache.sides) == 1 and not cache.longer and cache.sides[0].whole:
            return self._side(0, query, of_one)[None]
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        for number, side in enumerate(cache.sides):
            out[0, side.tokens] = self._side(number, query, of_one)
        for number in cache.longer:
            own = cache.tokens_of(number)
            keys, values = cache.segments[number].cache.of(cache.slot)
            out[:, own] = of_one(query[:, :, own], keys, values, self.masks[number])
        return out

    def attend_each(self, query: Tensor, of_one: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Causal attention (1, h, t, w) of each text alone, for what knows no mask of rows.

        Args:
            of_one: makes of queries (1, h, n, w) and keys and values (1, h, s, w) what attention gives, (1, h, n, w).
        """
        cache = self.cache
        parts = []
        for number, segment in enumerate(cache.segments):
            keys, values = segment.cache.of(cache.slot)
            parts.append(of_one(query[:, :, cache.tokens_of(number)], keys, values))
        return torch.cat(parts, dim=2)

    def _side(self, number: int, query: Tensor, of_one: OfOne) -> Tensor:
        side = self.cache.sides[number]
        keys, values = side.of(self.cache.slot)
        return side.results(of_one(side.queries(query), keys, values, self.side_masks[number]))


def tell_segments_apart(config: Any) -> None:
    """Has the attention of all layers of this config understand a `SegmentMask`; with any other mask it computes what
    it did before, by the same function."""
    plain: str = config._attn_implementation
    if plain.startswith(_PREFIX):
        return
    name = _PREFIX + plain
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, _attention(plain))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[plain])
    config._attn_implementation = name


def _attention(plain: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
    ) -> tuple[Tensor, Tensor | None]:
        # What a family does where nothing is registered stands beside its layers, under this name.
        own: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        of_family = ALL_ATTENTION_FUNCTIONS.get_interface(plain, own)
        if not isinstance(attention_mask, SegmentMask):
            return of_family(module, query, key, value, attention_mask, **settings)

        def of_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            out: Tensor = of_family(module, query, key, value, mask, **settings)[0]
            return out

        return attention_mask.attend(query, of_one), None

    return attention
