"""Chat: `/v1/chat/completions`, conversations that the assistant goes on with."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from growlm.engine import Generation
from growlm.engine.sampling import TokenLogprob
from growlm.server.answering import Answering, about, usage_of
from growlm.server.conversation import Conversation, turns_of
from growlm.server.fields import ChatBody
from growlm.server.service import Asked


class ChatCompletion:
    """One request, from its body to what is sent."""

    def __init__(self, answering: Answering, body: ChatBody) -> None:
        self._answering, self._body = answering, body
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._conversation = Conversation(answering, body.model, turns_of(body.messages), "messages")

    async def ask(self) -> Asked:
        body, settings = self._body, self._body.sampling()
        if body.logprobs:
            settings["logprobs"] = body.top_logprobs or 0
        return await self._conversation.ask(settings, body.max_completion_tokens or body.max_tokens, body.number)

    def whole(self, answers: Sequence[Generation], asked: Asked) -> dict[str, Any]:
        choices = []
        for number, answer in enumerate(answers):
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            said = self._logprobs(answer.logprobs or ()) if self._body.logprobs else None
            ids = self._body.ids_of(asked.requests[number], answer)
            choices.append(
                {"index": number, "message": message, "logprobs": said, "finish_reason": answer.finish_reason, **ids}
            )
        return {
            **self._head("chat.completion"),
            "choices": choices,
            "usage": self._usage(answers),
            "growlm": about(answers[0], self._conversation.scores),
        }

    async def chunks(self, asked: Asked) -> AsyncGenerator[dict[str, Any], None]:
        begun: set[int] = set()
        answers: list[Generation] = []
        async for number, item in asked.items():
            if number not in begun:
                begun.add(number)
                yield self._chunk(number, {"role": "assistant", "content": ""})
            if isinstance(item, Generation):
                answers.append(item)
                chunk = self._chunk(number, {}, item.finish_reason)
                chunk["choices"][0] |= self._body.ids_of(asked.requests[number], item)
                yield {**chunk, "growlm": about(item, self._conversation.scores)}
            else:
                said = self._logprobs(item.logprobs) if self._body.logprobs else None
                yield self._chunk(number, {"content": item.text}, logprobs=said)
        options = self._body.stream_options
        if options is not None and options.include_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(answers)}

    def _head(self, kind: str) -> dict[str, Any]:
        model = self._body.model or self._answering.names.store
        return {"id": self._id, "object": kind, "created": self._created, "model": model}

    def _chunk(
        self, number: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _usage(self, answers: Sequence[Generation]) -> dict[str, int]:
        return usage_of(answers[0].prompt_tokens, sum(len(answer.tokens) for answer in answers))

    def _logprobs(self, each: Sequence[TokenLogprob]) -> dict[str, Any]:
        def told(token: int, logprob: float) -> dict[str, Any]:
            (text,) = self._answering.token_texts([token])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = [
            {**told(one.token, one.logprob), "top_logprobs": [told(*other) for other in one.top]} for one in each
        ]
        return {"content": content, "refusal": None}
