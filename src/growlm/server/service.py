"""Service: an engine that many ask at once: a thread makes its steps, and an event loop hears what each has come to.

Bounds what waits and for how long. Knows engines and requests; nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from growlm.engine import Engine, Generation, Wanted
from growlm.engine.prompts import Prompt
from growlm.engine.reloading import Changes
from growlm.engine.request import Request, State
from growlm.engine.sampling import TokenLogprob
from growlm.errors import ClosedError
from growlm.router import Route
from growlm.server.metrics import Metrics
from growlm.server.refusals import NO_RETRY, QUEUE_FULL, Refusal

T = TypeVar("T")

_log = logging.getLogger("growlm.server")

_STEPS_THAT_FAIL = 10  # one after another, after which no more are made
_RETRY_AFTER = "1"  # seconds: within them some answer ends, and makes room


@dataclass(frozen=True)
class Piece:
    """Text that was written since the last one.

    Attributes:
        logprobs: of the tokens since then, where they are asked for; a token may come before its text.
    """

    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Service:
    """Asked in one event loop, that in which it was started.

    Args:
        max_queued: requests that may wait beside the engine's `max_batch`; more are refused.
        timeout: seconds that an answer may take, from when it is asked for; None for no bound.
        watch: seconds between two looks at whether the store has changed on the disk; None for none.
    """

    def __init__(
        self, engine: Engine, *, max_queued: int = 128, timeout: float | None = None, watch: float | None = None
    ) -> None:
        self.engine, self.max_queued, self.timeout = engine, max_queued, timeout
        self._watch = watch
        self._watching: asyncio.Task[None] | None = None
        self.metrics = Metrics(engine, self.running_and_waiting)
        self._live: dict[Request, asyncio.Event] = {}
        self._taken = 0  # places of requests that have not ended, those whose prompts are still read included
        self._wanted, self._closed, self._broken = threading.Event(), False, False
        self._prepared = 0  # calls that wait for their turn or have it
        # One thread: what is prepared takes the processor from the engine's.
        self._preparing = ThreadPoolExecutor(1, "growlm-prompts")
        self._thread = threading.Thread(target=self._work, name="growlm-engine", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        if self._watch is not None:
            self._watching = self._loop.create_task(self._look_at_the_store(self._watch))

    def close(self) -> None:
        """Ends what is asked with `ClosedError`, and the engine."""
        self._closed = True
        if self._watching is not None:
            self._watching.cancel()
        self._wanted.set()
        self.engine.close()
        self._thread.join()
        self._preparing.shutdown()
        self._look()

    async def reload(self) -> Changes:
        """As `Engine.reload`."""
        changes = await asyncio.to_thread(self.engine.reload)
        if changes:
            told = [f"{what} {', '.join(names)}" for what, names in asdict(changes).items() if names]
            _log.warning("the store has changed: %s", "; ".join(told))
        return changes

    async def _look_at_the_store(self, seconds: float) -> None:
        told = ""
        while True:
            await asyncio.sleep(seconds)
            try:
                if await asyncio.to_thread(lambda: self.engine.outdated):
                    await self.reload()
                told = ""
            except Exception as error:  # the next look may find it whole
                if str(error) != told:
                    _log.error("the store has changed, and is served as it was: %s", error)
                told = str(error)

    @property
    def broken(self) -> bool:
        """Whether the engine's thread has ended with an error that it cannot go on after."""
        return self._broken

    def running_and_waiting(self) -> tuple[int, int]:
        running = sum(request.state is State.RUNNING for request in list(self._live))
        return running, self._taken - running

    # Asking

    async def prepare(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """What a call returns that takes a while, such as to write a conversation in token ids.

        Raises:
            Refusal: too many wait already.
        """
        return await asyncio.wrap_future(self._prepare(lambda: call(*arguments, **named)))

    def _prepare(self, call: Callable[[], T]) -> Future[T]:
        if self._prepared >= self.engine.max_batch + self.max_queued:
            raise self._full()
        self._prepared += 1
        preparing = self._preparing.submit(copy_context().run, call)
        preparing.add_done_callback(self._was_prepared)
        return preparing

    def _was_prepared(self, preparing: Future[Any]) -> None:
        with suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._count_prepared)

    def _count_prepared(self) -> None:
        self._prepared -= 1

    def require_place(self) -> None:
        """
        Raises:
            Refusal: there is none for another request.
        """
        if self._taken >= self.engine.max_batch + self.max_queued:
            raise self._full()

    def _full(self) -> Refusal:
        self.metrics.refused.inc()
        told = f"{max(self._taken, self._prepared)} requests are being answered or wait; try again in a moment"
        return Refusal(503, told, QUEUE_FULL, headers={"Retry-After": _RETRY_AFTER})

    async def route(self, prompt: Prompt, *, salt: str = "", among: Collection[str] | None = None) -> Route:
        """As `Engine.route`."""
        asked = await self._ask([lambda: [self.engine.submit_route(prompt, salt=salt, among=among)]], 1)
        async for _ in asked.items():
            pass
        return asked.requests[0].route

    async def ask(self, prompts: Sequence[Prompt], n: int = 1, *, module: Wanted = None, **sampling: Any) -> Asked:
        """Begins to answer prompts, each `n` times, as `Engine.submit_several` does: those of the first prompt come
        first.

        Raises:
            Refusal: there is no place.
            GrowlmError: as `Engine.generate` raises it.
        """

        def submit(prompt: Prompt) -> list[Request]:
            return self.engine.submit_several(prompt, n, module=module, stream=True, **sampling)

        return await self._ask([lambda prompt=prompt: submit(prompt) for prompt in prompts], len(prompts) * n)  # type: ignore[misc]

    async def _ask(self, calls: Sequence[Callable[[], list[Request]]], places: int) -> Asked:
        if self._closed:
            raise ClosedError("the server is closed")
        self.require_whole()
        room = self.engine.max_batch + self.max_queued
        if places > room:
            raise Refusal(400, f"{places} answers in one request; the server takes {room} at the most", "too_many")
        if self._taken + places > room:
            raise self._full()
        asked = Asked(self, places)
        self._taken += places
        try:
            for call in calls:
                requests = await self._submitted(call)
                asked.requests += requests
                self._live |= dict.fromkeys(requests, asked.changed)
                self._wanted.set()
                self._look()  # it may have moved on meanwhile
        except BaseException:
            asked.leave()
            raise
        return asked

    async def _submitted(self, call: Callable[[], list[Request]]) -> list[Request]:
        submitting = self._prepare(call)
        try:
            return await asyncio.shield(asyncio.wrap_future(submitting))
        except asyncio.CancelledError:  # who asked has gone
            if not submitting.cancel():  # the call goes on, and what it has asked for is not wanted
                submitting.add_done_callback(self._forget)
            raise

    def _forget(self, submitting: Future[list[Request]]) -> None:
        if submitting.exception() is None:
            for request in submitting.result():
                self.engine.cancel(request)

    def _leave(self, asked: Asked) -> None:
        self._taken -= asked.places
        for request in asked.requests:
            self._live.pop(request, None)
            self.engine.cancel(request)

    # The engine's thread

    def _work(self) -> None:
        failed = 0  # steps one after another
        while not self._closed:
            self._wanted.wait()
            self._wanted.clear()
            going = True
            while going:
                try:
                    going, failed = self.engine.step(), 0
                except ClosedError:
                    return
                except BaseException:  # what it was the fault of has ended with it; the others go on
                    _log.exception("a step of the engine failed")
                    failed += 1
                    if failed >= _STEPS_THAT_FAIL:
                        self._broken, going = True, False
                self._loop.call_soon_threadsafe(self._look)
            if self._broken:
                return

    def require_whole(self) -> None:
        """
        Raises:
            Refusal: nothing is answered any more.
        """
        if self._broken:
            told = "the engine has stopped after an error, which is in the server's log; start it again"
            raise Refusal(500, told, "internal_error", headers=NO_RETRY)

    def _look(self) -> None:
        """Wakes those whose requests have come further."""
        for request, changed in self._live.items():
            if request.answer.pieces or request.state is State.FINISHED or self._broken:
                changed.set()


