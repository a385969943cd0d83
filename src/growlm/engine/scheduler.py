"""Scheduler: which requests have a place, whose modules are read, and which tokens run next. Never touches a tensor."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from growlm.engine.account import Account, Footprint
from growlm.engine.module_cache import ModuleCache
from growlm.engine.request import Names, Request, State
from growlm.engine.resident import Resident

PATIENCE = 64  # later requests that may be admitted while one waits for room
MOST_TOKENS = 512  # of a prompt in a pass, where nobody else waits for it
_SHARED = 256  # and where others do
_EACH = 64  # of one prompt then, so that a long one does not hold up the others


@dataclass(frozen=True)
class Part:
    """So many of a request's next tokens."""

    request: Request
    tokens: int


class Scheduler:
    """Requests in the order in which they came.

    Args:
        modules: what is in memory, and how much room there is.
        account: what requests hold of that room.
        footprint: what a request comes to in the state that it has after this one.
        give_up: has a request that was routed let go of what the base has read for it.
        max_batch: requests that have a place; as many more may wait for their modules once they are routed.
    """

    def __init__(
        self,
        modules: ModuleCache,
        account: Account,
        footprint: Callable[[Request], Footprint],
        give_up: Callable[[Request], None],
        max_batch: int,
    ) -> None:
        self._modules, self._account, self._max_batch = modules, account, max_batch
        self._footprint, self._let_go = footprint, give_up
        self._seen: tuple[int, ...] | None = None
        self.waiting: list[Request] = []  # those whose modules have not been begun to be read
        self.active: list[Request] = []

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.active

    def all(self) -> list[Request]:
        return [*self.waiting, *self.active]

    def add(self, request: Request) -> None:
        bisect.insort(self.waiting, request, key=lambda one: one.arrival)

    def park(self, request: Request) -> None:
        """Has a request that was routed wait for its modules, in its turn."""
        self.active.remove(request)
        request.state = State.WAITING
        self.add(request)

    def set_aside(self, request: Request) -> None:
        """Has a request whose module hangs wait without a place, and without what the base has read for it. Its modules
        stay pinned: what is there when the last one comes is not read again."""
        self.park(request)
        self.give_up([request])

    def remove(self, request: Request) -> None:
        self._account.hold(request, None)
        for requests in (self.waiting, self.active):
            if request in requests:
                requests.remove(request)

    def admit(self, failed: Callable[[Request, BaseException], None]) -> list[Request]:
        """Gives places to those that wait, in the order in which they came: first to those that need nothing that is
        not in memory, then to those for whose modules there is room. One that must wait for room does not hold up the
        others, but no more than `PATIENCE` later ones go before it.

        Args:
            failed: told of a request that can never run, and why.

        Returns:
            Those that have a place from now on.
        """
        admitted: list[Request] = []
        if not self.waiting or self._as_it_was():
            return admitted
        admitted = self._admit(failed)
        if not self.active and self.waiting:  # those that were routed may hold what the oldest needs
            self.give_up(self.waiting[:0:-1])
            admitted += self._admit(failed)
        self._seen = self._sign() if self.waiting and not admitted else None
        return admitted

    def give_up(self, requests: Sequence[Request] | None = None) -> None:
        """Has those that wait let go of what the base has read for them; by default all."""
        for request in self.waiting if requests is None else requests:
            self._account.hold(request, None)
            self._let_go(request)

    def _sign(self) -> tuple[int, ...]:
        modules = self._modules.changes, len(self._modules.hanging())
        return self._account.held_bytes, *modules, len(self.waiting), self.waiting[-1].arrival

    def _as_it_was(self) -> bool:
        """Whether nothing has changed since nobody could be admitted, and something will."""
        return bool(self.active) and self._seen == self._sign()

    def _admit(self, failed: Callable[[Request, BaseException], None]) -> list[Request]:
        admitted: list[Request] = []
        without_room: dict[Names | None, int] = {}  # tokens of the shortest for which there was none
        hanging = self._modules.hanging()
        self.give_up([request for request in self.waiting if not hanging.isdisjoint(request.names or ())])
        parked, first = self._parked, self._held_up(hanging)
        for reads in (False, True):
            resident = set(self._modules.resident)
            for request in list(self.waiting):
                if len(self.active) >= self._max_batch:
                    return admitted
                tokens = len(request.tokens) + request.config.max_new_tokens
                if request.arrival > first or tokens >= without_room.get(request.names, tokens + 1):
                    continue
                if not hanging.isdisjoint(request.names or ()):
                    continue
                if request.names is None:
                    if reads or (parked >= self._max_batch and request.overtaken < PATIENCE):
                        continue
                elif (resident >= set(request.names)) == reads:
                    continue
                try:
                    kept = _read_before(request)
                    begun = self._begin(request)
                except Exception as error:
                    failed(request, error)
                    continue
                if begun is None:
                    without_room[request.names] = tokens
                    continue
                loads, read = begun
                if request.names is None:
                    self._give(request, State.ROUTING)
                else:
                    request.loads = loads
                    self._modules.release(kept)
                    request.loaded += [name for name in read if name not in request.loaded]
                    self._give(request, State.LOADING)
                admitted.append(request)
                parked, first = self._parked, self._held_up(hanging)
        return admitted

    def _begin(self, request: Request) -> tuple[dict[str, Resident], list[str]] | None:
        """As `ModuleCache.begin`, beside what the request itself comes to."""
        footprint = self._footprint(request)
        before = self._account.hold(request, footprint)
        beside = self._account.bytes_of(footprint) if self._account.bounded else 0
        begun = None
        try:
            begun = request.context.run(self._modules.begin, request.names or (), beside, request.loads)
        finally:
            if begun is None:
                self._account.hold(request, before)
        return begun

    def parts(self) -> list[Part]:
        """The tokens of the next pass: one of each answer, with its drafts, and of prompts as many as keep the others
        waiting for no longer than they have to: of the oldest, so that it gets on, and then of those that are through
        soonest."""
        ready = [request for request in self.active if request.unread]
        writing = [request for request in ready if request.unread == 1]
        reading = [request for request in ready if request.unread > 1]
        alone = len(ready) == 1 and not self.waiting
        left, parts = MOST_TOKENS if alone else _SHARED, [Part(request, 1 + len(request.drafts)) for request in writing]
        for request in [*reading[:1], *sorted(reading[1:], key=lambda other: other.unread)]:
            if left:
                ways = max(request.mix, 1)  # a mixture reads it that many times
                many = min(request.unread, max((left if alone else min(left, _EACH)) // ways, 1))
                parts.append(Part(request, many))
                left = max(left - ways * many, 0)
        return parts

    @property
    def _parked(self) -> int:
        return sum(request.cache is not None for request in self.waiting)

    def _held_up(self, hanging: set[str]) -> float:
        """The arrival of the oldest that has waited long enough: none that came later goes before it. Not while modules
        hang: it may wait for their bytes."""
        if hanging:
            return math.inf
        return next((float(other.arrival) for other in self.waiting if other.overtaken >= PATIENCE), math.inf)

    def _give(self, request: Request, state: State) -> None:
        for other in self.waiting:
            if other.arrival < request.arrival:
                other.overtaken += 1
        self.waiting.remove(request)
        request.state = state
        self.active.append(request)


def _read_before(request: Request) -> list[Resident]:
    """The modules that a request which was set aside holds.

    Raises:
        What one of them could not be read for.
    """
    held = list((request.loads or {}).values())
    for load in held:
        if load.read:
            load.module()
    return held
