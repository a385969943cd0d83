"""Routing: the router of a store that changes while it is served: what is gone is chosen no more."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from growlm.base import Base
from growlm.errors import IntegrityError
from growlm.router import NONE, Route, Router
from growlm.store import ROUTER_FITTED, Store


class Routing:
    """A router and the base whose states it reads.

    Raises:
        IntegrityError: the router is of modules that branch off where this base has no layer.
    """

    def __init__(self, store: Store, base: Base, router: Router) -> None:
        self._store, self._base = store, base
        self.router = router.bind(base)
        if max(self.router.fork_layers, default=0) > base.num_layers:  # else the base would be run to nowhere
            for name in self.router.names:
                store.module(name).fork_on(base.num_layers)
            raise IntegrityError(f"{store.router_path / ROUTER_FITTED}: is not of this store's modules; delete it")

    @property
    def layer(self) -> int:
        """After how many layers it reads the base's states."""
        return self._base.num_layers if self.router.layer is None else self.router.layer

    def routes(self, hidden: Tensor, text: Sequence[int]) -> list[Route]:
        """The router's answers, among modules that the store still holds: some may go while this engine runs.

        Args:
            hidden: the base's states (1, t, d) where the router reads them, before the final norm.
            text: the token ids that they are of.
        """
        if self.router.layer is None:
            hidden = self._base.norm(hidden)
        while True:
            routes = self.router.route(hidden, None, [text])
            gone = self._store.missing({name for r in routes for name in r.scores} - {NONE})
            gone |= {r.module for r in routes if r.module is not None and self._store.find(r.module) is None}
            if not gone:
                return routes
            # All that are gone, not only those that were listed: a smaller router takes a copy of what is left.
            self.router = self.router.without(gone | self._store.missing(self.router.names))
