"""Reloading: a store that has changed on the disk is served as it is now, while requests go on.

What is being answered ends on the versions that it began with. Knows what the store has and what is in memory; who
asks for it knows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from growlm.engine.budget import Budget
from growlm.engine.loop import Loop
from growlm.engine.parts import Parts
from growlm.engine.routing import Among
from growlm.errors import BudgetError, ConfigError
from growlm.router import Router
from growlm.store import MANIFEST, ROUTER_TRAINED, Store
from growlm.units import format_size

_MOST_ROUTERS = 256  # sets of modules that a router is kept for


@dataclass(frozen=True)
class Changes:
    """Modules that a store has, has anew, or has no more."""

    added: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.added or self.updated or self.removed)


class Reloading:
    """Of one engine.

    Args:
        make_way: called once there is less room than before.
    """

    def __init__(self, store: Store, parts: Parts, loop: Loop, budget: Budget, make_way: Callable[[], None]) -> None:
        self._store, self._loop, self._budget, self._make_way = store, loop, budget, make_way
        self._modules, self._routing, self._account = parts.modules, parts.routing, parts.account
        self._one = Lock()
        self._asked: set[Among] = set()  # since it was reloaded last
        self._served = _seen(store)

    def due(self) -> bool:
        """Whether the disk has another store than the one that is served."""
        return _seen(self._store) != self._served

    def reload(self) -> Changes:
        """
        Raises:
            BudgetError: the router has grown too large for what is pinned; it is left as it was.
            IntegrityError: a file of the router is damaged; it is left as it was.
        """
        with self._one:
            now, before = _seen(self._store), self._served
            wanted = {None, *self._asked, *(request.among for request in self._loop.scheduler.all())}
            self._exchange({among: self._routing.loaded(among) for among in self._routing.among if among in wanted})
            self._served, self._asked = now, set()
        both = before.modules.keys() & now.modules.keys()
        return Changes(
            sorted(now.modules.keys() - before.modules.keys()),
            sorted(name for name in both if before.modules[name] != now.modules[name]),
            sorted(before.modules.keys() - now.modules.keys()),
        )

    def has_router(self, among: Among) -> bool:
        """Whether there is a router of these modules alone, so that `among` has nothing to wait for."""
        self._asked.add(among)
        return among in self._routing.among

    def among(self, among: Among) -> None:
        """Sees to a router of these modules alone.

        Raises:
            BudgetError: there is no room for it.
            ConfigError: there are too many of them already.
        """
        if self.has_router(among):  # whoever reloads meanwhile, and lets go of it, has it read anew where it is used
            return
        with self._one:
            known = self._routing.among
            if among in known:
                return
            if len(known) > _MOST_ROUTERS:
                raise ConfigError(f"a router is kept of {_MOST_ROUTERS} sets of modules at the most; name fewer")
            self._exchange({one: self._routing.among_of(one) for one in known} | {among: self._routing.loaded(among)})

    def _exchange(self, routers: Mapping[Among, Router]) -> None:
        """Routes with these from now on, and has what is outdated in memory read anew, once there is room for that."""

        def exchanged(idle: bool) -> bool:
            before = self._routing.exchange(routers)
            try:
                if self._take_room(idle):
                    self._modules.retire_outdated()
                    return True
            except BaseException:
                self._take_back(before)
                raise
            self._take_back(before)
            return False

        self._loop.between_steps(exchanged)

    def _take_room(self, idle: bool) -> bool:
        """Takes from the budget what routers take by now; returns whether there is room for that.

        Raises:
            BudgetError: there is none, and will be none.
        """
        account, modules, took = self._account, self._modules, self._routing.num_bytes()
        account.recount(self._loop.reading.num_kept)
        left = self._budget.left(took)
        if left is not None and account.held_bytes + modules.busy_bytes > left:
            self._loop.scheduler.give_up()  # those that wait can read again
            stays = modules.busy_bytes if idle else modules.kept_bytes
            if (idle and account.held_bytes + stays > left) or stays > left:
                raise BudgetError(
                    f"{self._store.path}: its router takes {format_size(took)} by now, and what is pinned or in use "
                    f"{format_size(stays)}: raise --memory by at least {format_size(account.held_bytes + stays - left)}"
                )
            if account.held_bytes + modules.busy_bytes > left:
                return False
        account.budget = left
        modules.set_budget(left, self._budget.spoken_for(took))
        self._make_way()
        return True

    def _take_back(self, routers: Mapping[Among, Router]) -> None:
        """Routes as before; the budget has not changed."""
        self._routing.exchange(routers)
        self._account.recount(self._loop.reading.num_kept)


@dataclass(frozen=True)
class _Seen:
    """What tells a store from itself at another time."""

    modules: Mapping[str, tuple[int, ...]]
    trained: tuple[int, ...]


def _seen(store: Store) -> _Seen:
    modules = {
        name: (versions[-1], *_stamp(store.path / "modules" / name / str(versions[-1]) / MANIFEST))
        for name, versions in store.versions()
    }
    return _Seen(modules, tuple(store.router_files(ROUTER_TRAINED).versions()))


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        stat = path.stat()
    except FileNotFoundError:  # removed meanwhile
        return ()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
