"""Responses: `/v1/responses`, conversations in the form of OpenAI's newer interface. Nothing is kept of them: a client
sends all that was said."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any, ClassVar

from pydantic import Field

from growlm.data import Turn
from growlm.engine import Generation
from growlm.server.answering import Answering, about
from growlm.server.conversation import Conversation, turns_of
from growlm.server.fields import Body, Message
from growlm.server.refusals import Refusal
from growlm.server.service import Asked, Piece


class ResponsesBody(Body):
    several = False
    unsupported: ClassVar[dict[str, str]] = {
        "previous_response_id": "no answer is kept here; send the whole conversation as input",
        "conversation": "no conversation is kept here; send all of it as input",
        "background": "answers are waited for, or streamed",
        "tools": "this server calls no tools; leave it out",
        "prompt": "no prompt is kept here; send it as input",
    }

    input: str | list[Message] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    text: dict[str, Any] | None = None

    def turns(self) -> list[Turn]:
        """
        Raises:
            Refusal: what cannot be read.
        """
        system = [] if self.instructions is None else [Turn("system", self.instructions)]
        given = [Turn("user", self.input)] if isinstance(self.input, str) else turns_of(self.input, "input")
        return [*system, *given]

    def sampling(self) -> dict[str, Any]:
        form = (self.text or {}).get("format")
        if form is not None and not isinstance(form, dict):
            raise Refusal(400, "text: its format must be an object with a type", "invalid_value", "text")
        if form is not None and form.get("type") == "json_schema":  # of which the keys lie one level higher here
            form = {"type": "json_schema", "json_schema": {"schema": form.get("schema")}}
        self.response_format = form
        return super().sampling()


class Responses:
    """One request, from its body to what is sent."""

    def __init__(self, answering: Answering, body: ResponsesBody) -> None:
        self._answering, self._body = answering, body
        self._id, self._item, self._created = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}", int(time.time())
        self._conversation = Conversation(answering, body.model, body.turns(), "input")

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
        told |= {"output": [self._message(answer.text, cut)], "usage": usage}
        return {**told, "growlm": about(answer, self._conversation.scores)}

    async def chunks(self, asked: Asked) -> AsyncGenerator[dict[str, Any], None]:
        number = 0

        def event(kind: str, **content: Any) -> dict[str, Any]:
            nonlocal number
            number += 1
            return {"type": f"response.{kind}", "sequence_number": number - 1, **content}

        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        begun = False
        async for _, item in asked.items():
            if not begun:
                begun = True
                for kind in ("created", "in_progress"):
                    yield event(kind, response=self._response("in_progress"))
                message = {**self._message("", False), "status": "in_progress", "content": []}
                yield event("output_item.added", output_index=0, item=message)
                yield event("content_part.added", **place, part=_part(""))
            if isinstance(item, Piece):
                yield event("output_text.delta", **place, delta=item.text, logprobs=[])
                continue
            whole = self.whole([item], asked)
            yield event("output_text.done", **place, text=item.text, logprobs=[])
            yield event("content_part.done", **place, part=_part(item.text))
            yield event("output_item.done", output_index=0, item=whole["output"][0])
            yield event(whole["status"], response=whole)

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
            "tools": [],
            "tool_choice": "none",
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "usage": None,
        }

    def _message(self, text: str, cut: bool) -> dict[str, Any]:
        status = "incomplete" if cut else "completed"
        return {"type": "message", "id": self._item, "status": status, "role": "assistant", "content": [_part(text)]}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
