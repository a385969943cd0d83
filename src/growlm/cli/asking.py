"""What commands share that ask a store: the engine that answers, and the modules that were named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growlm.cli.output import name_of
from growlm.errors import ConfigError, UnknownModuleError
from growlm.progress import reporting
from growlm.units import parse_size

if TYPE_CHECKING:
    from growlm.engine import Engine
    from growlm.store import Store


def open_engine(
    store: Path,
    memory: str | None,
    device: str,
    experts_on: str = "memory",
    row_cache: str | None = None,
    strict: bool = False,
    wanted: Sequence[str | None] = (),
    max_batch: int = 32,
    host_memory: str | None = None,
    second_look: bool = False,
) -> Engine:
    """The engine of a store; its weights are read with progress under the store's name.

    Args:
        wanted: what is asked for, as `module_names` has it.
    """
    with reporting(name_of(store)):
        opened = open_store(store, *(name for name in wanted if name not in (None, "auto")))
        for name, size in (("memory", memory), ("row_cache", row_cache), ("host_memory", host_memory)):
            if size is not None:
                parse_size(size, name)
        from growlm.engine import Engine

        return Engine(
            opened,
            memory=memory,
            device=device,
            experts_on=experts_on,
            row_cache=row_cache,
            host_memory=host_memory,
            strict=strict,
            max_batch=max_batch,
            second_look=second_look,
        )


def open_store(path: Path | str, *names: str, data: Iterable[str] = (), **reading: Any) -> Store:
    """A store, before anything is imported that takes seconds: what is wrong with names or data is told at once.

    Args:
        names: of modules that it must hold.
        data: that must be there, and begin as it should.
        reading: how it is read: the settings of `growlm.data.read`.
    """
    from growlm.store import Store

    store = Store.open(path)
    for name in names:
        store.module(name)
    require_data(data, **reading)
    return store


def open_source(source: str, names: Sequence[str], data: Iterable[str], **reading: Any) -> None:
    """As `open_store`, for what is a store or a checkpoint. Of a checkpoint's modules nothing is asked here."""
    if (Path(source).expanduser() / "store.json").exists():
        open_store(source, *names, data=data, **reading)
        return
    require_data(data, **reading)
    from growlm.base.checkpoint import resolve

    resolve(source)


def require_data(data: Iterable[str], **reading: Any) -> None:
    from growlm.data import look_at

    look_at(data, **reading)


def none_because(refused: str | None) -> str:
    """Why no module answers.

    Args:
        refused: the module that a second look has kept from it.
    """
    if refused is None:
        return "the router chose no module"
    return f"the router chose {refused}, which reads the prompt no better than the base"


def require_looks(second_look: bool, **others: bool) -> None:
    """
    Args:
        others: whether an option is given, by name, with which the router does not choose one module, once.

    Raises:
        ConfigError: there would be nothing to look at again.
    """
    given = [f"--{name}" for name, there in others.items() if there]
    if second_look and given:
        raise ConfigError(
            f"--second-look: of no effect with {' and '.join(given)}, where the router does not choose one module, "
            "once; leave one of them out"
        )


def module_names(names: Sequence[str] | None) -> list[str | None]:
    """What the engine understands for the names of --module: base is None, and where there are no names it is auto.

    Raises:
        UnknownModuleError: none, by which people mean the base.
    """
    for name in names or ():
        if name.lower() in ("none", ""):
            raise UnknownModuleError(f"no module {name!r}; to ask the base alone, name it: base")
    return [None if name == "base" else name for name in names or ["auto"]]
