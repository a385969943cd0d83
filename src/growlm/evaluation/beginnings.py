"""Beginnings: the first tokens of some documents, as one router after another sees them.

Knows token ids and what the base says of them; not which module is right.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from growlm.base import Base
from growlm.progress import phase
from growlm.router import NONE, Route, Router

_BATCH = 16


class Beginnings:
    """Texts that several routers are asked about; the base reads them once, as far as its states fit in `room`.

    Args:
        texts: token ids, at least one each.
        room: bytes of states that may be kept for the next router; those of other texts are computed again.
    """

    def __init__(self, base: Base, texts: Sequence[Sequence[int]], room: int) -> None:
        self._base, self._texts, self._room = base, texts, room
        # Texts of like length share a batch, so that little of it is padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        self._batches = [order[at : at + _BATCH] for at in range(0, len(order), _BATCH)]
        self._kept: dict[tuple[int, int | None], tuple[Tensor, Tensor | None]] = {}  # by the batch's number and layer

    def routes(self, router: Router) -> list[Route]:
        """The router's answer for each text."""
        found = [Route(None, {NONE: 1.0})] * len(self._texts)
        with phase("routing", len(self._texts), "documents") as routing:
            for number, some in enumerate(self._batches):
                routes = router.route(*self._states(number, router), [self._texts[i] for i in some])
                for i, route in zip(some, routes, strict=True):
                    found[i] = route
                routing.advance(len(some))
        return found

    def _states(self, number: int, router: Router) -> tuple[Tensor, Tensor | None]:
        kept = number, router.layer
        if kept in self._kept:
            return self._kept[kept]
        hidden, visible = router.states(self._base, [self._texts[i] for i in self._batches[number]])
        if hidden.nbytes <= self._room:
            self._room -= hidden.nbytes
            self._kept[kept] = hidden, visible
        return hidden, visible
