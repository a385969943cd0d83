"""Assistants: a store as tools of the Model Context Protocol: ask, route, list_modules and learn.

The same paths as over HTTP, for the same callers: who may not use a module does not see it, and who has no admin key
teaches nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import ValidationError
from starlette.routing import BaseRoute, Route

from growlm import __version__
from growlm.data import Turn
from growlm.errors import first_error
from growlm.server.answering import Answering, about
from growlm.server.conversation import Conversation
from growlm.server.files import Files
from growlm.server.jobs import DONE, Jobs
from growlm.server.keys import CALLER, Caller, asks, caller
from growlm.server.refusals import Refusal, refusal_of
from growlm.server.service import Service
from growlm.server.teaching import JobBody, begun

PATH = "/mcp"
_ABOUT = (
    "A language model whose knowledge is in modules, one for each body of text that it has learned. `ask` answers with "
    "the module that a router chooses; `list_modules` says what is known; `learn` teaches it files."
)


def assistant(service: Service, jobs: Jobs, kept: Files, *, owner: bool = False) -> MCPServer[Any]:
    """
    Args:
        owner: who calls is who has started it, and may teach.
    """
    handlers, level = logging.root.handlers[:], logging.root.level
    server: MCPServer[Any] = MCPServer("growlm", instructions=_ABOUT, version=__version__, log_level="ERROR")
    logging.root.handlers[:] = handlers  # the program's own affair
    logging.root.setLevel(level)
    answering = Answering(service)

    def tool(call: Callable[..., Any]) -> None:
        @wraps(call)
        async def called(*arguments: Any, **named: Any) -> Any:
            context = named["context"]
            request = context.request_context.request
            asks(Caller(admin=True) if owner else request.scope[CALLER])
            try:
                return await call(*arguments, **named)
            except ValidationError as error:
                raise ToolError(first_error(error)) from None
            except Exception as error:
                raise ToolError(refusal_of(error).message) from None

        server.tool()(called)

    async def ask(
        question: str, context: Context, module: str = "auto", max_tokens: int | None = None
    ) -> dict[str, Any]:
        """Asks the model. Says which module has answered, and how sure the router was of it.

        Args:
            question: in full: nothing is remembered of earlier ones.
            module: auto lets the router choose; base is the model without any; else the name of one.
            max_tokens: of the answer, at the most; by default 1,024, or what the model still reads.
        """
        conversation = Conversation(answering, module, [Turn("user", question)], "question")
        if max_tokens is not None and max_tokens < 1:
            raise Refusal(400, f"max_tokens is {max_tokens}; it must be at least 1")
        asked = await conversation.ask({"temperature": 0.0}, max_tokens)
        (answer,) = await asked.whole()
        told = about(answer, conversation.route)
        del told["loaded"]
        return {"answer": answer.text, **told, "module": answer.module or "base"}

    async def route(text: str, context: Context) -> dict[str, Any]:
        """Which module knows about a text, and how likely each is; none where none does."""
        found = await answering.route(text)
        refused = {} if found.refused is None else {"refused": found.refused}
        return {"module": found.module or "none", "scores": dict(found.scores), **refused}

    async def list_modules(context: Context) -> list[dict[str, Any]]:
        """The bodies of text that were learned, with their sizes."""
        return [card for card in answering.names.cards() if card["parent"] is not None]

    async def learn(
        context: Context,
        module: str,
        files: list[str],
        update: bool = False,
        kind: str | None = None,
        tokens: int | None = None,
        sequence_length: int | None = None,
    ) -> dict[str, Any]:
        """Teaches files to the model, as a new module, or as the next version of one. Takes minutes.

        Args:
            module: its name, of small letters, digits, - and _.
            files: paths in the folder that the server may read.
            update: the module exists.
            kind: of the module; by default what suits the model.
            tokens: to train on in all; by default the text twice.
            sequence_length: tokens that are read together, 512 by default, or what the model reads.
        """
        if not caller().admin:
            raise Refusal(403, "only the admin key may teach")
        verb: Literal["update", "learn"] = "update" if update else "learn"
        body = JobBody(verb=verb, module=module, files=files, kind=kind, tokens=tokens, sequence_length=sequence_length)
        job = begun(body, jobs, kept, service.engine)
        async for event in job.events():
            if event["type"] == "job" and (progress := event["progress"]):
                await context.report_progress(progress["done"], progress["total"], progress["title"])
        if job.state != DONE:
            raise Refusal(400, job.error or job.state)
        return {"module": module, **{name: job.result[name] for name in ("version", "loss_before", "loss_after")}}

    for call in (ask, route, list_modules, learn):
        tool(call)
    return server


def assistant_paths(server: MCPServer[Any]) -> list[BaseRoute]:
    """`/mcp`, whose sessions are those of `server.session_manager`. Who may call is the door's to say."""
    security = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    found = server.streamable_http_app(streamable_http_path=PATH, stateless_http=True, transport_security=security)
    for route in found.routes:  # nothing is said there but answers, so that nobody need stay
        assert isinstance(route, Route)
        route.methods = {"POST"}
    return list(found.routes)
