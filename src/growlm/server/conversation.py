"""Conversations: turns that the assistant goes on with, which all forms of chat come down to."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from growlm.data import NO_TOOLS, Tools, Turn
from growlm.engine import AUTO
from growlm.engine.chat import conversation_prompt, routed_text
from growlm.errors import BaseModelError
from growlm.server.answering import Answering
from growlm.server.fields import ContentPart, Message, called_as_fields, room_for_answer
from growlm.server.refusals import Refusal
from growlm.server.service import Asked

_MOST = 1024  # tokens of an answer where none are asked for
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_TEXTS = ("text", "input_text", "output_text")  # what parts of a content that are text are called


class Conversation:
    """One that is to be gone on with.

    Attributes:
        scores: the router's, once it was asked; empty where the module is named.
        ends: texts that end a turn where the base has no template for one, and that nobody asked for.
    """

    def __init__(
        self, answering: Answering, model: str | None, turns: Sequence[Turn], field: str, tools: Tools = NO_TOOLS
    ) -> None:
        """
        Args:
            field: that has the turns.
        """
        self._answering, self._turns, self._field, self._tools = answering, turns, field, tools
        self._wanted = answering.names.wanted(model)
        self.scores: dict[str, float] = {}
        self.ends: tuple[str, ...] = ()

    async def ask(self, settings: dict[str, Any], most: int | None, number: int = 1) -> Asked:
        """
        Args:
            settings: of `SamplingConfig`.
            most: tokens of an answer; None for what the base still reads, up to a bound.
            number: of answers.

        Raises:
            Refusal: turns that the base's template cannot write, or no place for the request.
        """
        service, wanted = self._answering.service, self._wanted
        with called_as_fields():
            prompt = await self.prompt()
            if wanted == AUTO:
                route = await self._answering.route(routed_text(self._turns), salt=settings.get("salt", ""))
                wanted, self.scores = route.module, route.scores
            if most is None:
                tokens = len(await service.prepare(service.engine.tokens_of, prompt))
                most = room_for_answer(self._answering.names.length, tokens, _MOST)
            stop = (*settings.pop("stop", ()), *self.ends)
            return await self._answering.ask(
                [prompt], number, module=wanted, **settings, stop=stop, max_new_tokens=most
            )

    @property
    def calls(self) -> bool:
        """Whether the model was told of tools, so that it may call some."""
        return bool(self._tools.offered)

    async def prompt(self) -> str | Sequence[int]:
        """What the engine is given."""
        service = self._answering.service
        try:
            prompt, self.ends = await service.prepare(conversation_prompt, service.engine, self._turns, self._tools)
        except BaseModelError as error:  # the template's own word, such as that turns do not alternate
            field = self._field if self._tools is NO_TOOLS else "tools"
            told = str(error).removeprefix(f"{service.engine.base.where}: ")  # clients need not know where it lies
            raise Refusal(400, told, "invalid_value", field) from None
        return prompt


def turns_of(messages: Iterable[Message], field: str = "messages", *, where: Sequence[str] | None = None) -> list[Turn]:
    """
    Args:
        where: what to call each message in errors; by default by its number in the field.

    Raises:
        Refusal: a role or a content that cannot be read.
    """
    turns = []
    named = (f"{field}[{number}]" for number in itertools.count()) if where is None else where
    for at, message in zip(named, messages, strict=False):
        if message.role not in _ROLES:
            told = f"{at}: role is {message.role!r}, expected one of {', '.join(_ROLES)}"
            raise Refusal(400, told, "invalid_value", field)
        if message.content is None and message.tool_calls:
            turns.append(Turn("assistant", ""))
            continue
        if message.content is None:
            raise Refusal(400, f"{at}: content is missing; give a text", "invalid_value", field)
        turns.append(Turn(_ROLES[message.role], text_of(message.content, at, field)))
    return turns


def text_of(content: str | Sequence[ContentPart], where: str, field: str) -> str:
    """
    Raises:
        Refusal: a part that is no text.
    """
    if isinstance(content, str):
        return content
    for part in content:
        if part.type not in _TEXTS or part.text is None:
            told = f"{where}: a part of its content is of type {part.type!r}; the model reads text alone"
            raise Refusal(400, told, "unsupported", field)
    return "\n".join(part.text or "" for part in content)
