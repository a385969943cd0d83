"""Scheduler: which requests run together, and in which order. Never touches a tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

Names = tuple[str, ...]  # the modules that are active for a request, in their order; none for the base


@dataclass(frozen=True)
class Wave:
    """Requests whose modules are in memory together. `groups` holds request indices by their modules."""

    groups: dict[Names, tuple[int, ...]]

    @property
    def names(self) -> list[str]:
        """All modules of the wave, each once."""
        return list(dict.fromkeys(name for names in self.groups for name in names))


def plan(
    requests: Sequence[Names],
    *,
    budget: int | None,
    size: Callable[[str], int],
    resident: Collection[str],
) -> list[Wave]:
    """Groups requests by their modules and packs the groups into waves that fit the budget. A module that several
    groups of a wave share takes its bytes once.

    Modules in memory go first, so that none is evicted and read again; then the most wanted. Requests for the base
    need no module and join the first wave.

    Args:
        requests: the modules of every request.
        budget: bytes that modules may take together; None for no bound. Those of each request alone must fit.
        size: bytes of a module.
        resident: modules in memory now.
    """
    groups: dict[Names, list[int]] = {}
    for index, names in enumerate(requests):
        groups.setdefault(names, []).append(index)
    base = tuple(groups.pop((), ()))

    def turn(names: Names) -> tuple[int, int, int, Names]:
        missing = sum(name not in resident for name in names)
        return missing, missing - len(names), -len(groups[names]), names

    waves: list[dict[Names, tuple[int, ...]]] = []
    held: set[str] = set()
    for names in sorted(groups, key=turn):
        together = held.union(names)
        if not waves or (budget is not None and sum(map(size, together)) > budget):
            waves.append({})
            together = set(names)
        waves[-1][names] = tuple(groups[names])
        held = together
    if base:
        if not waves:
            waves.append({})
        waves[0][()] = base
    return [Wave(w) for w in waves]
