"""Sampling: logits -> next tokens, greedy or drawn. One generator a request: its text does not depend on its batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from growlm.errors import ConfigError


@dataclass(frozen=True)
class SamplingConfig:
    """How to decode.

    Attributes:
        max_new_tokens: the most tokens to write.
        temperature: 0 is greedy.
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
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0 (all) or more")


def sample(logits: Tensor, config: SamplingConfig, generators: list[torch.Generator]) -> Tensor:
    """Next tokens (b,) from logits (b, v)."""
    if config.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / config.temperature
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
