"""Routing: the routers of a store that changes while it is served: what is gone is chosen no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from growlm.base import Base
from growlm.errors import IntegrityError
from growlm.router import NONE, Route, Router, load_router
from growlm.store import ROUTER_FITTED, Store

Among = frozenset[str] | None  # the modules that a router chooses among; None for all of the store's


class Routing:
    """Routers, and the base whose states they read.

    Args:
        kind: of the routers; None for the store's own.
    """

    def __init__(self, store: Store, base: Base, kind: str | None) -> None:
        self._store, self._base, self._kind = store, base, kind
        self._routers: dict[Among, Router] = {}

    @property
    def router(self) -> Router:
        """The one of all modules."""
        return self._routers[None]

    @property
    def layer(self) -> int:
        """After how many layers they read the base's states."""
        return self._base.num_layers if self.router.layer is None else self.router.layer

    @property
    def fork_layers(self) -> frozenset[int]:
        """Where modules branch off."""
        return frozenset[int]().union(*(router.fork_layers for router in self._routers.values()))

    @property
    def among(self) -> list[Among]:
        """The sets of modules that there is a router for."""
        return list(self._routers)

    def among_of(self, among: Among) -> Router:
        if among not in self._routers:  # it was let go of since it was asked for, and counts again from now on
            self._routers[among] = self.loaded(among)
        return self._routers[among]

    def num_bytes(self) -> int:
        return sum(router.num_bytes() for router in self._routers.values())

    def loaded(self, among: Among) -> Router:
        """A router from the disk, ready to route.

        Raises:
            IntegrityError: it is of modules that branch off where this base has no layer.
        """
        return self.bound(load_router(self._store, among, kind=self._kind))

    def bound(self, unbound: Router) -> Router:
        """As `loaded`, of one that was read already."""
        router = unbound.bind(self._base)
        if max(router.fork_layers, default=0) > self._base.num_layers:  # else the base would be run to nowhere
            for name in router.names:
                self._store.module(name).fork_on(self._base.num_layers)
            fitted = self._store.router_path / ROUTER_FITTED
            raise IntegrityError(f"{fitted}: is not of this store's modules; delete it")
        return router

    def exchange(self, routers: Mapping[Among, Router]) -> dict[Among, Router]:
        """Routes with these from now on; returns those before."""
        before, self._routers = self._routers, dict(routers)
        return before

    def routes(self, hidden: Tensor, text: Sequence[int], among: Among) -> list[Route]:
        """A router's answers, among modules that the store still holds: some may go while this engine runs.

        Args:
            hidden: the base's states (1, t, d) where the router reads them, before the final norm.
            text: the token ids that they are of.
        """
        router = self.among_of(among)
        if router.layer is None:
            hidden = self._base.norm(hidden)
        while True:
            routes = router.route(hidden, None, [text])
            gone = self._store.missing({name for r in routes for name in r.scores} - {NONE})
            gone |= {r.module for r in routes if r.module is not None and self._store.find(r.module) is None}
            if not gone:
                return routes
            # All that are gone, not only those that were listed: a smaller router takes a copy of what is left.
            router = self._routers[among] = router.without(gone | self._store.missing(router.names))
