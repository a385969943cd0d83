"""Scheduler: which requests run together, and in which order. Never touches a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Wave:
    """Requests whose modules are in memory together. `groups` holds request indices by module; None is the base."""

    groups: dict[str | None, tuple[int, ...]]

    @property
    def names(self) -> list[str]:
        return [name for name in self.groups if name is not None]


def plan(
    modules: Sequence[str | None],
    *,
    budget: int | None,
    size: Callable[[str], int],
    resident: Sequence[str],
) -> list[Wave]:
    """Groups requests by module and packs the groups into waves that fit the budget.

    Modules in memory go first, so that none is evicted and read again; then the most wanted. Requests for the base
    need no module and join the first wave.

    Args:
        modules: the module of every request.
        budget: bytes that modules may take together; None for no bound. Each alone must fit.
        size: bytes of a module.
        resident: modules in memory now.
    """
    groups: dict[str | None, list[int]] = {}
    for index, name in enumerate(modules):
        groups.setdefault(name, []).append(index)
    base = tuple(groups.pop(None, ()))
    order = sorted(groups, key=lambda n: (n not in resident, -len(groups[n]), n or ""))
    waves: list[dict[str | None, tuple[int, ...]]] = []
    room = 0
    for name in order:
        assert name is not None
        needed = size(name)
        if not waves or (budget is not None and needed > room):
            waves.append({})
            room = budget if budget is not None else 0
        waves[-1][name] = tuple(groups[name])
        room -= needed
    if base:
        if not waves:
            waves.append({})
        waves[0][None] = base
    return [Wave(w) for w in waves]
