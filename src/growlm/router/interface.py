"""What every kind of router answers, so that the engine and evaluation need not know which it is.

Knows hidden states and names; never loads a module's weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from growlm.router.states import base_states

if TYPE_CHECKING:
    from growlm.base import Base

NONE = "none"


@dataclass(frozen=True)
class Route:
    """The router's answer for one text.

    Attributes:
        module: the chosen module's name, or None for none of these.
        scores: probability of every module and of `"none"`, best first; they sum to 1. A router of very many modules
            gives the best of them only.
        refused: the module that was chosen at first, and that a second look found to read the text no better than the
            base.
    """

    module: str | None
    scores: dict[str, float]
    refused: str | None = None


class Router(ABC):
    """Chooses modules from the base's own hidden states.

    Attributes:
        layer: after how many of the base's layers it reads them; None: after all of them and the final norm.
    """

    kind: str
    layer: int | None = None
    names: list[str]
    forks: dict[str, int]  # of every module: where a request may leave the base

    @cached_property
    def fork_layers(self) -> frozenset[int]:
        """All values of `forks`: few, however many modules there are."""
        return frozenset(self.forks.values())

    @property
    def num_listed(self) -> int:
        """How many modules an answer lists: all, unless the kind says fewer."""
        return len(self.names)

    def bind(self, base: Base) -> Router:
        """This router, ready to route on `base`: for kinds that run layers of the base's family."""
        return self

    @abstractmethod
    def without(self, names: Collection[str]) -> Router:
        """This router without modules that are gone from the store; no larger than it was."""

    def states(self, base: Base, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """What `route` reads of texts, given as token ids: the base's states (b, t, d), and which are visible."""
        return base_states(base, texts, self.layer)

    @abstractmethod
    def route(
        self, hidden: Tensor, visible: Tensor | None = None, texts: Sequence[Sequence[int]] | None = None
    ) -> list[Route]:
        """
        Args:
            hidden: the base's states after `layer`, (b, t, d).
            visible: (b, t) bool, False where padded.
            texts: their token ids; without them words count for nothing.
        """

    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes that the router keeps in memory."""


def names_of(routes: Iterable[Route]) -> list[str]:
    return [r.module or NONE for r in routes]
