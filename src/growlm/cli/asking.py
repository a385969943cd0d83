"""What commands share that ask a store: the engine that answers, and the modules that were named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from growlm.cli.output import name_of
from growlm.progress import reporting

if TYPE_CHECKING:
    from growlm.engine import Engine


def open_engine(
    store: Path,
    memory: str | None,
    device: str,
    experts_on: str = "memory",
    row_cache: str | None = None,
    strict: bool = False,
) -> Engine:
    """The engine of a store; its weights are read with progress under the store's name."""
    with reporting(name_of(store)):
        from growlm.engine import Engine
        from growlm.store import Store

        return Engine(
            Store.open(store), memory=memory, device=device, experts_on=experts_on, row_cache=row_cache, strict=strict
        )


def module_names(names: list[str] | None) -> list[str | None] | str:
    """What the engine understands for the names of --module: base is None, none given is auto."""
    return [None if name == "base" else name for name in names] if names else "auto"
