"""Fitting: which modules fit the room that a budget leaves, and what to say where they do not. Knows names and bytes;
not what is in memory, nor how it gets there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from growlm.errors import BudgetError, setting
from growlm.units import format_size


@dataclass
class Room:
    """What a budget leaves for modules, keys and values.

    Attributes:
        num_bytes: None for no bound.
        reserved: what else counts against the whole budget, for messages.
        hint: what else than a larger budget would help, for messages.
    """

    num_bytes: int | None
    reserved: str = ""
    hint: str = ""

    def fitted(
        self, sizes: Mapping[str, int], smaller: Mapping[str, int], beside: int, pinned: Mapping[str, int]
    ) -> list[str]:
        """The names of modules of which the smaller version is to be taken, so that all fit together: no more than it
        needs.

        Args:
            sizes: by name, in the versions that are in memory, or are read next.
            smaller: of those of which the disk has a smaller one.
            beside: bytes that who uses them takes as well.
            pinned: of others, that stay.

        Raises:
            BudgetError: they do not fit.
        """
        assert self.num_bytes is not None
        room, sizes, replaced = self.num_bytes - beside - sum(pinned.values()), dict(sizes), []
        for name in sorted(smaller, key=lambda n: smaller[n] - sizes[n]):
            if sum(sizes.values()) <= room:
                break
            sizes[name] = smaller[name]
            replaced.append(name)
        if sum(sizes.values()) > room:
            raise self._too_large(sizes, beside, room, sorted(pinned))
        return replaced

    def _too_large(self, sizes: Mapping[str, int], beside: int, room: int, pinned: Collection[str]) -> BudgetError:
        assert self.num_bytes is not None
        needed = sum(sizes.values())
        text = [f"keys and values of this text {format_size(beside)}"] if beside else []
        listed = ", ".join([*(f"{name} {format_size(size)}" for name, size in sizes.items()), *text])
        alone = "do not fit" if not sizes else "does not fit"
        what = "do not fit together" if sizes and (beside or len(sizes) > 1) else alone
        stay = f", less what is pinned ({', '.join(pinned)})" if pinned else ""
        fewer = f", or ask for fewer tokens with {setting('max_new_tokens')}"
        shorter = fewer if beside and room + beside >= needed else ""
        return BudgetError(
            f"{listed} {what}: {format_size(self.num_bytes)} are left for modules, keys and values"
            f"{self.reserved}{stay}; raise --memory by at least {format_size(needed - room)}{shorter}{self.hint}"
        )

    def taken(self, needed: int, held: int, in_use: Collection[str]) -> BudgetError:
        """What to say where there is no room for more beside modules in use, and keys and values of so many bytes."""
        assert self.num_bytes is not None
        return BudgetError(
            f"{format_size(needed)} more do not fit: {format_size(self.num_bytes)} are left for modules, keys "
            f"and values{self.reserved}, in use are: {', '.join(sorted(in_use)) or 'none'}, and {format_size(held)} of "
            "keys and values; raise --memory"
        )
