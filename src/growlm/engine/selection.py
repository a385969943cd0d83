"""Selections: under which modules a request runs, by name. Knows names, kinds and manifests; reads no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from growlm.engine.request import Names
from growlm.errors import ConfigError, UnknownModuleError, setting
from growlm.modules import check_together

if TYPE_CHECKING:
    from growlm.store import Store, StoredModule

AUTO = "auto"  # let the router choose
Wanted = str | Sequence[str | None] | None  # as callers name it: one module, several, None for the base, or AUTO

_BASE = ("base", "none")  # names that no module has, and that people give for the base
_ALONE = {
    AUTO: 'leave out "auto", which lets the router choose, or give it alone',
    None: "leave out base, which is no module, or give it alone",
}


def select(
    store: Store, wanted: Wanted, resident: Callable[[str], StoredModule | None] = lambda name: None
) -> Names | str:
    """The modules that are meant, or AUTO. The order in which they were named does not count, nor how often.

    Args:
        resident: the version of a module that would run because it is in memory; without one the current version does.

    Raises:
        UnknownModuleError: no such module.
        IntegrityError: a manifest does not say what kind of module it is.
        ConfigError: modules that cannot be active together, none in a list of them, or something that is no name.
    """
    if wanted is None:
        return ()
    if wanted == AUTO:
        return AUTO
    if isinstance(wanted, str):
        if wanted in _BASE:
            raise UnknownModuleError(f"no module {wanted!r}; for the base alone give None")
        store.module(wanted)
        return (wanted,)
    if not isinstance(wanted, Iterable):
        raise ConfigError(f'module is {wanted!r}; give a name, a list of names, None for the base, or "auto"')
    given = list(wanted)
    if not given:
        raise ConfigError('an empty list of modules; name some, or give None for the base or "auto" for the router')
    if len(given) == 1:
        return select(store, given[0], resident)
    for name, advice in _ALONE.items():
        if name in given or (name is None and any(isinstance(g, str) and g in _BASE for g in given)):
            raise ConfigError(f"{name or 'base'} cannot be active together with others; {advice}")
    names = tuple(sorted({str(name) for name in given}))
    current = [store.module(name) for name in names]
    check_together([(stored.name, (resident(stored.name) or stored).shape()[0]) for stored in current])
    return names


def require_one_way(wanted: Wanted, mix: int, reroute: int, known: int, listed: int) -> None:
    """
    Args:
        known: how many modules the router knows.
        listed: how many of them an answer of the router lists.

    Raises:
        ConfigError: `mix` or `reroute` out of range, or at odds with each other or with modules that are named.
    """
    if mix < 1 or reroute < 0:
        name, value, minimum = ("mix", mix, 1) if mix < 1 else ("reroute", reroute, 0)
        raise ConfigError(f"{setting(name)} is {value}; it must be at least {minimum}")
    if mix > 1 and mix > known:
        raise ConfigError(f"--mix {mix}: the router knows {known} modules; mix at most as many")
    if mix > 1 and mix > listed:
        raise ConfigError(f"--mix {mix}: the router lists the best {listed} of {known} modules; mix at most as many")
    if (mix > 1 or reroute) and wanted not in (AUTO, [AUTO]):
        names = [wanted] if wanted is None or isinstance(wanted, str) else wanted
        given = " ".join(f"--module {name or 'base'}" for name in names)
        raise ConfigError(f"{'--mix' if mix > 1 else '--reroute'} chooses modules itself; leave out {given}")
    if mix > 1 and reroute:
        raise ConfigError("--mix already follows the text; leave out --reroute")
