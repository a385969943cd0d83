"""Budget: a bound of bytes, and what of it is spoken for before any module: base, routers, and what a pass takes."""

from __future__ import annotations

from dataclasses import dataclass

from growlm.errors import BudgetError
from growlm.units import format_size


@dataclass
class Budget:
    """
    Attributes:
        memory: the bound; None for none.
        base: of the base.
        workspace: what a pass takes at the most; 0 where there is no bound, or where that is not known yet.
    """

    memory: int | None
    base: int = 0
    workspace: int = 0

    def require(self, routers: int) -> None:
        """
        Raises:
            BudgetError: base, routers and a pass do not fit.
        """
        needed = self.base + routers + self.workspace
        if self.memory is not None and needed > self.memory:
            passes = f", and a pass {format_size(self.workspace)}," if self.workspace else ""
            beside = "any module" if self.workspace else "what a pass and modules take"
            raise BudgetError(
                f"--memory {format_size(self.memory)} is too small: base {format_size(self.base)} and router "
                f"{format_size(routers)}{passes} need {format_size(needed)} before {beside}"
            )

    def left(self, routers: int) -> int | None:
        """For modules, for keys and values, and for what is kept."""
        return None if self.memory is None else self.memory - self.base - routers - self.workspace

    def spoken_for(self, routers: int) -> str:
        """What the rest of the bound is for, for messages."""
        return (
            f" of {format_size(self.memory or 0)} after base {format_size(self.base)}, router "
            f"{format_size(routers)} and workspace {format_size(self.workspace)}"
        )
