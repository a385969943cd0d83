"""Account: what requests' keys and values may come to, and what a budget leaves for modules and for what is kept.

Counts before anything is computed: a request has a place only with all the tokens that it may come to. Knows sizes;
never touches a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from growlm.base.rooms import Rooms, room_size

if TYPE_CHECKING:
    from growlm.engine.request import Request


class Footprint(NamedTuple):
    """What a request comes to.

    Attributes:
        tokens: of its text, at the most.
        slots: layers that keep keys and values of it.
        states: layers of which the inputs are kept as well.
        copies: how many times: once for every module set that writes.
    """

    tokens: int
    slots: int
    states: int = 0
    copies: int = 1


class Account:
    """A budget that modules, requests and what is kept of them share.

    Args:
        budget: bytes for all of them; None for no bound.
        slot_bytes: of one token's keys and values, by the base's slots.
        state_bytes: of one token's hidden state.
        row_bytes: of the logits of one row while a token is drawn: what a request takes for each module set but the
            first, which counts as part of a pass.
    """

    def __init__(self, budget: int | None, slot_bytes: Sequence[int], state_bytes: int, row_bytes: int) -> None:
        self.budget = budget
        self._slot_bytes, self._state_bytes, self._row_bytes = slot_bytes, state_bytes, row_bytes
        self._held: dict[Request, Footprint] = {}
        self._bytes = 0

    @property
    def bounded(self) -> bool:
        return self.budget is not None

    @property
    def held_bytes(self) -> int:
        """That requests may come to."""
        return self._bytes

    def bytes_of(self, *footprints: Footprint) -> int:
        """What such requests come to together."""
        texts = [(one.tokens, one.slots) for one in footprints for _ in range(one.copies)]
        states = sum(room_size(one.tokens) * one.states for one in footprints)
        rows = sum(one.copies - 1 for one in footprints)
        return Rooms.bytes_for(texts, self._slot_bytes) + states * self._state_bytes + rows * self._row_bytes

    def hold(self, request: Request, footprint: Footprint | None) -> Footprint | None:
        """Sets what a request holds, None for nothing; returns what it held before."""
        before = self._held.pop(request, None)
        if footprint is not None:
            self._held[request] = footprint
        if self.bounded and footprint != before:
            self._bytes = self.bytes_of(*self._held.values())
        return before

    def recount(self, states: int) -> None:
        """Counts what requests come to with inputs of so many layers, where any are kept."""
        for request, footprint in list(self._held.items()):
            if footprint.states:
                self.hold(request, footprint._replace(states=states))

    def left(self, others: int) -> int | None:
        """Bytes that are left beside what requests may come to and `others`; None where there is no bound."""
        return None if self.budget is None else max(self.budget - self._bytes - others, 0)
