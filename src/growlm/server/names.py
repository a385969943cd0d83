"""Names: what the field `model` means, and which models there are for who asks."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from growlm.engine import AUTO, Engine, Wanted
from growlm.errors import GrowlmError, UnknownModuleError, shortened
from growlm.server.keys import caller
from growlm.server.refusals import Refusal
from growlm.store import MANIFEST, StoredModule
from growlm.store.stored_module import is_name

BASE = "base"


def _about(stored: StoredModule) -> dict[str, Any]:
    """What is known of a module; of one that cannot be read, that it is damaged. A page asks for it all the time: what
    was read of a version is kept.

    Raises:
        UnknownModuleError: it was removed meanwhile.
    """
    try:
        with stored.reading():
            stat = (stored.folder / MANIFEST).stat()
        return _read(stored.name, stored.version, stored.folder, (stat.st_ino, stat.st_mtime_ns))
    except UnknownModuleError:
        raise
    except (GrowlmError, OSError):
        return {"version": stored.version, "damaged": True}


@lru_cache(maxsize=4096)
def _read(name: str, version: int, folder: Path, stamp: tuple[int, int]) -> dict[str, Any]:
    """How large a module is, and how well it has learned.

    Args:
        stamp: of its manifest: another one is read anew.

    Raises:
        GrowlmError: it is damaged.
    """
    stored = StoredModule(name, version, folder)
    manifest, told = stored.manifest, {"kind": stored.kind, "version": stored.version, "bytes": stored.bytes}
    training = {name: manifest.training.get(name) for name in ("tokens", "documents", "loss_before", "loss_after")}
    created = int(datetime.fromisoformat(manifest.created).timestamp())
    return {**told, "created": created, "parameters": manifest.parameters, **training}


class Names:
    """Of one engine's store: a module's name, alone or behind the store's name and a colon, is that module; else the
    store's own name, as `auto`, lets the router choose, and `base` is the base alone."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._store = engine, engine.store
        self.store = engine.store.path.resolve().name
        self.length = engine.base.trained_positions or engine.base.max_positions

    def wanted(self, model: str | None) -> Wanted:
        """What the engine understands.

        Raises:
            Refusal: no such model; the message names those that there are for who asks.
        """
        name = model or AUTO
        if name == self.store and self._there(name):
            return name
        if name in (AUTO, self.store):
            return AUTO
        name = name.removeprefix(f"{self.store}:")
        if name in (AUTO, BASE):
            return AUTO if name == AUTO else None
        if not self._there(name):
            known = [AUTO, BASE, *filter(caller().sees, self._store.modules)]
            told = f"no model {shortened(model)}; there are {', '.join(known)}"
            raise Refusal(404, told, "model_not_found", "model")
        return name

    def _there(self, name: str) -> bool:
        """Whether it is a module that who asks may know of."""
        return is_name(name) and caller().sees(name) and self._store.find(name) is not None

    def cards(self) -> list[dict[str, Any]]:
        """Of all models that there are for who asks, as `/v1/models` lists them."""
        seen = [stored for name, stored in self._store.modules.items() if caller().sees(name)]
        resident, pinned = set(self._engine.modules.resident), set(self._engine.modules.kept)
        of_modules = self._store.read_each(lambda stored: self._card_of(stored, resident, pinned), seen)
        return [self._card_of_auto(), self._card_of_base(), *(card for _, card in of_modules)]

    def card(self, model: str) -> dict[str, Any]:
        """
        Raises:
            Refusal: no such model.
            UnknownModuleError: it is removed meanwhile.
        """
        wanted = self.wanted(model)
        if wanted is None:
            card = self._card_of_base()
        elif wanted == AUTO:
            card = self._card_of_auto()
        else:
            assert isinstance(wanted, str)
            modules = self._engine.modules
            card = self._card_of(self._store.module(wanted), modules.resident, modules.kept)
        return {**card, "id": model}

    def _card_of_auto(self) -> dict[str, Any]:
        return self._card(AUTO, kind="router")

    def _card_of_base(self) -> dict[str, Any]:
        return self._card(BASE, kind="base", bytes=self._engine.base_bytes, resident=True)

    def _card_of(self, stored: StoredModule, resident: Collection[str], pinned: Collection[str]) -> dict[str, Any]:
        about = _about(stored)
        there = {"resident": stored.name in resident, "pinned": stored.name in pinned}
        return {**self._card(stored.name, parent=BASE), **about, **there}

    def _card(self, name: str, **more: Any) -> dict[str, Any]:
        own = {"id": name, "object": "model", "created": 0, "owned_by": "growlm", "max_model_len": self.length}
        return {**own, "root": self.store, "parent": None, **more}
