"""Edge: takes in what clients ask, routes it once, and has replicas answer; gives what they write as if written here.

An order whose replica dies is given to another one, and goes on behind what was told already: the same seed draws the
same tokens. Knows a service, and replicas as something that takes orders; nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import fields, replace
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
_PAUSE = 0.5  # seconds before the second, twice as long before each that follows
_log = logging.getLogger("growlm.server")


class EdgeService(Service):
    """As `Service`; its engine reads prompts and routes them, and replicas write.

    Args:
        order: has a replica answer: what `Replica.answer` tells, to be left with its `cancel`.
        places: how many answers all replicas write together, at the most.
    """

    def __init__(self, engine: Engine, order: Callable[[Order], Any], *, places: int, **settings: Any) -> None:
        super().__init__(engine, **settings)
        self._order, self._places = order, places
        self._following: dict[Asked, set[asyncio.Task[None]]] = {}

    @property
    def room(self) -> int:
        return self._places + self.max_queued

    async def ask(
        self,
        prompts: Sequence[Prompt],
        n: int = 1,
        *,
        module: Wanted = None,
        among: Collection[str] | None = None,
        within: Asked | None = None,
        salt: str = "",
        **sampling: Any,
    ) -> Asked:
        asked = self.begin(len(prompts) * n) if within is None else within
        with asked.left_where_it_fails():
            for prompt in prompts:
                wanted, scores = module, {}
                if module == AUTO:
                    route = await self.route(prompt, salt=salt, among=among, within=asked)
                    wanted, scores = route.module, route.scores
                settings = {"seed": random.getrandbits(63), **sampling}  # of each prompt another, where none is given
                requests = await self.prepare(self._requests, prompt, n, wanted, salt, settings)
                order = self._ordered(requests, salt)
                asked.requests += requests
                self._live |= dict.fromkeys(requests, asked)
                following = asyncio.get_running_loop().create_task(self._follow(order, requests, scores))
                self._following.setdefault(asked, set()).add(following)
                following.add_done_callback(lambda _: self._look())
        return asked

    def _requests(self, prompt: Prompt, n: int, wanted: Wanted, salt: str, settings: dict[str, Any]) -> list[Request]:
        return self.engine.requests(prompt, n, module=wanted, stream=True, salt=salt, **settings)

    def _ordered(self, requests: Sequence[Request], salt: str) -> Order:
        first = requests[0]
        assert first.names is not None
        sampling = {f.name: getattr(first.config, f.name) for f in fields(SamplingConfig)}
        versions = {name: version_of(self.engine.store.module(name)) for name in first.names}
        return Order(first.tokens, len(requests), first.names, versions, salt, sampling)

    async def _follow(self, order: Order, requests: Sequence[Request], scores: dict[str, float]) -> None:
        """Brings what a replica tells to the requests, until all have ended."""
        error: BaseException | None = None
        try:
            for again in range(_TRIES):
                try:
                    if error is not None:
                        await asyncio.sleep(_PAUSE * 2 ** (again - 1))
                    await self._written(order, requests, scores)
                    return
                except (RayError, RayServeException) as lost:  # also where too many of them are busy
                    error = lost
                    _log.warning("a replica is lost, another one answers: %s", str(lost).splitlines()[0][:200])
            told = "no replica of the engine answers; try again in a moment"
            error = Refusal(503, told, "no_replica", headers={"Retry-After": RETRY_AFTER})
        except asyncio.CancelledError:
            error = None
            raise
        except Exception as found:
            error = found
        finally:
            for request in requests:
                if request.state is not State.FINISHED:
                    request.error, request.state = error, State.FINISHED

    async def _written(self, order: Order, requests: Sequence[Request], scores: dict[str, float]) -> None:
        told = [0] * len(requests)  # by this replica
        ended = 0
        stream = self._order(order)
        try:
            async for item in _items(stream):
                if item.error is not None:
                    raise item.error
                request = requests[item.number]
                new = slice(max(len(request.answer.tokens) - told[item.number], 0), None)
                told[item.number] += len(item.tokens)
                self._take(request, item, new, scores)
                ended += item.end is not None
                self._look()
        finally:
            stream.cancel()
        assert ended == len(requests)

    def _take(self, request: Request, item: Told, new: slice, scores: dict[str, float]) -> None:
        if request.state is State.FINISHED:  # an earlier replica had come to its end
            return
        request.state = State.RUNNING
        assert request.sampler is not None
        request.sampler.logprobs += item.logprobs[new]
        for token in item.tokens[new]:
            request.answer.add(token)
        if item.end is not None:
            whole = request.answer.generation(request.config, item.end.modules, **_known(item.end))
            request.prompt_logprobs = item.end.prompt_logprobs or []
            request.result, request.state = replace(whole, scores=scores), State.FINISHED

    def _leave(self, asked: Asked) -> None:
        for following in self._following.pop(asked, ()):
            following.cancel()
        super()._leave(asked)


async def _items(stream: Any) -> AsyncIterator[Told]:
    async for item in stream:
        yield item


def _known(end: Generation) -> dict[str, Any]:
    """What a replica says of an answer that the answer itself does not tell."""
    names = ("scores", "resident_bytes", "loaded", "prompt_tokens", "mixture", "changes", "logprobs", "prompt_logprobs")
    return {name: getattr(end, name) for name in names}