class Asked:
    """Answers that are being written; to be read once with `items`, or left with `leave`.

    Attributes:
        requests: in the prompts' order, the several of one prompt side by side.
        places: how many of the service's it takes until it has ended.
    """

    def __init__(self, service: Service, places: int) -> None:
        self.requests: list[Request] = []
        self.places = places
        self.changed = asyncio.Event()
        self._service, self._began, self._left = service, time.monotonic(), False

    @property
    def modules(self) -> list[str]:
        """Who writes, of those answers of which it is known by now; the base has no name."""
        return ["+".join(request.names) for request in self.requests if request.names is not None]

    async def items(self) -> AsyncIterator[tuple[int, Piece | Generation]]:
        """What comes of each answer, by its number: pieces of its text, and at the end the whole.

        Raises:
            Refusal: it has taken too long.
            GrowlmError: what the first of them that failed ended with.
        """
        metrics, pending = self._service.metrics, dict(enumerate(self.requests))
        told, last = [0] * len(self.requests), [self._began] * len(self.requests)
        try:
            while pending:
                await self._something()
                self._service.require_whole()
                for number, request in list(pending.items()):
                    ended = request.state is State.FINISHED  # before the last pieces are taken: none comes after it
                    while request.answer.pieces:
                        text, upto = request.answer.pieces.popleft(), len(request.answer.tokens)
                        now = time.monotonic()
                        (metrics.between if told[number] else metrics.first).observe(now - last[number])
                        last[number] = now
                        yield number, Piece(text, _logprobs(request)[told[number] : upto])
                        told[number] = upto
                    if ended:
                        del pending[number]
                        if request.error is not None:
                            raise request.error
                        if rest := _logprobs(request)[told[number] : len(request.answer.tokens)]:
                            yield number, Piece("", rest)
                        if isinstance(request.result, Generation):
                            metrics.ended(request.result, time.monotonic() - self._began)
                            yield number, request.result
        finally:
            self.leave()

    async def _something(self) -> None:
        timeout = self._service.timeout
        left = None if timeout is None else max(self._began + timeout - time.monotonic(), 0)
        try:
            async with asyncio.timeout(left):  # wait_for would let a client's leaving pass
                await self.changed.wait()
        except TimeoutError:
            told = f"the answer took longer than the server's {timeout:g} seconds; ask for fewer tokens"
            raise Refusal(504, told, "timeout", headers=NO_RETRY) from None
        self.changed.clear()

    async def whole(self) -> list[Generation]:
        """The answers, once all of them are there."""
        found = {number: item async for number, item in self.items() if isinstance(item, Generation)}
        return [found[number] for number in sorted(found)]

    def leave(self) -> None:
        """Nobody reads any further: what is not written by now is not written. To leave twice is no mistake."""
        if not self._left:
            self._left = True
            self._service._leave(self)


def _logprobs(request: Request) -> list[TokenLogprob]:
    return [] if request.sampler is None or request.config.logprobs is None else request.sampler.logprobs
