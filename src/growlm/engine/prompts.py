"""Prompts: text, or token ids as they are -> the ids that the base reads, refused where it could not read them.

Knows a tokenizer, and of the base which ids and how many positions it has; runs nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from growlm.base import Base
from growlm.data import LONG, encode_pieces, encode_texts, start_tokens
from growlm.errors import ConfigError, DataError, GrowlmWarning, setting

_SURELY = 1.1  # times as many tokens as there may be

Prompt = str | Sequence[int]  # text, or token ids as they are


class Prompts:
    """What is asked of one base.

    Args:
        strict: refuse what is longer than what the base's positions were made for; else a warning says so.
    """

    def __init__(self, base: Base, tokenizer: Any, *, strict: bool = False) -> None:
        self._base, self._tokenizer, self._strict = base, tokenizer, strict
        self._start = start_tokens(tokenizer)

    def encode(self, prompt: Prompt, new_tokens: int = 0, *, depth: int = 1) -> list[int]:
        """Token ids of one prompt.

        Args:
            new_tokens: that are written after it at most.
            depth: calls between this one and that of the user, whom a warning is for.

        Raises:
            DataError: it is empty, neither text nor token ids, or has ids that the base has no row for.
            ConfigError: it is too long for the base.
        """
        tokens = self._tokens(prompt, "the prompt")
        self._require_positions(len(tokens), new_tokens, depth)
        return tokens

    def encode_all(self, prompts: Sequence[Prompt], new_tokens: int) -> list[list[int]]:
        """Token ids of each of several prompts; errors are those of `encode`, and a warning tells of the longest."""
        if isinstance(prompts, str):
            raise ConfigError("prompts is one text; give a list of prompts")
        found = [self._tokens(prompt, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
        self._require_positions(max(map(len, found), default=0), new_tokens)
        return found

    def batch(self, input_ids: Any) -> Tensor:
        """Token ids (b, t) that came as a tensor, on the base's device.

        Raises:
            DataError: it is no such tensor, or has ids that the base has no row for.
            ConfigError: it is too long for the base.
        """
        if not isinstance(input_ids, Tensor):
            raise DataError(f"input_ids is {_described(input_ids)}; give a tensor (batch, tokens) of token ids")
        if input_ids.dtype == torch.bool or input_ids.is_floating_point() or input_ids.is_complex():
            raise DataError(f"input_ids has dtype {input_ids.dtype}; token ids are whole numbers: give torch.long")
        if input_ids.ndim != 2 or not input_ids.numel():
            shape = tuple(input_ids.shape)
            raise DataError(f"input_ids has shape {shape}, expected (batch, tokens), at least one of each")
        input_ids = input_ids.long()
        self._base.require_rows(input_ids, "input_ids", self._tokenizer)
        self._require_positions(input_ids.shape[1], 0)
        return input_ids.to(self._base.device)

    def require_room(self, text: str) -> None:
        """Counts a very long text's tokens, no further than is needed to know that it is too long, so that refusing it
        takes little.

        Raises:
            ConfigError: it is too long for the base.
        """
        made_for = self._base.trained_positions if self._strict else None
        limit = min((limit for limit in (self._base.max_positions, made_for) if limit is not None), default=None)
        if limit is None or len(text) <= LONG:
            return
        count = 0
        for ids in encode_pieces(self._tokenizer, text):
            count += len(ids)
            if count > _SURELY * limit:  # cut in pieces it has a few more
                raise ConfigError(
                    f"more than {limit} prompt tokens exceed the base's {limit} positions; shorten the prompt"
                )

    def _tokens(self, prompt: Prompt, called: str) -> list[int]:
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise DataError(f"{called} is not valid UTF-8; check the terminal's encoding") from None
            self.require_room(prompt)
            (text,) = encode_texts(self._tokenizer, [prompt])
            tokens = [*self._start, *text] if prompt.strip() else []
        else:
            tokens = _whole_numbers(prompt, called)
        if not tokens:
            raise DataError(f"{called} is empty; give some text")
        self._base.require_rows(tokens, called, self._tokenizer)
        return tokens

    def _require_positions(self, tokens: int, new_tokens: int, depth: int = 1) -> None:
        asked, hint = f"{tokens} prompt tokens", "shorten the prompt"
        if new_tokens:
            asked, hint = f"{asked} and {new_tokens} new ones", f"{hint} or lower {setting('max_new_tokens')}"
        limit = self._base.max_positions
        if limit is not None and tokens + new_tokens > limit:
            raise ConfigError(f"{asked} exceed the base's {limit} positions; {hint}")
        made_for = self._base.trained_positions
        if made_for is not None and tokens + new_tokens > made_for:
            message = f"{asked} exceed the {made_for} positions that the base was made for"
            if self._strict:
                raise ConfigError(f"{message}; {hint}")
            told = f"{message}: what it says of so long a text is poor; {hint}"
            warnings.warn(told, GrowlmWarning, stacklevel=3 + depth)


def _whole_numbers(prompt: Any, called: str) -> list[int]:
    if hasattr(prompt, "tolist"):  # of numpy or torch
        prompt = prompt.tolist()
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Iterable):
        raise DataError(f"{called} is {_described(prompt)}; give text, or a list of token ids")
    tokens = [token.tolist() if hasattr(token, "tolist") else token for token in prompt]
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool):
            raise DataError(f"{called}: {_described(token)} is no token id; give text, or a list of whole numbers")
    return tokens


def _described(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 40 and "\n" not in told else f"a {type(value).__name__}"
