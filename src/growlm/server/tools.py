"""Tools: what a client lets the model call, and the calls that stand in an answer.

A base that knows tools writes a call as JSON with a name and arguments (or parameters): between `<tool_call>` and
`</tool_call>`, or as all of its answer. What cannot be read as a call of a tool that was offered is text.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from growlm.data import NO_TOOLS, Tools
from growlm.server.refusals import Refusal

_OPEN = "<tool_call>"
_LONGEST = 1 << 16  # characters of tools and calls
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


class Function(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str
    function: Function | None = None


class CalledFunction(BaseModel):
    name: str
    arguments: str | dict[str, Any] = "{}"


class Called(BaseModel):
    """A call that the assistant has made in an earlier turn."""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    function: CalledFunction


@dataclass(frozen=True)
class Call:
    name: str
    arguments: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The arguments as JSON."""
        return json.dumps(self.arguments, ensure_ascii=False)

    def to_json(self) -> dict[str, Any]:
        """As chat completions tell it."""
        return {"id": new_id("call"), "type": "function", "function": {"name": self.name, "arguments": self.text}}


def new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:24]}"


def tools_of(
    tools: Sequence[Tool] | None, choice: Any, calls: Mapping[int, Sequence[Called] | None], field: str
) -> Tools:
    """What a template is given.

    Args:
        choice: of the client: none or auto, as a word or as the type of an object.
        calls: by turn, what was called in it.
        field: that has the turns.

    Raises:
        Refusal: a tool that is no function, a choice that cannot be honoured, or arguments that are no JSON object.
    """
    if isinstance(choice, dict):
        choice = choice.get("type")
    if choice not in (None, "none", "auto"):
        told = "tool_choice: expected auto or none; the model cannot be made to call a tool"
        raise Refusal(400, told, "unsupported", "tool_choice")
    for number, tool in enumerate(tools or ()):
        if tool.type != "function" or tool.function is None:
            told = f"tools[{number}] is of type {tool.type!r}; this server knows functions alone"
            raise Refusal(400, told, "unsupported", "tools")
    offered = [] if choice == "none" else [tool.model_dump(exclude_none=True) for tool in tools or ()]
    called = {turn: [_called(one, f"{field}[{turn}]", field) for one in each] for turn, each in calls.items() if each}
    found = Tools(offered, called)
    if len(found.text()) > _LONGEST:
        raise Refusal(400, f"tools and calls are longer than {_LONGEST} characters", "invalid_value", "tools")
    return found if offered or called else NO_TOOLS


def _called(call: Called, where: str, field: str) -> dict[str, Any]:
    given = call.function.arguments
    arguments = _read(given) if isinstance(given, str) else given
    if not isinstance(arguments, dict):
        told = f"{where}: the arguments of {call.function.name!r} are no JSON object"
        raise Refusal(400, told, "invalid_value", field)
    return {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def calls_in(text: str, offered: Collection[str]) -> tuple[str, list[Call]]:
    """The text of an answer without the calls that stand in it, and those. Blanks alone are no text beside a call."""
    said, calls = _parted(text, offered)
    return ("" if calls and not said.strip() else said), calls


def _parted(text: str, offered: Collection[str]) -> tuple[str, list[Call]]:
    if text.lstrip().startswith(("{", "[")):
        calls = _calls(text, offered)
        return ("", calls) if calls else (text, [])
    every: list[Call] = []

    def taken(match: re.Match[str]) -> str:
        calls = _calls(match[1], offered)
        every.extend(calls)
        return "" if calls else match[0]

    return _CALL.sub(taken, text), every


def _calls(text: str, offered: Collection[str]) -> list[Call]:
    """What JSON says is called; nothing where it says none, or one of what was not offered."""
    read, calls = _read(text), list[Call]()
    for one in read if isinstance(read, list) else [read]:
        arguments = one.get("arguments", one.get("parameters")) if isinstance(one, dict) else None
        name = one.get("name") if isinstance(one, dict) else None
        if not isinstance(arguments, dict) or not isinstance(name, str) or name not in offered:
            return []
        calls.append(Call(name, arguments))
    return calls


def _read(text: str) -> Any:
    """What JSON says; None where a client could not read it as such."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        read = json.loads(text, parse_constant=refuse)
        json.dumps(read, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError):
        return None
    return read


class Held:
    """A stream's text, of which that may be a call is held back until it is known."""

    def __init__(self, offered: Collection[str]) -> None:
        self._offered = offered
        self._text, self._sent, self._holds = "", 0, False

    def add(self, piece: str) -> str:
        """What of it can be sent."""
        self._text += piece
        if self._holds or self._text.lstrip()[:1] in ("", "{", "["):
            return ""
        at = self._text.find(_OPEN, self._sent)
        if at >= 0:
            self._holds = True
        else:
            most = min(len(_OPEN) - 1, len(self._text) - self._sent)
            begun = next((n for n in range(most, 0, -1) if self._text.endswith(_OPEN[:n])), 0)
            at = len(self._text) - begun
        if not self._text[:at].strip():
            return ""
        ready, self._sent = self._text[self._sent : at], at
        return ready

    def end(self) -> tuple[str, list[Call]]:
        """What was held back and is text, and the calls."""
        if self._sent:
            return _parted(self._text[self._sent :], self._offered)
        return calls_in(self._text, self._offered)
