"""Reading: the JSON of a body, in which every number is one and every text can be written again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from growlm.server.refusals import Refusal

_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # may be half of a character that takes two


class StrictRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        read = json.loads(body, parse_constant=_refuse)
        if _HALF.search(body):
            try:
                json.dumps(read, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                told = "the body has half of a surrogate pair, which is no text; send whole characters"
                raise Refusal(400, told, "invalid_json") from None
        return read


def _refuse(constant: str) -> None:
    raise Refusal(400, f"the body has {constant}, which is no number of JSON", "invalid_json")


class StrictRoute(APIRoute):
    """A path whose bodies are read by `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict
