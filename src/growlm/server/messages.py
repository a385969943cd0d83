"""Messages: `/v1/messages`, conversations in the form of Anthropic's interface."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any, ClassVar

from pydantic import Field

from growlm.data import Turn
from growlm.engine import Generation
from growlm.server.answering import Answering, about
from growlm.server.conversation import Conversation, text_of, turns_of
from growlm.server.fields import Body, ContentPart, Message, stop_texts
from growlm.server.refusals import Refusal
from growlm.server.service import Asked, Piece


class CountBody(Body):
    several = False
    unsupported: ClassVar[dict[str, str]] = {
        "tools": "this server calls no tools; leave it out",
        "mcp_servers": "this server asks no others; leave it out",
    }

    messages: list[Message] = Field(min_length=1)
    system: str | list[ContentPart] | None = None

    def turns(self) -> list[Turn]:
        """
        Raises:
            Refusal: what cannot be read, or nothing to answer.
        """
        system = [] if self.system is None else [Turn("system", text_of(self.system, "system", "system"))]
        if self.messages[-1].role != "user":
            told = "messages: the last one must be the user's; an answer that is begun cannot be gone on with"
            raise Refusal(400, told, "invalid_value", "messages")
        return [*system, *turns_of(self.messages)]


class MessagesBody(CountBody):
    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None

    def sampling(self) -> dict[str, Any]:
        return {**super().sampling(), "stop": stop_texts(self.stop_sequences or (), "stop_sequences")}


class Messages:
    """One request, from its body to what is sent."""

    def __init__(self, answering: Answering, body: MessagesBody) -> None:
        self._answering, self._body, self._id = answering, body, f"msg_{uuid.uuid4().hex}"
        self._conversation = Conversation(answering, body.model, body.turns(), "messages")

    async def ask(self) -> Asked:
        return await self._conversation.ask(self._body.sampling(), self._body.max_tokens)

    def whole(self, answers: Sequence[Generation], asked: Asked) -> dict[str, Any]:
        (answer,) = answers
        return {
            **self._message(answer.prompt_tokens, len(answer.tokens)),
            "content": [{"type": "text", "text": answer.text}],
            **self._end(answer),
            "growlm": about(answer, self._conversation.scores),
        }

    async def chunks(self, asked: Asked) -> AsyncGenerator[dict[str, Any], None]:
        begun = False
        async for _, item in asked.items():
            if not begun:
                begun = True
                read = len(asked.requests[0].tokens)
                yield {"type": "message_start", "message": self._message(read, 0)}
                yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
            if isinstance(item, Piece):
                delta = {"type": "text_delta", "text": item.text}
                yield {"type": "content_block_delta", "index": 0, "delta": delta}
            else:
                yield {"type": "content_block_stop", "index": 0}
                usage = {"output_tokens": len(item.tokens)}
                told = about(item, self._conversation.scores)
                yield {"type": "message_delta", "delta": self._end(item), "usage": usage, "growlm": told}
                yield {"type": "message_stop"}

    def _message(self, read: int, written: int) -> dict[str, Any]:
        model = self._body.model or self._answering.names.store
        usage = {"input_tokens": read, "output_tokens": written}
        end = {"stop_reason": None, "stop_sequence": None}
        return {
            "id": self._id, "type": "message", "role": "assistant", "model": model, "content": [], **end, "usage": usage
        }  # fmt: skip

    def _end(self, answer: Generation) -> dict[str, Any]:
        stop = answer.stop if answer.stop in (self._body.stop_sequences or ()) else None
        reason = "max_tokens" if answer.finish_reason == "length" else "stop_sequence" if stop else "end_turn"
        return {"stop_reason": reason, "stop_sequence": stop}
