"""Answering: what all forms of requests for text share, from the service that answers to how an answer is told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from growlm.engine import AUTO, Generation, Wanted
from growlm.engine.prompts import Prompt
from growlm.errors import UnknownModuleError
from growlm.router import Route
from growlm.server.keys import caller
from growlm.server.names import BASE, Names
from growlm.server.refusals import module_gone
from growlm.server.service import Asked, Service
from growlm.server.spelling import Spelling

T = TypeVar("T")

TRIES = 3  # to find modules that are still there


class Answering:
    """A service, and the names of who answers in it.

    Args:
        parse_special: what a prompt of completions spells like a special token is one.
    """

    def __init__(self, service: Service, *, parse_special: bool = False) -> None:
        self.service, self.names, self.parse_special = service, Names(service.engine), parse_special
        self.spelling = Spelling(service.engine.tokenizer)

    async def ask(
        self, prompts: Sequence[Prompt], n: int = 1, *, module: Wanted, salt: str = "", **sampling: Any
    ) -> Asked:
        """As `Service.ask`, for who asks."""
        if module != AUTO:
            return await self.service.ask(prompts, n, module=module, salt=caller().salted(salt), **sampling)
        asked = await self._still_there(
            lambda among: self.service.ask(prompts, n, module=AUTO, salt=caller().salted(salt), among=among, **sampling)
        )
        asked.chosen = True
        return asked

    async def route(self, prompt: Prompt, *, salt: str = "", within: Asked | None = None) -> Route:
        """As `Service.route`, for who asks."""
        return await self._still_there(
            lambda among: self.service.route(prompt, salt=caller().salted(salt), among=among, within=within)
        )

    async def _still_there(self, call: Callable[[frozenset[str] | None], Awaitable[T]]) -> T:
        """What is asked among the modules that who asks may use, of which some may go meanwhile."""
        for _ in range(TRIES):
            with suppress(UnknownModuleError):
                return await call(caller().among(self.service.engine.store))
        raise module_gone()


def usage_of(read: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def about(answer: Generation, route: Route | None = None) -> dict[str, Any]:
    """What is told of an answer beside it: who wrote it, how sure the router was, what was read from the disk, and
    whom a second look has kept from answering.

    Args:
        route: by which the module was named, where another request has asked for it.
    """
    asked = route or answer
    refused = {} if asked.refused is None else {"refused": asked.refused}
    return {"module": answer.module, "scores": dict(asked.scores), "loaded": answer.loaded, **refused}


def headers_of(asked: Asked) -> dict[str, str]:
    """Who writes, `base` where no module does; nothing where it is not yet known."""
    names = dict.fromkeys(name or BASE for name in asked.modules)
    return {"X-Growlm-Module": ", ".join(names)} if names else {}
