"""Edge: takes in what clients ask, routes it once, and has replicas answer; gives what they write as if written here.

An order whose replica dies is given to another one, and goes on behind what was told already: the same seed draws the
same tokens. Knows a service, and replicas as something that takes orders; nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from growlm.cluster.replica import Order, Told, version_of
from growlm.engine import Engine, Generation, Wanted
from growlm.engine.prompts import Prompt
from growlm.engine.request import Request, State
from growlm.engine.sampling import SamplingConfig
from growlm.engine.selection import AUTO
from growlm.server.refusals import RETRY_AFTER, Refusal
from growlm.server.service import Asked, Service

_TRIES = 5  # of an order, each with a replica that may die
_LOOK = 2.0  # seconds between two looks at whether there are replicas
_WITHOUT = 10.0  # seconds without any after which nobody waits for one
_PAUSE = 0.5  # seconds before the second, twice as long before each that follows
_log = logging.getLogger("growlm.server")


class EdgeService(Service):
    """As `Service`; its engine reads prompts and routes them, and replicas write.

    Args:
        order: has a replica answer: what `Replica.answer` tells, to be left with its `cancel`.
        running: how many replicas there are now.
        places: how many answers all replicas write together, at the most.
    """

    own_modules = False

    def __init__(
        self, engine: Engine, order: Callable[[Order], Any], running: Callable[[], int], *, places: int, **settings: Any
    ) -> None:
        super().__init__(engine, **settings)
        self._order, self._running, self._places = order, running, places
        self._replicas_run = True
        self._following: dict[Asked, set[asyncio.Task[None]]] = {}

    @property
    def room(self) -> int:
        return self._places + self.max_queued

    async def _ask_one(
        self,
        asked: Asked,
        prompt: Prompt,
        n: int,
        module: Wanted,
        among: Collection[str] | None,
        settings: dict[str, Any],
    ) -> None:
        salt, scores = settings.get("salt", ""), {}
        if module == AUTO:
            route = await self.route(prompt, salt=salt, among=among, within=asked)
            module, scores = route.module, route.scores
        requests = await self.prepare(partial(self.engine.requests, prompt, n, module=module, stream=True, **settings))
        asked.requests += requests
        self._live |= dict.fromkeys(requests, asked)
        following = asyncio.get_running_loop().create_task(self._follow(requests, salt, scores))
        self._following.setdefault(asked, set()).add(following)
        following.add_done_callback(partial(self._followed, requests))

    def _ordered(self, requests: Sequence[Request], salt: str) -> Order:
        first = requests[0]
        assert first.names is not None
        sampling = {f.name: getattr(first.config, f.name) for f in fields(SamplingConfig)}
        versions = {name: version_of(self.engine.store.module(name)) for name in first.names}
        return Order(first.tokens, len(requests), first.names, versions, salt, sampling)

    async def _follow(self, requests: Sequence[Request], salt: str, scores: dict[str, float]) -> None:
        """Brings what replicas tell to the requests.

        Raises:
            What those end with that have no answer by then.
        """
        order = self._ordered(requests, salt)
        for again in range(_TRIES):
            try:
                if again:
                    await asyncio.sleep(_PAUSE * 2 ** (again - 1))
                other = await self._written(order, requests, scores)
                if other is None:
                    return
                if any(request.answer.tokens for request in requests):
                    told = f"{other} was changed while its answer was written, by an engine that is lost; ask again"
                    raise Refusal(503, told, "module_changed", headers={"Retry-After": RETRY_AFTER})
                order = self._ordered(requests, salt)  # the store may have changed since
            except (RayError, RayServeException) as lost:
                _log.warning("a replica is lost, another one answers: %s", str(lost).splitlines()[0][:200])
        raise _no_replica()

    def _followed(self, requests: Sequence[Request], following: asyncio.Task[None]) -> None:
        if following.cancelled():
            error: BaseException | None = None if self._replicas_run else _no_replica()
        else:
            error = following.exception()
        for request in requests:
            if request.state is not State.FINISHED:
                request.error, request.state = error, State.FINISHED
        self._look()

    async def _written(self, order: Order, requests: Sequence[Request], scores: dict[str, float]) -> str | None:
        """Returns a module that the replica has in another version, where nothing was written for that."""
        told = [0] * len(requests)  # by this replica
        ended = 0
        stream = self._order(order)
        try:
            async for item in stream:
                if item.error is not None:
                    raise item.error
                if item.other is not None:
                    return str(item.other)
                self._take(requests[item.number], item, told[item.number], scores)
                told[item.number] += len(item.tokens)
                ended += item.end is not None
                self._look()
        finally:
            stream.cancel()
        assert ended == len(requests)
        return None

    def _take(self, request: Request, item: Told, before: int, scores: dict[str, float]) -> None:
        """
        Args:
            before: tokens that this replica has told already.
        """
        if request.state is State.FINISHED:  # an earlier replica had come to its end
            return
        request.state = State.RUNNING
        assert request.sampler is not None
        known = request.answer.tokens[before : before + len(item.tokens)]
        if item.tokens[: len(known)] != known:
            told = "the engine that wrote this answer is lost, and another one would write it otherwise; ask again"
            raise Refusal(503, told, "no_replica", headers={"Retry-After": RETRY_AFTER})
        request.sampler.logprobs += item.logprobs[len(known) :]
        request.prompt_logprobs = request.prompt_logprobs or item.prompt_logprobs
        for token in item.tokens[len(known) :]:
            request.answer.add(token)
        if item.end is not None:
            whole = request.answer.generation(request.config, item.end.modules, **_known(item.end))
            request.result, request.state = replace(whole, scores=scores), State.FINISHED

    # Whether there are replicas

    def start(self) -> None:
        super().start()
        self._watching_replicas = self._loop.create_task(self._look_at_the_replicas())

    def close(self) -> None:
        self._watching_replicas.cancel()
        super().close()

    async def _look_at_the_replicas(self) -> None:
        """Those who wait for one are told where there is none for a while: Ray Serve itself waits without an end."""
        none_since: float | None = None
        while True:
            await asyncio.sleep(_LOOK)
            try:
                running = await asyncio.to_thread(self._running)
            except Exception:  # the cluster's head is busy, or gone
                running = 0
            now = time.monotonic()
            none_since = None if running else none_since or now
            self._replicas_run = none_since is None or now - none_since < _WITHOUT
            if not self._replicas_run:
                for following in [task for tasks in self._following.values() for task in tasks]:
                    following.cancel()

    def require_whole(self) -> None:
        super().require_whole()
        if not self._replicas_run:
            raise _no_replica()

    def _leave(self, asked: Asked) -> None:
        for following in self._following.pop(asked, ()):
            following.cancel()
        super()._leave(asked)


def _no_replica() -> Refusal:
    told = "no engine of the cluster answers; try again in a moment"
    return Refusal(503, told, "no_replica", headers={"Retry-After": RETRY_AFTER})


def _known(end: Generation) -> dict[str, Any]:
    """What a replica says of an answer that the answer itself does not tell."""
    names = ("scores", "resident_bytes", "loaded", "prompt_tokens", "mixture", "changes", "logprobs", "prompt_logprobs")
    return {name: getattr(end, name) for name in names}
