"""Replica: an engine on a machine of a cluster, which answers what an edge has taken in and routed.

Of every module it serves the version that the order names, and no other. Knows a store and orders; nothing of HTTP,
routing, or other replicas.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from growlm.engine import Engine, Generation
from growlm.engine.sampling import TokenLogprob
from growlm.errors import GrowlmError, StoreError
from growlm.server.refusals import Refusal
from growlm.server.service import Service
from growlm.store import Store, StoredModule

_QUEUED = 1 << 20  # how many wait is the edge's to bound


@dataclass(frozen=True)
class Order:
    """One prompt to be answered.

    Attributes:
        names: its modules; none for the base.
        versions: of each, its version and what tells its files from all others (`version_of`).
        sampling: the fields of `SamplingConfig`.
    """

    tokens: Sequence[int]
    n: int
    names: tuple[str, ...]
    versions: Mapping[str, tuple[int, str]]
    salt: str
    sampling: Mapping[str, Any]


@dataclass(frozen=True)
class Told:
    """What has come of one of an order's answers.

    Attributes:
        tokens: since the last time, and their `logprobs` where these are asked for.
        prompt_logprobs: with the first of an answer, where they are asked for.
        end: the whole answer.
        other: in place of all else: a module of which the store here has another version than the order names.
        error: in place of all else: what the order ended with.
    """

    number: int
    tokens: list[int]
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    end: Generation | None = None
    other: str | None = None
    error: Exception | None = None


def version_of(stored: StoredModule) -> tuple[int, str]:
    """Its number, and what tells its files from those of all other versions."""
    files = json.dumps(sorted(stored.manifest.files.items()))
    return stored.version, hashlib.sha256(files.encode()).hexdigest()


class Replica:
    """
    Args:
        settings: of `Engine`.

    Raises:
        As `Store.open` and `Engine`.
    """

    def __init__(self, store: str, settings: Mapping[str, Any]) -> None:
        self._service = Service(Engine(Store.open(store), **settings), max_queued=_QUEUED)
        self._started, self._reloading = False, asyncio.Lock()

    async def answer(self, order: Order) -> AsyncIterator[Told]:
        """What is written of the answers, as it is written."""
        try:
            self._start()
            if (other := await self._other(order.versions)) is not None:
                yield Told(0, [], [], other=other)
                return
            asked = await self._service.ask(
                [list(order.tokens)], order.n, module=order.names or None, salt=order.salt, **order.sampling
            )
            told = [0] * order.n
            async for number, item in asked.items():
                request = asked.requests[number]
                start, told[number] = told[number], len(request.answer.tokens)
                tokens = request.answer.tokens[start:]
                assert request.sampler is not None
                logprobs = [] if request.config.logprobs is None else request.sampler.logprobs[start : told[number]]
                of_prompt = [] if start else request.prompt_logprobs
                yield Told(number, tokens, logprobs, of_prompt, item if isinstance(item, Generation) else None)
        except (GrowlmError, Refusal) as error:  # as it is: an error of a cluster's task would be wrapped in others
            yield Told(0, [], [], error=error)

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._service.start()

    async def _other(self, versions: Mapping[str, tuple[int, str]]) -> str | None:
        """A module that is served here in another version, though the store was looked at anew."""
        for again in (True, False):
            other = next((name for name, wanted in versions.items() if self._served(name) != wanted), None)
            if other is None or not again:
                return other
            async with self._reloading:
                await self._service.reload()
        return None

    def _served(self, name: str) -> tuple[int, str] | None:
        engine = self._service.engine
        with suppress(StoreError):  # what is in memory is served until it is looked for anew
            return version_of(engine.modules.resident_version(name) or engine.store.module(name))
        return None

    async def check_health(self) -> None:
        """As Ray Serve asks for it, which begins another replica in place of one that raises."""
        self._service.require_whole()

    def __del__(self) -> None:
        if (service := getattr(self, "_service", None)) is not None:
            service.engine.close()
