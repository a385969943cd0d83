"""Events: answers that are sent while they are written, and requests whose client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from growlm.server.refusals import refusal_of

T = TypeVar("T")

PING = 5.0  # seconds after which a stream that has nothing to say says so: something may be read from the disk
_PATIENCE = 30.0  # seconds in which a client has to have read some of a stream


def error_response(error: BaseException, path: str, headers: Mapping[str, str] | None = None) -> Response:
    """
    Args:
        path: that was asked for: each interface has an error body of its own.
    """
    refusal = refusal_of(error)
    return JSONResponse(refusal.body(path), refusal.status, headers={**(headers or {}), **refusal.headers})


async def unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """What is awaited, or an end of it where the client goes away.

    Raises:
        ClientGone: it went.
    """
    answering = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientGone
        return answering.result()
    finally:
        await _stop(answering, gone)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def event_stream(
    chunks: AsyncGenerator[dict[str, Any], None],
    headers: Callable[[], Mapping[str, str]],
    ended: Callable[[], None],
) -> Response:
    """A response of server-sent events, one of each chunk. A chunk that has a type is an event of that name; behind the
    last of completions, which have none, comes `[DONE]`. It begins with the first chunk, so that what goes wrong before
    is an error with a status of its own; or with a ping, where that takes long.

    Args:
        headers: of the response, once it begins.
        ended: called once, when nobody reads on.

    Raises:
        What the first chunk does.
    """
    first = asyncio.ensure_future(anext(chunks))
    try:
        await asyncio.wait({first}, timeout=PING)
        if first.done():
            first.result()
        return _EventStream(chunks, first, headers(), ended)
    except BaseException:
        await _stop(first)
        await chunks.aclose()
        ended()
        raise


class _EventStream(Response):
    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[dict[str, Any], None],
        first: asyncio.Future[dict[str, Any]],
        headers: Mapping[str, str],
        ended: Callable[[], None],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._chunks, self._next, self._ended = chunks, first, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def say(text: str, more: bool = True) -> None:
            async with asyncio.timeout(_PATIENCE):  # who reads nothing is gone, for all that can be known
                await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        named = not scope["path"].endswith("completions")
        gone: asyncio.Future[Any] = asyncio.ensure_future(_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while True:
                await asyncio.wait({self._next, gone}, timeout=PING, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
                if not self._next.done():
                    await say(": ping\n\n")
                    continue
                try:
                    chunk = self._next.result()
                except StopAsyncIteration:
                    break
                except Exception as error:
                    await say(_event(refusal_of(error).body(scope["path"])))
                    break
                await say(_event(chunk))
                self._next = asyncio.ensure_future(anext(self._chunks))
            await say("" if named else "data: [DONE]\n\n", more=False)
        except OSError:  # it has gone in the middle of a word, or does not listen
            pass
        finally:
            await _stop(self._next, gone)
            await self._chunks.aclose()
            self._ended()


def _event(content: Mapping[str, Any]) -> str:
    name = f"event: {content['type']}\n" if "type" in content else ""
    return f"{name}data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stop(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
