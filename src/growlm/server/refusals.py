"""Refusals: what goes wrong, as a client reads it: an HTTP status, and the error body of the interface it speaks."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from starlette.requests import ClientDisconnect

from growlm.errors import BudgetError, ClosedError, ConfigError, DataError, GrowlmError, UnknownModuleError
from growlm.server.keys import caller

_log = logging.getLogger("growlm.server")

ANTHROPIC = "/v1/messages"  # where its paths begin
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}

_FIELD = re.compile(r"([a-z]+(?:_[a-z]+)*)(?:\[.*?\])? is ")  # "top_p is 3; it must be ..."
QUEUE_FULL = "queue_full"
RETRY_AFTER = "1"  # seconds: within them some answer ends, and makes room

CLIENT_GONE = 499  # as proxies log it

# Clients of OpenAI's try again at 408, 409, 429 and 5xx, unless they are told that it is of no use.
NO_RETRY = {"x-should-retry": "false"}


@dataclass(eq=False)
class Refusal(Exception):
    """
    Attributes:
        param: the field that is refused.
        code: for programs.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def type(self) -> str:
        if self.status in (401, 403):
            return "authentication_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self, path: str) -> dict[str, Any]:
        """Of what is asked for at a path: OpenAI's, or Anthropic's."""
        if path.startswith(ANTHROPIC):
            kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def module_gone() -> Refusal:
    """What is told where the router has chosen a module that is there no more."""
    told = "the module that was chosen has gone meanwhile; ask again"
    return Refusal(503, told, "module_gone", headers={"Retry-After": RETRY_AFTER})


_places: ContextVar[Mapping[str, str]] = ContextVar("places", default=MappingProxyType({}))


def hides(places: Mapping[str, str]) -> None:
    """From here on, whoever is not the admin is told of these places by other words."""
    _places.set(places)


def _told(error: BaseException) -> str:
    told = str(error)
    if not caller().admin:
        for place, word in _places.get().items():
            told = told.replace(place, word)
    return told


def refusal_of(error: BaseException) -> Refusal:
    """What a client is told of an error. One that is no word to users is written to the log, and not told."""
    if isinstance(error, Refusal):
        return error
    limited = caller().limited  # and is told neither what modules of others there are, nor what is wrong with them
    if isinstance(error, UnknownModuleError):
        told = "the model is there no more; ask /v1/models" if limited else _told(error)
        return Refusal(404, told, "model_not_found", "model")
    if isinstance(error, BudgetError):
        told = (
            "the model and this text do not fit the server's memory; ask for fewer tokens" if limited else _told(error)
        )
        return Refusal(422, told, "memory_budget", headers=NO_RETRY)
    if isinstance(error, ConfigError | DataError):
        told = _told(error)
        field = _FIELD.match(told)
        return Refusal(400, told, "invalid_value", field[1] if field else None)
    if isinstance(error, ClosedError):
        return Refusal(503, "the server is being shut down; ask another one", "shutting_down")
    if isinstance(error, ClientDisconnect):
        return Refusal(CLIENT_GONE, "the client has gone", "client_gone")
    if isinstance(error, GrowlmError):  # of the store, its modules or its base: the same again at the next try
        _log.error("%s", error)
        told = "the store cannot be read; the server's log says more" if limited else _told(error)
        return Refusal(500, told, "store", headers=NO_RETRY)
    _log.error("a request failed", exc_info=error)
    return Refusal(500, "an error inside the server, which is in its log", "internal_error")
