"""Sampling: logits -> next tokens, greedy or drawn. One generator a request: its text does not depend on its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from growlm.errors import ConfigError, setting

_GREEDY = 1e-5  # temperatures below it choose the likeliest token; dividing by them would overflow
_HOTTEST = 1e30  # every token is as likely as any other long before


@dataclass(frozen=True)
class SamplingConfig:
    """How to decode.

    Attributes:
        max_new_tokens: the most tokens to write.
        temperature: 0 is greedy, and so is what is below 0.00001.
        top_k, top_p: keep the k likeliest tokens, and of these the fewest that hold probability p; 0 and 1 keep all.
        seed: of the draw.
        stop: texts that end the answer; they are not part of it.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """
        Raises:
            ConfigError: a value out of range or of another type.
        """
        for name, minimum in (("max_new_tokens", 1), ("top_k", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < minimum:
                raise ConfigError(f"{setting(name)} is {value!r}; it must be a whole number of at least {minimum}")
        if self.seed >= 2**64:
            raise ConfigError(f"{setting('seed')} is {self.seed}; it must be below 2**64")
        if not isinstance(self.temperature, Real) or not 0 <= self.temperature <= _HOTTEST:
            raise ConfigError(
                f"{setting('temperature')} is {self.temperature!r}; it must be from 0 (greedy) to {_HOTTEST:g}"
            )
        if not isinstance(self.top_p, Real) or not 0 < self.top_p <= 1:
            raise ConfigError(f"{setting('top_p')} is {self.top_p!r}; it must be above 0 and at most 1")
        if isinstance(self.stop, str) or not isinstance(self.stop, Sequence):
            raise ConfigError(f"{setting('stop')} is {self.stop!r}; give a tuple of texts")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ConfigError(f"{setting('stop')} holds {text!r}; each must be a text of at least one character")
        object.__setattr__(self, "stop", tuple(self.stop))


def sample(logits: Tensor, config: SamplingConfig, generators: list[torch.Generator]) -> Tensor:
    """Next tokens (b,) from logits (b, v)."""
    if config.temperature < _GREEDY:
        return logits.argmax(-1)
    logits = logits.float() / float(config.temperature)
    if config.top_k:
        bound = logits.topk(min(config.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < bound, -torch.inf)
    probabilities = logits.softmax(-1)
    if config.top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        # A token stays while those before it hold less than p: the likeliest always does.
        dropped = ordered.cumsum(-1) - ordered >= config.top_p
        probabilities = probabilities.masked_fill(dropped.scatter(-1, order, dropped), 0.0)
    drawn = [
        torch.multinomial(row, 1, generator=generator) for row, generator in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(drawn)
