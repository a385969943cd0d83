"""Messages: `/v1/messages`, conversations in the form of Anthropic's interface."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from growlm.data import Turn
from growlm.engine import Generation
from growlm.errors import first_error
from growlm.server.answering import Answering, about
from growlm.server.conversation import Conversation, in_order, text_of, turns_of
from growlm.server.fields import Body, ContentPart, Message, stop_texts
from growlm.server.refusals import Refusal
from growlm.server.service import Asked, Piece
from growlm.server.tools import Call, Called, CalledFunction, Held, Tool, calls_in, new_id, tools_of


class ClientTool(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None

    def as_tool(self) -> Tool:
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        kind = "function" if self.type in (None, "custom") else str(self.type)
        return Tool.model_validate({"type": kind, "function": function})


class CountBody(Body):
    several = False
    passed_over = ("stop", "return_token_ids")
    unsupported: ClassVar[dict[str, str]] = {"mcp_servers": "this server asks no others; leave it out"}

    messages: list[Message] = Field(min_length=1)
    system: str | list[ContentPart] | None = None
    tools: list[ClientTool] | None = Field(default=None, max_length=128)
    tool_choice: dict[str, Any] | None = None

    def conversation(self, answering: Answering) -> Conversation:
        """
        Raises:
            Refusal: what cannot be read, or nothing to answer.
        """
        turns = [] if self.system is None else [Turn("system", text_of(self.system, "system", "system"))]
        if self.messages[-1].role != "user":
            told = "messages: the last one must be the user's; an answer that is begun cannot be gone on with"
            raise Refusal(400, told, "invalid_value", "messages")
        calls: dict[int, list[Called]] = {}
        results: dict[int, str | None] = {}
        for number, message in enumerate(self.messages):
            parts = message.content if isinstance(message.content, list) else []
            where = f"messages[{number}]"
            for part in parts:  # what tools have given comes before what the user says of it
                if part.type == "tool_result":
                    results[len(turns)] = part.tool_use_id
                    given = text_of(part.content or "", where, "messages")
                    turns.append(Turn("tool", f"Error: {given}" if part.is_error else given))
            called = [
                Called(id=part.id, function=CalledFunction(name=part.name or "", arguments=part.input or {}))
                for part in parts
                if part.type == "tool_use"
            ]
            rest = [part for part in parts if part.type not in ("tool_result", "tool_use")]
            if parts and not rest and not called:
                continue
            if called:
                calls[len(turns)] = called
            said = message if not parts else message.model_copy(update={"content": rest or ""})
            turns += turns_of([said], where=[where])
        try:
            offered = [tool.as_tool() for tool in self.tools or ()]
        except ValidationError as error:
            raise Refusal(400, f"tools: {first_error(error)}", "invalid_value", "tools") from None
        tools = tools_of(offered, self.tool_choice, calls, "messages")
        turns = in_order(turns, {n: [one.id for one in each] for n, each in calls.items()}, results, "messages")
        return Conversation(answering, self.model, turns, "messages", tools)


class MessagesBody(CountBody):
    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None

    def sampling(self) -> dict[str, Any]:
        return {**super().sampling(), "stop": stop_texts(self.stop_sequences or (), "stop_sequences")}


class Messages:
    """One request, from its body to what is sent."""

    def __init__(self, answering: Answering, body: MessagesBody) -> None:
        self._answering, self._body, self._id = answering, body, f"msg_{uuid.uuid4().hex}"
        self._conversation = body.conversation(answering)

    async def ask(self) -> Asked:
        return await self._conversation.ask(self._body.sampling(), self._body.max_tokens)

    def whole(self, answers: Sequence[Generation], asked: Asked) -> dict[str, Any]:
        (answer,) = answers
        return {
            **self._message(answer.prompt_tokens, len(answer.tokens)),
            **self._content(answer),
            "growlm": about(answer, self._conversation.route),
        }

    def _content(self, answer: Generation) -> dict[str, Any]:
        """The blocks of an answer, and why it ended."""
        text, calls = calls_in(answer.text, self._conversation.calls) if self._conversation.calls else (answer.text, [])
        blocks: list[dict[str, Any]] = [{"type": "text", "text": text}] if text or not calls else []
        blocks += [_block(call, call.arguments) for call in calls]
        return {"content": blocks, **self._end(answer, calls)}

    async def chunks(self, asked: Asked) -> AsyncGenerator[dict[str, Any], None]:
        blocks, writes, held = 0, False, Held(self._conversation.calls)
        begun = False

        def said(text: str) -> Iterator[dict[str, Any]]:
            nonlocal writes
            if not writes:
                writes = True
                yield {"type": "content_block_start", "index": blocks, "content_block": {"type": "text", "text": ""}}
            if text:
                delta = {"type": "text_delta", "text": text}
                yield {"type": "content_block_delta", "index": blocks, "delta": delta}

        async for _, item in asked.items():
            if not begun:
                begun = True
                yield {"type": "message_start", "message": self._message(len(asked.requests[0].tokens), 0)}
            if isinstance(item, Piece):
                text = held.add(item.text) if self._conversation.calls else item.text
                for event in said(text) if text or not self._conversation.calls else ():
                    yield event
                continue
            rest, calls = held.end() if self._conversation.calls else ("", [])
            for event in said(rest) if rest or not (writes or calls) else ():
                yield event
            if writes:
                yield {"type": "content_block_stop", "index": blocks}
                blocks += 1
            for index, call in enumerate(calls, blocks):
                yield {"type": "content_block_start", "index": index, "content_block": _block(call, {})}
                delta = {"type": "input_json_delta", "partial_json": call.text}
                yield {"type": "content_block_delta", "index": index, "delta": delta}
                yield {"type": "content_block_stop", "index": index}
            usage = {"output_tokens": len(item.tokens)}
            told = about(item, self._conversation.route)
            yield {"type": "message_delta", "delta": self._end(item, calls), "usage": usage, "growlm": told}
            yield {"type": "message_stop"}

    def _message(self, read: int, written: int) -> dict[str, Any]:
        model = self._body.model or self._answering.names.store
        usage = {"input_tokens": read, "output_tokens": written}
        end = {"stop_reason": None, "stop_sequence": None}
        return {
            "id": self._id, "type": "message", "role": "assistant", "model": model, "content": [], **end, "usage": usage
        }  # fmt: skip

    def _end(self, answer: Generation, calls: Sequence[Call]) -> dict[str, Any]:
        stop = answer.stop if answer.stop in (self._body.stop_sequences or ()) else None
        reason = "max_tokens" if answer.finish_reason == "length" else "stop_sequence" if stop else "end_turn"
        return {"stop_reason": "tool_use" if calls else reason, "stop_sequence": stop}


def _block(call: Call, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": new_id("toolu"), "name": call.name, "input": dict(arguments)}
