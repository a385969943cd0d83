"""Chat: `/v1/chat/completions`, conversations that the assistant goes on with."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from growlm.engine import Generation
from growlm.engine.sampling import TokenLogprob
from growlm.server.answering import Answering, about, usage_of
from growlm.server.conversation import Conversation, in_order, turns_of
from growlm.server.fields import ChatBody
from growlm.server.service import Asked
from growlm.server.tools import Held, calls_in


class ChatCompletion:
    """One request, from its body to what is sent."""

    def __init__(self, answering: Answering, body: ChatBody) -> None:
        self._answering, self._body = answering, body
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        tools = body.tools_offered()
        calls = {n: [call.id for call in m.tool_calls] for n, m in enumerate(body.messages) if m.tool_calls}
        results = {n: m.tool_call_id for n, m in enumerate(body.messages)}
        turns = in_order(turns_of(body.messages), calls, results, "messages")
        self._conversation = Conversation(answering, body.model, turns, "messages", tools)
        self._calls = self._conversation.calls

    async def ask(self) -> Asked:
        body, settings = self._body, self._body.sampling()
        if body.logprobs:
            settings["logprobs"] = body.top_logprobs or 0
        return await self._conversation.ask(settings, body.max_completion_tokens or body.max_tokens, body.number)

    def whole(self, answers: Sequence[Generation], asked: Asked) -> dict[str, Any]:
        choices = []
        for number, answer in enumerate(answers):
            text, calls = calls_in(answer.text, self._calls) if self._calls else (answer.text, [])
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                message |= {"content": text or None, "tool_calls": [call.to_json() for call in calls]}
            said = self._logprobs(answer.logprobs or ()) if self._body.logprobs else None
            ids = self._body.ids_of(asked.requests[number], answer)
            reason = "tool_calls" if calls else answer.finish_reason
            choices.append({"index": number, "message": message, "logprobs": said, "finish_reason": reason, **ids})
        return {
            **self._head("chat.completion"),
            "choices": choices,
            "usage": self._usage(answers),
            "growlm": about(answers[0], self._conversation.route),
        }

    async def chunks(self, asked: Asked) -> AsyncGenerator[dict[str, Any], None]:
        begun: dict[int, Held] = {}
        answers: list[Generation] = []
        async for number, item in asked.items():
            if number not in begun:
                begun[number] = Held(self._calls)
                yield self._chunk(number, {"role": "assistant", "content": ""})
            if isinstance(item, Generation):
                answers.append(item)
                rest, calls = begun[number].end() if self._calls else ("", [])
                if rest:
                    yield self._chunk(number, {"content": rest})
                for index, call in enumerate(calls):
                    yield self._chunk(number, {"tool_calls": [{"index": index, **call.to_json()}]})
                chunk = self._chunk(number, {}, "tool_calls" if calls else item.finish_reason)
                chunk["choices"][0] |= self._body.ids_of(asked.requests[number], item)
                yield {**chunk, "growlm": about(item, self._conversation.route)}
            else:
                said = self._logprobs(item.logprobs) if self._body.logprobs else None
                text = begun[number].add(item.text) if self._calls else item.text
                if text or said or not self._calls:
                    yield self._chunk(number, {"content": text}, logprobs=said)
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
        spelling = self._answering.spelling

        def told(token: int, logprob: float) -> dict[str, Any]:
            (text,) = spelling.texts([token])
            return {"token": text, "logprob": logprob, "bytes": spelling.bytes_of(token)}

        content = [
            {**told(one.token, one.logprob), "top_logprobs": [told(*other) for other in one.top]} for one in each
        ]
        return {"content": content, "refusal": None}
