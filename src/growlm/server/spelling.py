"""Spelling: tokens as texts and as bytes, some of which are parts of a character, and where in a text each begins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

_HALF = "\ufffd"  # what stands where bytes are no character
_BYTE = re.compile(r"<0x([0-9A-F]{2})>$")  # as tokenizers that fall back to bytes call one


class Spelling:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def texts(self, tokens: Sequence[int]) -> list[str]:
        """Of each token alone."""
        return [self._tokenizer.decode([token]) for token in tokens]

    def bytes_of(self, token: int) -> list[int]:
        """What a token adds to the bytes of a text."""
        (text,) = self.texts([token])
        if _HALF not in text:
            return list(text.encode())
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if found := _BYTE.match(piece):
            return [int(found[1], 16)]
        if all(sign in self._of_signs for sign in piece):
            return [self._of_signs[sign] for sign in piece]
        return list(text.encode())

    @cached_property
    def _of_signs(self) -> dict[str, int]:
        """The byte that each sign stands for in the vocabulary of a tokenizer of bytes; empty of others. Bytes that
        print stand for themselves, the others for signs from 256 on, in their order."""
        if "ByteLevel" not in repr(self._tokenizer.backend_tokenizer.decoder):
            return {}
        prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in prints]
        return {chr(b): b for b in prints} | {chr(256 + n): b for n, b in enumerate(others)}

    def begins(self, at: int = 0) -> Places:
        """Where the tokens of a text begin that itself begins there."""
        return Places(self._tokenizer, at)


class Places:
    """Where each token of a text begins, in characters; one that ends a character begins where that one does."""

    def __init__(self, tokenizer: Any, at: int) -> None:
        self._tokenizer, self._at = tokenizer, at
        self._parts: list[int] = []  # of a character that is not whole

    def of(self, tokens: Sequence[int]) -> list[int]:
        """Of those that come next."""
        found = []
        for token in tokens:
            found.append(self._at)
            self._parts.append(token)
            text = self._tokenizer.decode(self._parts)
            if not text.endswith(_HALF) or len(self._parts) >= 4:
                self._at += len(text)
                self._parts = []
        return found
