"""Service: an engine that many ask at once: a thread makes its steps, and an event loop hears what each has come to.

Bounds what waits and for how long. Knows engines and requests; nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import copy_context
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from growlm.engine import Engine, Generation, Wanted
from growlm.engine.prompts import Prompt
from growlm.engine.reloading import Changes
from growlm.engine.request import Request, State
from growlm.engine.sampling import TokenLogprob
from growlm.errors import ClosedError, UnknownModuleError
from growlm.router import Route
from growlm.server.deadline import began
from growlm.server.metrics import Metrics
from growlm.server.refusals import NO_RETRY, QUEUE_FULL, RETRY_AFTER, Refusal, module_gone

T = TypeVar("T")

_log = logging.getLogger("growlm.server")

_STEPS_THAT_FAIL = 10  # one after another, after which no more are made


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

    Attributes:
        own_modules: whether the modules that answer are in the memory of `engine`.
    """

    own_modules = True

    def __init__(
        self, engine: Engine, *, max_queued: int = 128, timeout: float | None = None, watch: float | None = None
    ) -> None:
        self.engine, self.max_queued, self.timeout = engine, max_queued, timeout
        self._watch = watch
        self._watching: asyncio.Task[None] | None = None
        self.metrics = Metrics(engine, self.running_and_waiting)
        self._live: dict[Request, Asked] = {}  # that have not ended
        self._taken = 0  # places of these, and of those whose prompts are still read
        self._wanted, self._closed, self._broken = threading.Event(), False, False
        self._prepared = 0  # calls that wait for their turn or have it
        # One thread: what is prepared takes the processor from the engine's. What no answer waits for, and what may
        # have to wait itself, has threads of its own.
        self._preparing = ThreadPoolExecutor(1, "growlm-prompts")
        self._aside = ThreadPoolExecutor(1, "growlm-aside")
        self._routers = ThreadPoolExecutor(1, "growlm-routers")
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
        for pool in (self._preparing, self._aside, self._routers):
            pool.shutdown()
        self._look()

    def end_in(self, seconds: float) -> None:
        """Ends in so many seconds what is still being answered then, with `ClosedError`; from a signal's handler."""
        self._loop.call_soon_threadsafe(self._loop.call_later, seconds, self._end_answers)

    def _end_answers(self) -> None:
        self._closed = True
        for asked in set(self._live.values()):
            asked.changed.set()

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

    @property
    def room(self) -> int:
        """Requests that there are places for."""
        return self.engine.max_batch + self.max_queued

    def running_and_waiting(self) -> tuple[int, int]:
        running = sum(request.state is State.RUNNING for request in list(self._live))
        return running, self._taken - running

    # Asking

    async def prepare(self, call: Callable[..., T], *arguments: Any, aside: bool = False) -> T:
        """What a call returns that takes a while, such as to write a conversation in token ids.

        Args:
            aside: no answer waits for it.

        Raises:
            Refusal: too many wait already, or it has taken too long.
        """
        pool = self._aside if aside else self._preparing
        async with self.in_time():
            return await asyncio.wrap_future(self._prepare(lambda: call(*arguments), pool))

    def _prepare(self, call: Callable[[], T], pool: ThreadPoolExecutor) -> Future[T]:
        if self._prepared >= self.room:
            raise self._full()
        self._prepared += 1
        preparing = pool.submit(copy_context().run, call)
        preparing.add_done_callback(self._was_prepared)
        return preparing

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """
        Raises:
            Refusal: what is waited for inside has not come within the server's time for a request.
        """
        left = None if self.timeout is None else max(began() + self.timeout - time.monotonic(), 0)
        waiting = asyncio.timeout(left)  # wait_for would let a client's leaving pass
        try:
            async with waiting:
                yield
        except TimeoutError:
            if not waiting.expired():
                raise
            told = f"the answer took longer than the server's {self.timeout:g} seconds; ask for fewer tokens"
            raise Refusal(504, told, "timeout", headers=NO_RETRY) from None

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
        if self._taken >= self.room:
            raise self._full()

    def _full(self) -> Refusal:
        self.metrics.refused.inc()
        told = f"{max(self._taken, self._prepared)} requests are being answered or wait; try again in a moment"
        return Refusal(503, told, QUEUE_FULL, headers={"Retry-After": RETRY_AFTER})

    def begin(self, places: int = 1) -> Asked:
        """Takes places for requests to come, all that one client asks for at once.

        Raises:
            Refusal: there are none.
        """
        self.require_open()
        if places > self.room:
            raise Refusal(400, f"{places} answers in one request; the server takes {self.room} at the most", "too_many")
        if self._taken + places > self.room:
            raise self._full()
        self._taken += places
        return Asked(self, places)

    async def route(
        self, prompt: Prompt, *, salt: str = "", among: Collection[str] | None = None, within: Asked | None = None
    ) -> Route:
        """As `Engine.route`.

        Args:
            within: that has places already.
        """
        await self._require_router(among)
        asked = Asked(self, 0) if within is not None else self.begin()
        with asked.left_where_it_fails():
            await self._add(asked, lambda: [self.engine.submit_route(prompt, salt=salt, among=among)])
            async for _ in asked.items():
                pass
        self.metrics.loaded(asked.requests[0].loaded)
        return asked.requests[0].route

    async def ask(
        self,
        prompts: Sequence[Prompt],
        n: int = 1,
        *,
        module: Wanted = None,
        among: Collection[str] | None = None,
        within: Asked | None = None,
        **sampling: Any,
    ) -> Asked:
        """Begins to answer prompts, each `n` times, as `Engine.submit_several` does: those of the first prompt come
        first.

        Args:
            within: that has places for them already.

        Raises:
            Refusal: there is no place.
            GrowlmError: as `Engine.generate` raises it.
        """
        asked = self.begin(len(prompts) * n) if within is None else within
        with asked.left_where_it_fails():
            await self._require_router(among)
            for prompt in prompts:
                settings = {"seed": random.getrandbits(63), **sampling}  # of each prompt another, where none is given
                await self._ask_one(asked, prompt, n, module, among, settings)
        return asked

    async def _ask_one(
        self,
        asked: Asked,
        prompt: Prompt,
        n: int,
        module: Wanted,
        among: Collection[str] | None,
        settings: dict[str, Any],
    ) -> None:
        def submit() -> list[Request]:
            return self.engine.submit_several(prompt, n, module=module, stream=True, among=among, **settings)

        await self._add(asked, submit)

    async def _require_router(self, among: Collection[str] | None) -> None:
        """Sees to a router of some modules, which may have to wait for room: nobody else waits for that."""
        if among is not None and not self.engine.has_router(among):
            async with self.in_time():
                await asyncio.wrap_future(self._routers.submit(self.engine.make_router, among))

    async def _add(self, asked: Asked, call: Callable[[], list[Request]]) -> None:
        requests = await self._submitted(call)
        asked.requests += requests
        self._live |= dict.fromkeys(requests, asked)
        self._wanted.set()
        self._look()  # it may have moved on meanwhile

    async def _submitted(self, call: Callable[[], list[Request]]) -> list[Request]:
        submitting = self._prepare(call, self._preparing)
        try:
            async with self.in_time():
                return await asyncio.shield(asyncio.wrap_future(submitting))
        except BaseException:  # who asked has gone, or waits no longer
            if not submitting.cancel():  # the call goes on, and what it has asked for is not wanted
                submitting.add_done_callback(self._forget)
            raise

    def _forget(self, submitting: Future[list[Request]]) -> None:
        if submitting.exception() is None:
            for request in submitting.result():
                self.engine.cancel(request)

    def _leave(self, asked: Asked) -> None:
        self._taken -= asked.places
        asked.places = 0
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

    def require_open(self) -> None:
        """
        Raises:
            ClosedError: the server ends.
            Refusal: nothing is answered any more.
        """
        if self._closed:
            raise ClosedError("the server is closed")
        self.require_whole()

    def require_whole(self) -> None:
        """
        Raises:
            Refusal: nothing is answered any more.
        """
        if self._broken:
            told = "the engine has stopped after an error, which is in the server's log; start it again"
            raise Refusal(500, told, "internal_error", headers=NO_RETRY)

    def _look(self) -> None:
        """Wakes those whose requests have come further, and frees the places of those that have ended, whether or not
        their clients read."""
        for request, asked in list(self._live.items()):
            if request.answer.pieces or request.state is State.FINISHED or self._broken:
                asked.changed.set()
            if request.state is State.FINISHED:
                del self._live[request]
                if asked.places:
                    asked.places -= 1
                    self._taken -= 1


class Asked:
    """Answers that are being written; to be read once with `items`, or left with `leave`.

    Attributes:
        requests: in the prompts' order, the several of one prompt side by side.
        places: how many of the service's it takes by now.
        chosen: whether the router has chosen the module, so that the client did not name it.
    """

    def __init__(self, service: Service, places: int) -> None:
        self.requests: list[Request] = []
        self.places, self.chosen = places, False
        self.changed = asyncio.Event()
        self._service, self._began, self._left = service, began(), False

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
                self._service.require_open()
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
                        if isinstance(request.error, UnknownModuleError) and self.chosen:
                            raise module_gone()
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
        async with self._service.in_time():
            await self.changed.wait()
        self.changed.clear()

    async def whole(self) -> list[Generation]:
        """The answers, once all of them are there."""
        found = {number: item async for number, item in self.items() if isinstance(item, Generation)}
        return [found[number] for number in sorted(found)]

    @contextmanager
    def left_where_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Nobody reads any further: what is not written by now is not written. To leave twice is no mistake."""
        if not self._left:
            self._left = True
            self._service._leave(self)


def _logprobs(request: Request) -> list[TokenLogprob]:
    return [] if request.sampler is None or request.config.logprobs is None else request.sampler.logprobs
