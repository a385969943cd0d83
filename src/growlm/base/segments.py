"""Segments: new tokens of several texts in one pass, each text after keys and values of its own.

The tokens stand one after another in a single row (1, t), so that a layer's matrices meet all of them at once and no
text is padded to another's length; attention alone tells them apart. Knows how transformers' layers ask for attention
and hand over keys and values; not what a text is for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from growlm.base.cache import KVCache

# t new tokens of all texts together, n those of one, s its tokens so far and new ones, h heads, w head width

_PREFIX = "growlm-"  # of what attention is called that tells segments apart


@dataclass(frozen=True)
class Segment:
    """The new tokens of one text.

    Attributes:
        tokens: how many.
        past: how many of the text's tokens are in `cache` already.
        cache: keys and values of this text alone.
    """

    tokens: int
    past: int
    cache: KVCache


class SegmentCache(Cache):
    """Takes the keys and values of all segments together and hands each segment's to its own cache."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__(layers=[])
        self.segments = tuple(segments)
        self._joined: list[tuple[Tensor, Tensor]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Of the new tokens (1, h, t, w). What attention is to see is told by `SegmentMask.parts`."""
        sizes = [segment.tokens for segment in self.segments]
        parts = zip(key_states.split(sizes, dim=2), value_states.split(sizes, dim=2), strict=True)
        self._joined = [
            segment.cache.update(key, value, layer_idx)
            for segment, (key, value) in zip(self.segments, parts, strict=True)
        ]
        return key_states, value_states

    def take(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (1, h, s, w) of each segment, in the layer that has just updated them."""
        joined, self._joined = self._joined, []
        return joined


@dataclass(frozen=True)
class SegmentMask:
    """What a layer is given for a mask: which tokens are of one text, and each text's own mask.

    Attributes:
        masks: (1, 1, n, s) for each segment, or None for plain causal.
    """

    cache: SegmentCache
    masks: tuple[Tensor | None, ...]

    def attend(
        self, query: Tensor, of_one: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor], dim: int
    ) -> Tensor:
        """Attention of each text alone, joined again in dimension `dim`.

        Args:
            query: (1, h, t, w).
            of_one: makes of queries (1, h, n, w), keys and values (1, h, s, w) and a mask what attention gives.
        """
        return torch.cat([of_one(*part) for part in self._parts(query)], dim=dim)

    def _parts(self, query: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        queries = query.split([segment.tokens for segment in self.cache.segments], dim=2)
        for own, (key, value), mask in zip(queries, self.cache.take(), self.masks, strict=True):
            yield own, key, value, mask


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

        return attention_mask.attend(query, of_one, dim=1), None

    return attention
