"""Chat: `/v1/chat/completions`, conversations that the assistant goes on with."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from growlm.data import Turn
from growlm.engine import AUTO, Generation
from growlm.engine.chat import conversation_prompt, routed_text
from growlm.engine.sampling import TokenLogprob
from growlm.errors import BaseModelError
from growlm.server.answering import Answering, about, usage_of
from growlm.server.fields import ChatBody, Message, called_as_fields, room_for_answer
from growlm.server.refusals import Refusal
from growlm.server.service import Asked

_MOST = 1024  # tokens of an answer where none are asked for
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class ChatCompletion:
    """One request, from its body to what is sent."""

    def __init__(self, answering: Answering, body: ChatBody) -> None:
        self._answering, self._body = answering, body
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._turns = turns_of(body.messages)
        self._scores: dict[str, float] = {}

    async def ask(self) -> Asked:
        body, service = self._body, self._answering.service
        wanted = self._answering.names.wanted(body.model)
        with called_as_fields():
            try:
                prompt, stop = await service.prepare(conversation_prompt, service.engine, self._turns)
            except BaseModelError as error:  # the template's own word, such as that turns do not alternate
                raise Refusal(400, str(error), "invalid_value", "messages") from None
            if wanted == AUTO:
                route = await service.route(routed_text(self._turns))
                wanted, self._scores = route.module, route.scores
            most = body.max_completion_tokens or body.max_tokens
            if most is None:
                base = service.engine.base
                length = base.trained_positions or base.max_positions
                tokens = len(await service.prepare(service.engine.tokens_of, prompt))
                most = room_for_answer(length, tokens, _MOST)
            settings = {**body.sampling(stop), "max_new_tokens": most}
            if body.logprobs:
                settings["logprobs"] = body.top_logprobs or 0
            return await service.ask([prompt], body.number, module=wanted, **settings)

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
            "growlm": about(answers[0], self._scores),
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
                yield {**chunk, "growlm": about(item, self._scores)}
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


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """
    Raises:
        Refusal: a role or a content that cannot be read.
    """
    return [_turn(number, message) for number, message in enumerate(messages)]


def _turn(number: int, message: Message) -> Turn:
    """
    Raises:
        Refusal: a role or a content that cannot be read.
    """
    where = f"messages[{number}]"
    if message.role not in _ROLES:
        told = f"{where}: role is {message.role!r}, expected one of {', '.join(_ROLES)}"
        raise Refusal(400, told, "invalid_value", "messages")
    if message.content is None:
        raise Refusal(400, f"{where}: content is missing; give a text", "invalid_value", "messages")
    if isinstance(message.content, str):
        return Turn(_ROLES[message.role], message.content)
    for part in message.content:
        if part.type != "text" or part.text is None:
            told = f"{where}: a part of its content is of type {part.type!r}; the model reads text alone"
            raise Refusal(400, told, "unsupported", "messages")
    return Turn(_ROLES[message.role], "\n".join(part.text or "" for part in message.content))
