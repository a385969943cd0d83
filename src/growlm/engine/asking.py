"""Asking: what is asked in Python -> requests, refused where they could not be answered.

Knows prompts, names and settings; runs nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from growlm.base import Base
from growlm.engine.answers import Answer
from growlm.engine.grammar import Grammars
from growlm.engine.module_cache import ModuleCache
from growlm.engine.prompts import Prompt, Prompts
from growlm.engine.reloading import Reloading
from growlm.engine.request import Names, Request
from growlm.engine.routing import Among, Routing
from growlm.engine.sampling import Sampler, SamplingConfig
from growlm.engine.selection import Wanted, require_one_way, select
from growlm.errors import ConfigError, setting
from growlm.store import Store

_MOST_CHOICES = 128


class Asking:
    """Of one engine."""

    def __init__(
        self,
        store: Store,
        base: Base,
        tokenizer: Any,
        prompts: Prompts,
        grammars: Grammars,
        modules: ModuleCache,
        routing: Routing,
        reloading: Reloading,
        *,
        second_look: bool,
    ) -> None:
        self._store, self._base, self._tokenizer = store, base, tokenizer
        self._prompts, self._grammars, self._modules = prompts, grammars, modules
        self._routing, self._reloading = routing, reloading
        self.second_look = second_look

    def request(
        self,
        prompt: Prompt,
        wanted: Wanted,
        sampling: dict[str, Any],
        *,
        streams: bool = False,
        salt: str = "",
        among: Collection[str] | None = None,
        mix: int = 1,
        reroute: int = 0,
        depth: int = 1,
    ) -> Request:
        """What `Engine.generate` takes, as a request.

        Args:
            depth: calls between this one and that of the user, whom a warning is for.

        Raises:
            As `Engine.generate`, as far as it is known before anything runs.
        """
        config = sampling_of(sampling)
        tokens = self._prompts.encode(prompt, config.max_new_tokens, depth=depth + 1)
        allowed = self.among(among)
        router = self._routing.among_of(allowed)
        require_one_way(wanted, mix, reroute, len(router.names), router.num_listed)
        if not isinstance(salt, str):
            raise ConfigError(f"{setting('salt')} is {salt!r}; give a text")
        if mix > 1 and config.prompt_logprobs is not None:
            raise ConfigError("--mix weighs the prompt itself; leave out prompt_logprobs")
        asked: dict[str, Any] = {"salt": salt, "among": allowed, "mix": mix, "reroute": reroute}
        return self.of_tokens(tokens, self.names(wanted), config, streams=streams, **asked)

    def several(self, first: Request, n: int) -> list[Request]:
        """A request and others of its prompt, each with the next seed, which follow it."""
        if not isinstance(n, int) or not 1 <= n <= _MOST_CHOICES:
            raise ConfigError(f"{setting('n')} is {n!r}; it must be a whole number from 1 to {_MOST_CHOICES}")
        asked: dict[str, Any] = {name: getattr(first, name) for name in ("salt", "among", "mix", "reroute")}
        asked["streams"] = first.answer.streams
        for number in range(1, n):
            config = replace(first.config, seed=(first.config.seed + number) % 2**64)
            first.followers.append(self.of_tokens(first.tokens, first.names, config, **asked))
        return [first, *first.followers]

    def of_tokens(
        self, tokens: list[int], names: Names | None, config: SamplingConfig, *, streams: bool = False, **asked: Any
    ) -> Request:
        """
        Raises:
            ConfigError: a grammar that is refused.
            DataError: biases of tokens that the base does not have.
        """
        if config.logit_bias:
            self._base.require_rows(list(config.logit_bias), "logit_bias", self._tokenizer)
        sampler = Sampler(config, tokens, self._base.device, self._grammars.matcher(config))
        answer = Answer(self._tokenizer, config.stop, streams=streams)
        once = names is None and asked.get("mix", 1) == 1 and not asked.get("reroute")
        return Request(tokens, names, config, answer, **asked, sampler=sampler, looks=self.second_look and once)

    def among(self, names: Collection[str] | None) -> Among:
        """The modules that a router is to choose among, which there is from now on.

        Raises:
            UnknownModuleError: no such module.
            BudgetError: there is no room for their router.
            ConfigError: what is no list of names.
        """
        if names is None:
            return None
        if isinstance(names, str):
            raise ConfigError(f"{setting('among')} is {names!r}; give a list of modules")
        among = frozenset(names)
        for name in among:
            self._store.module(name)
        self._reloading.among(among)
        return among

    def names(self, wanted: Wanted) -> Names | None:
        """The modules that are meant; None where the router is to choose."""
        names = select(self._store, wanted, self._modules.resident_version)
        return None if isinstance(names, str) else names


def sampling_of(options: dict[str, Any]) -> SamplingConfig:
    known = set(SamplingConfig.__dataclass_fields__)
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}; options are {', '.join(sorted(known))}")
    if isinstance(options.get("stop"), str):
        options["stop"] = (options["stop"],)
    return SamplingConfig(**options)
