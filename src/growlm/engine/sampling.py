"""Sampling: logits -> the next token, greedy or drawn, after penalties, biases and a grammar.

Everything is a request's own, its generator too: its text does not depend on what it is answered beside. Knows logits
and tokens; runs no layer.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from growlm.errors import ConfigError, setting

if TYPE_CHECKING:
    from growlm.engine.grammar import Matcher

# v vocabulary

_GREEDY = 1e-5  # temperatures below it choose the likeliest token; dividing by them would overflow
_HOTTEST = 1e30  # every token is as likely as any other long before
_MOST_LOGPROBS = 20  # of other tokens beside each one
GRAMMARS = ("json_schema", "regex", "grammar")


@dataclass(frozen=True)
class SamplingConfig:
    """How to decode. Names and ranges are those of OpenAI's and vLLM's interfaces.

    Attributes:
        max_new_tokens: the most tokens to write.
        temperature: 0 is greedy, and so is what is below 0.00001.
        top_k, top_p: keep the k likeliest tokens, and of these the fewest that hold probability p; 0 and 1 keep all.
        min_p: keep tokens that are at least so many times as likely as the likeliest; 0 keeps all.
        seed: of the draw.
        stop: texts that end the answer; they are not part of it.
        presence_penalty, frequency_penalty: taken off the logit of a token that the answer has already, once, and for
            each time that it has it; from -2 to 2.
        repetition_penalty: the logit of a token that prompt or answer has already is divided by it where it is
            positive, and multiplied where it is not (Keskar et al., 2019); above 0, and 1 changes nothing.
        logit_bias: by token id, what is added to its logit; from -100 to 100.
        logprobs: of each token of the answer its log-probability, in nats, and those of so many of the likeliest.
        prompt_logprobs: the same of each token of the prompt but the first.
        json_schema: the answer is JSON after this schema (its text, or an object as of `json.loads`).
        regex: the answer matches this regular expression as a whole.
        grammar: the answer is a sentence of this grammar, in Lark's syntax.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        """
        Raises:
            ConfigError: a value out of range or of another type, or two grammars.
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
        for name, low, high in (("min_p", 0, 1), ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2)):
            _require(name, getattr(self, name), low, high)
        value = self.repetition_penalty
        if not isinstance(value, Real) or not 0 < value <= _HOTTEST:
            raise ConfigError(
                f"{setting('repetition_penalty')} is {value!r}; it must be above 0, and 1 changes nothing"
            )
        self._require_biases()
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or not 0 <= value <= _MOST_LOGPROBS):
                raise ConfigError(
                    f"{setting(name)} is {value!r}; it must be a whole number from 0 to {_MOST_LOGPROBS}, of other "
                    "tokens beside each one"
                )
        given = [name for name in GRAMMARS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(map(setting, given))} exclude each other; give one")
        if isinstance(self.json_schema, Mapping):
            object.__setattr__(self, "json_schema", json.dumps(self.json_schema))
        for name in given:
            value = getattr(self, name)
            if not isinstance(value, str) and not (name == "json_schema" and isinstance(value, bool)):
                raise ConfigError(f"{setting(name)} is {value!r}; give a text")
            if value == "":
                raise ConfigError(f"{setting(name)} is empty; leave it out, or give one")

    def _require_biases(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise ConfigError(
                f"{setting('logit_bias')} is {self.logit_bias!r}; give an object of token ids and numbers"
            )
        biases = {}
        for token, bias in self.logit_bias.items():
            whole = int(token) if isinstance(token, str) and token.isdecimal() else token
            if not isinstance(whole, int) or isinstance(whole, bool) or whole < 0:
                raise ConfigError(f"{setting('logit_bias')} has {token!r}; its keys are token ids")
            _require("logit_bias", bias, -100, 100)
            biases[whole] = float(bias)
        object.__setattr__(self, "logit_bias", biases)

    @property
    def plain(self) -> bool:
        """Whether logits are taken as they are."""
        penalised = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return not (penalised or self.logit_bias or any(getattr(self, name) is not None for name in GRAMMARS))


def _require(name: str, value: Any, low: float, high: float) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= float(value) <= high:
        raise ConfigError(f"{setting(name)} is {value!r}; it must be a number from {low} to {high}")


@dataclass(frozen=True)
class TokenLogprob:
    """What was a token's log-probability, before penalties, temperature and all that follows.

    Attributes:
        token: its id.
        logprob: in nats.
        top: the likeliest tokens in its place and their log-probabilities, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Of tokens (n), from logits (n, v)."""
    found = logits.float().log_softmax(-1)
    own = found.gather(-1, torch.tensor(tokens, device=found.device)[:, None])[:, 0].tolist()
    values, ids = found.topk(min(top, found.shape[-1]), dim=-1)
    pairs = [tuple(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(*each) for each in zip(tokens, own, pairs, strict=True)]


class Sampler:
    """One request's choice of tokens.

    Args:
        prompt: its token ids.
        matcher: what its answer may be.

    Attributes:
        logprobs: of the tokens so far, where they are asked for.
    """

    def __init__(
        self, config: SamplingConfig, prompt: Sequence[int], device: torch.device, matcher: Matcher | None = None
    ) -> None:
        self.config = config
        self.logprobs: list[TokenLogprob] = []
        self._generator = torch.Generator(device).manual_seed(config.seed)
        self._matcher = matcher
        self._device = device
        self._seen = torch.tensor(sorted(set(prompt)), dtype=torch.long, device=device)
        self._counts: Counter[int] = Counter()

    def choose(self, logits: Tensor) -> int:
        """The next token, from logits (v,).

        Raises:
            ConfigError: nothing may come next.
        """
        config = self.config
        shaped = logits if config.plain else self._shaped(logits)
        token = int(sample(shaped[None], config, [self._generator]))
        if config.logprobs is not None:
            self.logprobs += token_logprobs(logits[None], [token], config.logprobs)
        self._counts[token] += 1
        if config.repetition_penalty != 1 and not bool((self._seen == token).any()):
            self._seen = torch.cat([self._seen, torch.tensor([token], device=self._device)])
        if self._matcher is not None:
            self._matcher.take(token)
        return token

    def _shaped(self, logits: Tensor) -> Tensor:
        config, logits = self.config, logits.float().clone()
        if config.repetition_penalty != 1:
            own, factor = logits[self._seen], float(config.repetition_penalty)
            logits[self._seen] = torch.where(own > 0, own / factor, own * factor)
        if self._counts and (config.presence_penalty or config.frequency_penalty):
            ids = torch.tensor(list(self._counts), device=logits.device)
            counts = torch.tensor(list(self._counts.values()), device=logits.device)
            logits[ids] -= config.presence_penalty + config.frequency_penalty * counts
        if config.logit_bias:
            ids = torch.tensor(list(config.logit_bias), device=logits.device)
            logits[ids] += torch.tensor(list(config.logit_bias.values()), device=logits.device)
        if self._matcher is not None:
            logits = logits.masked_fill(~self._matcher.allowed(logits.device), -math.inf)
        return logits


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
    if config.min_p:
        likeliest = probabilities.max(-1, keepdim=True).values
        probabilities = probabilities.masked_fill(probabilities < float(config.min_p) * likeliest, 0.0)
    drawn = [
        torch.multinomial(row, 1, generator=generator) for row, generator in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(drawn)
