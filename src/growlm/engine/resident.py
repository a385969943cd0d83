"""Residents: a version of a module on the disk, and one in memory or on its way there. Who puts them there is
`module_cache`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from growlm.modules import KnowledgeModule

if TYPE_CHECKING:
    from growlm.store import StoredModule


@dataclass(frozen=True)
class Found:
    """One version of a module on the disk.

    Attributes:
        stored: which.
        bytes: what it takes once loaded.
        load: reads exactly this one.
        mark: tells it from any other.
    """

    stored: StoredModule
    bytes: int
    load: Callable[[], KnowledgeModule]
    mark: Any = None


@dataclass(eq=False)
class Resident:
    """One version of a module in memory, or on its way there.

    Attributes:
        found: which.
        future: the module, once it has been read.
        pins: how often it is held.
        used: when it was let go of last; None for never.
        retired: whether the disk has another version by now: it goes as soon as nobody holds it.
    """

    found: Found
    future: Future[KnowledgeModule]
    pins: int = 0
    used: float | None = None
    retired: bool = False

    @property
    def read(self) -> bool:
        """Whether it is there, or could not be read."""
        return self.future.done()

    @property
    def here(self) -> bool:
        """Whether all of it is on its device, or could not be read."""
        if not self.future.done() or self.future.cancelled() or self.future.exception() is not None:
            return self.future.done()
        arriving = self.future.result().arriving
        return arriving is None or arriving.there()

    def module(self) -> KnowledgeModule:
        """The module, which must have been read.

        Raises:
            What it could not be read for.
        """
        return self.future.result()
