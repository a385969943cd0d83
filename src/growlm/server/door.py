"""Door: what every request passes: its id, its key, how large it may be, and a line in the log."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace
from typing import Any, TextIO

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from growlm.server.deadline import begins
from growlm.server.events import error_response
from growlm.server.keys import CALLER, Caller, Keys, asks
from growlm.server.refusals import QUEUE_FULL, RETRY_AFTER, Refusal, hides
from growlm.units import format_size

_OPEN = ("/", "/page.css", "/page.js", "/health", "/ready", "/version")
_TEXT = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")  # what is asked for there
# Who is refused may ask again at once, and refusing takes what answering needs: so each is held back for as many times
# these seconds as there are who are held back, which comes to so many refusals a second at the most.
_HOLD, _LONGEST_HOLD = 0.03, 2.0
_BODY_TAKES = 60.0  # seconds for a body to come, or of a file for the next part of it
_BODIES = 64  # of the largest that there may be, which are in memory together at the most
_UPLOADS = "/admin/files/"
_ADMIN = "/admin"  # where the paths begin that are for the admin key alone
_HERE = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?$")
_ID = "X-Request-Id"
_LONGEST_ID = 128


class Door:
    """ASGI middleware.

    Args:
        keys: for all but the paths that tell no more than that the server is there.
        admin_keys: for all, with `/admin` and with `/metrics`, which names modules. Without them `/admin` is for
            nobody, and `/metrics` for everybody unless `keys` are asked for.
        own_keys: for all too; of whoever has started the server.
        local: only who calls this machine by its own names is answered: a page elsewhere that has its name lead here
            is not.
        require_place: raises where no request for text has a place: before its body is read, which costs more than to
            refuse it.
        places: on this machine, by what is told of them to all but the admin.
        max_body, max_upload: bytes of a request at the most, and of a file that is sent.
        log: where a line of JSON is written for every request; None for nowhere.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        admin_keys: Keys,
        own_keys: Keys,
        local: bool,
        require_place: Callable[[], None],
        places: Mapping[str, str],
        max_body: int,
        max_upload: int,
        log: TextIO | None = sys.stderr,
    ) -> None:
        self._app, self._keys, self._admin_keys, self._own_keys = app, keys, admin_keys, own_keys
        self._local, self._require_place, self._held = local, require_place, 0
        self._places = dict(sorted(places.items(), key=lambda place: -len(place[0])))
        self._max_body, self._max_upload, self._log = max_body, max_upload, log
        self._reading = 0  # bytes of bodies that are in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers, began, told = Headers(scope=scope), time.monotonic(), dict[str, Any]()
        given = headers.get(_ID, "")
        name = given if given.isprintable() and 0 < len(given) <= _LONGEST_ID else uuid.uuid4().hex

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = MutableHeaders(scope=message)
                own[_ID] = name
                told.update(status=message["status"], module=own.get("X-Growlm-Module"))
            await send(message)

        begins()
        hides(self._places)
        body = _Body(self, scope["path"], receive)
        try:
            try:
                asks(found := self._caller(scope["path"], headers))
                scope[CALLER] = found
                told["key"] = found.id or None
                if scope["path"] in _TEXT and scope["method"] == "POST":
                    self._require_place()
                body.require(headers)
                await self._app(scope, body.part, answer)
            except Exception as error:
                if "status" in told:  # it has begun to answer
                    raise
                if isinstance(error, Refusal) and error.code == QUEUE_FULL:
                    await self._hold_back()
                await error_response(error, scope["path"])(scope, receive, answer)
        finally:
            body.forget()
            self._note(scope, name, told, time.monotonic() - began)
        return None

    async def _hold_back(self) -> None:
        self._held += 1
        try:
            await asyncio.sleep(min(_HOLD * self._held, _LONGEST_HOLD))
        finally:
            self._held -= 1

    def _caller(self, path: str, headers: Headers) -> Caller:
        """
        Raises:
            Refusal: no key, or a wrong one.
        """
        if self._local and not _HERE.match(headers.get("host", "")):
            told = (
                "this server answers who calls it by this machine's own name; start it with --api-key-file for others"
            )
            raise Refusal(421, told, "misdirected")
        if path in _OPEN:
            return Caller()
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")
        held = (keys.caller(key) for keys in (self._admin_keys, self._own_keys) if keys)
        admin = next((replace(one, patterns=None, admin=True) for one in held if one is not None), None)
        if path.startswith(_ADMIN):
            found, kind = admin, "the admin key"
            if not (self._admin_keys or self._own_keys):
                raise Refusal(
                    403, f"{path}: this server has no admin key; start it with --admin-key-file", "no_admin_key"
                )
        elif path == "/metrics":
            found, kind = admin if self._admin_keys or self._keys else Caller(), "the admin key"
        else:
            found, kind = admin or self._keys.caller(key), "an API key of this server"
        if found is None:
            told = f"{'a wrong key' if key else 'no key'}: send {kind} as Authorization: Bearer ..."
            raise Refusal(401, told, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return found

    def _note(self, scope: Scope, name: str, told: MutableMapping[str, Any], seconds: float) -> None:
        if self._log is None:
            return
        client = scope.get("client")
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": told.get("status"),
            "seconds": round(seconds, 4),
            "id": name,
            "key": told.get("key"),
            "module": told.get("module"),
        }
        print(json.dumps(line), file=self._log, flush=True)


class _Body:
    """What comes of a body: no larger than it may be, in time, and with all others no more than memory is meant for."""

    def __init__(self, door: Door, path: str, receive: Receive) -> None:
        self._door, self._receive = door, receive
        self._uploads = path.startswith(_UPLOADS)
        self._most = door._max_upload if self._uploads else door._max_body
        self._came, self._whole = 0, False
        self._until = time.monotonic() + _BODY_TAKES

    def require(self, headers: Headers) -> None:
        """
        Raises:
            Refusal: it says that it is larger.
        """
        told = headers.get("content-length", "")
        if told.isdecimal() and int(told) > self._most:
            raise _too_large(self._most)

    async def part(self) -> Message:
        """What comes next; once it has come whole, whether the client goes.

        Raises:
            Refusal: it is too large, stalls, or there is no room for it.
        """
        if self._whole:
            return await self._receive()
        # A file goes to the disk as it comes, and may take long; it may not stall.
        left = _BODY_TAKES if self._uploads else max(self._until - time.monotonic(), 0)
        try:
            async with asyncio.timeout(left):
                message = await self._receive()
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {_BODY_TAKES:g} seconds", "timeout") from None
        size = len(message.get("body", b""))
        self._came += size
        self._door._reading += 0 if self._uploads else size
        self._whole = not message.get("more_body", False)
        if self._came > self._most:
            raise _too_large(self._most)
        if not self._uploads and self._door._reading > _BODIES * self._door._max_body:
            told = "too much is being sent at once; try again in a moment"
            raise Refusal(503, told, QUEUE_FULL, headers={"Retry-After": RETRY_AFTER})
        return message

    def forget(self) -> None:
        if not self._uploads:
            self._door._reading -= self._came


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"the request is larger than {format_size(most)}", "too_large")
