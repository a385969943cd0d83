"""Responses: `/v1/responses`, conversations in the form of OpenAI's newer interface. Nothing is kept of them: a client
sends all that was said."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from growlm.data import Turn
from growlm.engine import Generation
from growlm.errors import first_error
from growlm.server.answering import Answering, about
from growlm.server.conversation import Conversation, in_order, text_of, turns_of
from growlm.server.fields import Body, ContentPart, Message
from growlm.server.refusals import Refusal, refusal_of
from growlm.server.service import Asked, Piece
from growlm.server.tools import Call, Called, CalledFunction, Held, Tool, calls_in, new_id, tools_of


class Item(BaseModel):
    """What was said, called, or given by what was called."""

    model_config = ConfigDict(extra="allow")

    type: str | None = None
    role: str | None = None
    content: str | list[ContentPart] | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None
    call_id: str | None = None


class FunctionTool(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None

    def as_tool(self) -> Tool:
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return Tool.model_validate({"type": self.type, "function": function if self.type == "function" else None})


class ResponsesBody(Body):
    several = False
    passed_over = ("return_token_ids",)
    unsupported: ClassVar[dict[str, str]] = {
        "previous_response_id": "no answer is kept here; send the whole conversation as input",
        "conversation": "no conversation is kept here; send all of it as input",
        "background": "answers are waited for, or streamed",
        "prompt": "no prompt is kept here; send it as input",
    }

    input: str | list[Item] = Field(min_length=1)
    tools: list[FunctionTool] | None = Field(default=None, max_length=128)
    tool_choice: str | dict[str, Any] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    text: dict[str, Any] | None = None

    def conversation(self, answering: Answering) -> Conversation:
        """
        Raises:
            Refusal: what cannot be read.
        """
        turns = [] if self.instructions is None else [Turn("system", self.instructions)]
        calls: dict[int, list[Called]] = {}
        results: dict[int, str | None] = {}
        for number, item in enumerate(
            [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        ):
            where = f"input[{number}]"
            if item.type == "function_call":
                if not turns or turns[-1].role != "assistant":
                    turns.append(Turn("assistant", ""))
                called = CalledFunction(name=item.name or "", arguments=item.arguments or "{}")
                calls.setdefault(len(turns) - 1, []).append(Called(id=item.call_id, function=called))
            elif item.type == "function_call_output":
                results[len(turns)] = item.call_id
                turns.append(Turn("tool", text_of(item.output or "", where, "input")))
            elif item.type in (None, "message"):
                turns += turns_of([Message(role=item.role or "", content=item.content)], "input", where=[where])
            else:
                told = f"{where} is of type {item.type!r}; this server reads messages, and calls of functions"
                raise Refusal(400, told, "unsupported", "input")
        try:
            offered = [tool.as_tool() for tool in self.tools or ()]
        except ValidationError as error:
            raise Refusal(400, f"tools: {first_error(error)}", "invalid_value", "tools") from None
        tools = tools_of(offered, self.tool_choice, calls, "input")
        turns = in_order(turns, {n: [one.id for one in each] for n, each in calls.items()}, results, "input")
        return Conversation(answering, self.model, turns, "input", tools)

    def sampling(self) -> dict[str, Any]:
        form = (self.text or {}).get("format")
        if form is not None and not isinstance(form, dict):
            raise Refusal(400, "text: its format must be an object with a type", "invalid_value", "text")
        if form is not None and form.get("type") == "json_schema":  # of which the keys lie one level higher here
            form = {"type": "json_schema", "json_schema": {"schema": form.get("schema")}}
        if form is not None:
            self.response_format = form
        return super().sampling()


class Responses:
    """One request, from its body to what is sent."""

    def __init__(self, answering: Answering, body: ResponsesBody) -> None:
        self._answering, self._body = answering, body
        self._id, self._item, self._created = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}", int(time.time())
        self._conversation = body.conversation(answering)

    async def ask(self) -> Asked:
        return await self._conversation.ask(self._body.sampling(), self._body.max_output_tokens)

    def whole(self, answers: Sequence[Generation], asked: Asked) -> dict[str, Any]:
        (answer,) = answers
        cut = answer.finish_reason == "length"
        usage = {
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": len(answer.tokens),
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answer.prompt_tokens + len(answer.tokens),
        }
        told = self._response("incomplete" if cut else "completed")
        told["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        text, calls = calls_in(answer.text, self._conversation.calls) if self._conversation.calls else (answer.text, [])
        said = [self._message(text, cut)] if text or not calls else []
        told |= {"output": [*said, *map(_item, calls)], "usage": usage}
        return {**told, "growlm": about(answer, self._conversation.route)}

    async def chunks(self, asked: Asked) -> AsyncGenerator[dict[str, Any], None]:
        number = 0

        def event(kind: str, **content: Any) -> dict[str, Any]:
            nonlocal number
            number += 1
            return {"type": f"response.{kind}", "sequence_number": number - 1, **content}

        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        begun, writes, held = False, False, Held(self._conversation.calls)

        def said(text: str) -> Iterator[dict[str, Any]]:
            nonlocal writes
            if not writes:
                writes = True
                message = {**self._message("", False), "status": "in_progress", "content": []}
                yield event("output_item.added", output_index=0, item=message)
                yield event("content_part.added", **place, part=_part(""))
            if text:
                yield event("output_text.delta", **place, delta=text, logprobs=[])

        try:
            async for _, item in asked.items():
                if not begun:
                    begun = True
                    for kind in ("created", "in_progress"):
                        yield event(kind, response=self._response("in_progress"))
                if isinstance(item, Piece):
                    text = held.add(item.text) if self._conversation.calls else item.text
                    for one in said(text) if text or not self._conversation.calls else ():
                        yield one
                    continue
                whole = self.whole([item], asked)
                rest, calls = held.end() if self._conversation.calls else ("", [])
                for one in said(rest) if rest or not (writes or calls) else ():
                    yield one
                for index, one in enumerate(whole["output"]):
                    if one["type"] == "message":
                        (part,) = one["content"]
                        yield event("output_text.done", **place, text=part["text"], logprobs=[])
                        yield event("content_part.done", **place, part=part)
                    else:
                        begins = {**one, "arguments": "", "status": "in_progress"}
                        yield event("output_item.added", output_index=index, item=begins)
                        where = {"item_id": one["id"], "output_index": index}
                        yield event("function_call_arguments.delta", **where, delta=one["arguments"])
                        yield event(
                            "function_call_arguments.done", **where, name=one["name"], arguments=one["arguments"]
                        )
                    yield event("output_item.done", output_index=index, item=one)
                yield event(whole["status"], response=whole)
        except Exception as error:
            if not begun:
                raise
            refusal = refusal_of(error)
            told = {"code": refusal.code, "message": refusal.message, "param": refusal.param}
            yield {"type": "error", "sequence_number": number, **told}

    def _response(self, status: str) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": body.model or self._answering.names.store,
            "output": [],
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "text": body.text or {"format": {"type": "text"}},
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "usage": None,
        }

    def _message(self, text: str, cut: bool) -> dict[str, Any]:
        status = "incomplete" if cut else "completed"
        return {"type": "message", "id": self._item, "status": status, "role": "assistant", "content": [_part(text)]}


def _item(call: Call) -> dict[str, Any]:
    told = {"type": "function_call", "id": new_id("fc"), "call_id": new_id("call"), "name": call.name}
    return {**told, "arguments": call.text, "status": "completed"}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
