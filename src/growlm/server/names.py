"""Names: what the field `model` means, and which models there are."""

from __future__ import annotations

from typing import Any

from growlm.engine import AUTO, Engine, Wanted
from growlm.errors import UnknownModuleError, shortened
from growlm.store.stored_module import is_name

BASE = "base"


class Names:
    """Of one engine's store: the store's own name and `auto` let the router choose, `base` is the base alone, a
    module's name, alone or behind the store's name and a colon, is that module."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._store = engine, engine.store
        self.store = engine.store.path.resolve().name
        self.length = engine.base.trained_positions or engine.base.max_positions

    def wanted(self, model: str | None) -> Wanted:
        """What the engine understands.

        Raises:
            UnknownModuleError: no such model; the message names those that there are.
        """
        name = model or AUTO
        if name in (AUTO, self.store):
            return AUTO
        name = name.removeprefix(f"{self.store}:")
        if name in (AUTO, BASE):
            return AUTO if name == AUTO else None
        if not is_name(name) or self._store.find(name) is None:
            known = [AUTO, BASE, *self._store.modules]
            raise UnknownModuleError(f"no model {shortened(model)}; there are {', '.join(known)}")
        return name

    def cards(self) -> list[dict[str, Any]]:
        """Of all models, as `/v1/models` lists them."""
        resident = set(self._engine.modules.resident)

        def card(name: str, **more: Any) -> dict[str, Any]:
            own = {"id": name, "object": "model", "created": 0, "owned_by": "growlm", "max_model_len": self.length}
            return {**own, "root": self.store, "parent": None, **more}

        cards = [card(AUTO, kind="router"), card(BASE, kind="base", bytes=self._engine.base_bytes, resident=True)]
        for name, stored in self._store.modules.items():
            about = {"kind": stored.kind, "version": stored.manifest.version, "bytes": stored.bytes}
            cards.append(card(name, parent=BASE, **about, resident=name in resident))
        return cards

    def card(self, model: str) -> dict[str, Any]:
        """
        Raises:
            UnknownModuleError: no such model.
        """
        wanted = self.wanted(model)
        name = AUTO if wanted == AUTO else wanted or BASE
        return {**next(card for card in self.cards() if card["id"] == name), "id": model}
