"""Grammars: which tokens an answer that must have a form may go on with, by llguidance.

Knows the library and a tokenizer; not logits.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from growlm.errors import ConfigError, setting

if TYPE_CHECKING:
    from growlm.engine.sampling import SamplingConfig

# v vocabulary

# A small model would go on with spaces for ever.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY = '{"type": "object"}'  # where JSON is asked for without a schema


class Grammars:
    """Makes matchers for one tokenizer.

    Args:
        ends: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, ends: set[int]) -> None:
        self._tokenizer, self._vocab_size, self._ends = tokenizer, vocab_size, ends
        self._made: Any = None  # the tokenizer as the library has it: a second or so of work

    def matcher(self, config: SamplingConfig) -> Matcher | None:
        """What an answer may be; None where it may be anything.

        Raises:
            ConfigError: the library is not installed, refuses the grammar, or the tokenizer.
        """
        given = [name for name in ("json_schema", "regex", "grammar") if getattr(config, name) is not None]
        if not given:
            return None
        (name,) = given
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise ConfigError(f"{setting(name)} needs llguidance; install growlm[grammar]") from None
        if self._made is None:
            try:
                self._made = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=sorted(self._ends))
            except Exception as error:  # of Rust
                raise ConfigError(f"{setting(name)} cannot be used with this tokenizer: {_line(error)}") from None
        try:
            grammar = self._compiled(LLMatcher, name, getattr(config, name))
            wrong = LLMatcher.validate_grammar(grammar, self._made)
        except Exception as error:
            wrong = _line(error)
        if wrong:
            raise ConfigError(f"{setting(name)}: {_line(wrong)}; correct it")
        return Matcher(LLMatcher(self._made, grammar), self._vocab_size, setting(name))

    @staticmethod
    def _compiled(library: Any, name: str, text: Any) -> str:
        if name == "regex":
            return str(library.grammar_from_regex(text))
        if name == "grammar":
            return str(library.grammar_from_lark(text))
        schema = json.loads(_ANY if text is True else text) if not isinstance(text, bool) or text else False
        return str(library.grammar_from_json_schema(schema, overrides=_COMPACT))


class Matcher:
    """How far one answer has come."""

    def __init__(self, matcher: Any, vocab_size: int, called: str) -> None:
        self._matcher, self._vocab_size, self._called = matcher, vocab_size, called

    def allowed(self, device: torch.device) -> Tensor:
        """(v,) which tokens may come next.

        Raises:
            ConfigError: none may.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        if self._matcher.is_error() or not mask.any():
            raise ConfigError(f"{self._called} admits no answer that goes on from here; give one that does")
        return torch.from_numpy(mask).bool().to(device)

    def take(self, token: int) -> None:
        """An answer goes on with a token that was allowed."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
