"""Admin: what the operator asks of a server that runs. For the admin key alone."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from growlm.engine import AUTO
from growlm.server.names import Names
from growlm.server.reading import StrictRoute
from growlm.server.refusals import Refusal
from growlm.server.service import Service


def admin_paths(service: Service) -> APIRouter:
    """`/admin`: what is in memory, and what should be."""
    engine, names = service.engine, Names(service.engine)
    paths = APIRouter(prefix="/admin", tags=["admin"], route_class=StrictRoute)

    def module(name: str) -> str:
        """
        Raises:
            Refusal: no such module.
        """
        wanted = names.wanted(name)
        if not isinstance(wanted, str) or wanted == AUTO:
            raise Refusal(404, f"{name!r} is no module that was learned", "model_not_found")
        return wanted

    def own(name: str) -> str:
        """
        Raises:
            Refusal: no such module, or it is not in this process's memory that it answers.
        """
        if not service.own_modules:
            raise Refusal(
                409, "engines of a cluster answer, each with modules of its own: nothing is kept here", "remote"
            )
        return module(name)

    @paths.get("/status")
    def status() -> dict[str, Any]:
        running, waiting = service.running_and_waiting()
        memory = {
            "budget": engine.memory,
            "used": engine.used_bytes,
            "base": engine.base_bytes,
            "router": engine.fixed_bytes - engine.base_bytes,
            "modules": engine.modules.resident_bytes,
            "workspace": engine.workspace_bytes,
        }
        return {
            "store": names.store,
            "memory": memory,
            "running": running,
            "waiting": waiting,
            "generated_tokens": service.metrics.generated_tokens,
            "modules": [card for card in names.cards() if card["parent"] is not None],
        }

    @paths.post("/reload")
    async def reload() -> dict[str, list[str]]:
        """Serves the store as it is on the disk by now."""
        return asdict(await service.reload())

    @paths.post("/modules/{name}/pin")
    async def pin(name: str) -> dict[str, Any]:
        """Brings a module into memory and keeps it there."""
        name = own(name)
        await asyncio.to_thread(engine.pin, name)
        return names.card(name)

    @paths.post("/modules/{name}/unpin")
    async def unpin(name: str) -> dict[str, Any]:
        """Lets a module be evicted again."""
        name = own(name)
        engine.unpin(name)
        return names.card(name)

    @paths.post("/modules/{name}/evict")
    async def evict(name: str) -> dict[str, Any]:
        """Lets go of a module."""
        name = own(name)
        if name in engine.modules.kept:
            raise Refusal(409, f"{name} is pinned; unpin it first", "pinned")
        engine.modules.drop(name)
        if name in engine.modules.resident:
            raise Refusal(409, f"{name} is in use; try again once its answers have ended", "in_use")
        return names.card(name)

    return paths
