"""Replay: the order in which a store's modules were learned, and the routers that it had on the way.

Knows modules and routers; not what their choices cost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress

from growlm.engine import Engine
from growlm.errors import BudgetError, GrowlmError
from growlm.router import Router, load_router
from growlm.store import ROUTER_TRAINED, Store, StoredModule
from growlm.store.versions import listed_versions
from growlm.units import format_size


def in_order(store: Store) -> list[StoredModule]:
    """The current modules in the order of learning. An update does not change a module's place: what counts is the
    earliest version that is still there."""

    def learned(module: StoredModule) -> tuple[str, str]:
        for version in listed_versions(module.folder.parent):
            if version < module.version:
                with suppress(GrowlmError):  # incomplete or damaged: `verify` says so
                    return store.module(module.name, version).manifest.created, module.name
        return module.manifest.created, module.name

    found = sorted(store.read_each(learned), key=lambda each: each[1])
    return [module for module, _ in found]


def earlier_stages(order: Sequence[str], measured: Collection[str]) -> list[list[str]]:
    """Which modules there were each time one that is measured had been learned, others that were learned before it
    included. The last stage is not among them where it is the store as it is."""
    stages = [list(order[: place + 1]) for place, name in enumerate(order) if name in measured]
    return [stage for stage in stages if len(stage) < len(order)]


def routers(engine: Engine, stages: Sequence[Collection[str]]) -> Iterator[Router]:
    """The router of each stage, of the engine's own kind. The engine's own stays, and beside it one of these at a time:
    let go of each before asking for the next.

    Raises:
        BudgetError: one of them does not fit the engine's budget; nothing was read.
    """
    if stages:
        _check_budget(engine)
    for stage in stages:
        for name in engine.modules.resident:  # those that were looked at
            engine.modules.retire(name)
        yield load_router(engine.store, stage, kind=engine.router.kind).bind(engine.base)


def _check_budget(engine: Engine) -> None:
    largest = _largest(engine)
    needed = engine.fixed_bytes + engine.workspace_bytes + largest
    if engine.memory is not None and needed > engine.memory:
        raise BudgetError(
            f"--memory {format_size(engine.memory)} is too small to replay the order of learning: base "
            f"{format_size(engine.base_bytes)}, router {format_size(engine.router.num_bytes())} and beside it an "
            f"earlier one of up to {format_size(largest)} need {format_size(needed)}; raise it, or give --no-matrix"
        )


def _largest(engine: Engine) -> int:
    """Bytes that no earlier router passes, known before one is read: a fitted one grows with its modules, and a trained
    one is one of the versions that are kept."""
    sizes = [engine.router.num_bytes()]
    if engine.router.kind == "transformer":
        trained = engine.store.router_files(ROUTER_TRAINED)
        for version in trained.versions():
            sizes.append(trained.num_bytes(version))
    return max(sizes)
