"""Keys and values of finished texts, kept for their continuation.

They belong to one module set: the set's digest is part of every key, and a continuation under another set never sees
them (guarantee 4). Knows token ids and caches; runs no layer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from growlm.base.cache import KVCache


@dataclass
class Prefix:
    """What is kept of one finished text: its tokens, and their keys and values under one module set."""

    digest: str
    tokens: tuple[int, ...]
    cache: KVCache


class PrefixCache:
    """Finished texts, for the next turn of a conversation; bounded in bytes, least recently used goes first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[tuple[str, tuple[int, ...]], Prefix] = OrderedDict()

    def put(self, digest: str, tokens: Sequence[int], cache: KVCache) -> None:
        key = (digest, tuple(tokens))
        self._entries[key] = Prefix(digest, key[1], cache)
        self._entries.move_to_end(key)
        while sum(e.cache.num_bytes() for e in self._entries.values()) > self._limit:
            self._entries.popitem(last=False)

    def take(self, digest: str, tokens: Sequence[int]) -> Prefix | None:
        """The longest text kept under module set `digest` that `tokens` continues by at least one token. It leaves the
        cache: who continues it writes into it."""
        wanted = tuple(tokens)
        fits = [k for k in self._entries if k[0] == digest and len(k[1]) < len(wanted) and wanted[: len(k[1])] == k[1]]
        return self._entries.pop(max(fits, key=lambda k: len(k[1]))) if fits else None

    def clear(self) -> None:
        self._entries.clear()
