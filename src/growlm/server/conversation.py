"""Conversations: turns that the assistant goes on with, which all forms of chat come down to."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from growlm.data import NO_TOOLS, Tools, Turn
from growlm.engine import AUTO
from growlm.engine.chat import conversation_prompt, routed_text
from growlm.engine.prompts import Prompt
from growlm.errors import BaseModelError, UnknownModuleError
from growlm.router import Route
from growlm.server.answering import TRIES, Answering
from growlm.server.fields import ContentPart, Message, called_as_fields, room_for_answer
from growlm.server.refusals import Refusal, module_gone
from growlm.server.service import Asked

_MOST = 1024  # tokens of an answer where none are asked for
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_TEXTS = ("text", "input_text", "output_text")  # what parts of a content that are text are called


class Conversation:
    """One that is to be gone on with.

    Attributes:
        route: the router's answer, once it was asked; None where the module is named.
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
        self.route: Route | None = None
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
        routed = routed_text(self._turns)
        routes = self._wanted == AUTO and bool(routed.strip())  # of what nobody has asked the base may say something
        for _ in range(TRIES):
            try:
                with called_as_fields():
                    return await self._asked(routed if routes else None, dict(settings), most, number)
            except UnknownModuleError:
                if not routes:
                    raise
        raise module_gone()

    async def _asked(self, routed: str | None, settings: dict[str, Any], most: int | None, number: int) -> Asked:
        answering, service = self._answering, self._answering.service
        wanted = None if self._wanted == AUTO else self._wanted
        asked = service.begin(number)
        with asked.left_where_it_fails():
            prompt = await self.prompt()
            if routed is not None:
                self.route = await answering.route(routed, salt=settings.get("salt", ""), within=asked)
                wanted, asked.chosen = self.route.module, True
            if most is None:
                tokens = len(await service.prepare(service.engine.tokens_of, prompt))
                most = room_for_answer(answering.names.length, tokens, _MOST)
            stop = (*settings.pop("stop", ()), *self.ends)
            return await answering.ask(
                [prompt], number, module=wanted, within=asked, **settings, stop=stop, max_new_tokens=most
            )

    @property
    def calls(self) -> frozenset[str]:
        """The tools that the model was told of, so that it may call them."""
        return frozenset(tool["function"]["name"] for tool in self._tools.offered)

    async def prompt(self) -> Prompt:
        """What the engine is given."""
        service = self._answering.service
        try:
            prompt, self.ends = await service.prepare(self._written)
        except BaseModelError as error:  # the template's own word, such as that turns do not alternate
            field = self._field if self._tools is NO_TOOLS else "tools"
            told = str(error).removeprefix(f"{service.engine.base.where}: ")  # clients need not know where it lies
            raise Refusal(400, told, "invalid_value", field) from None
        return prompt

    def _written(self) -> tuple[Prompt, tuple[str, ...]]:
        engine = self._answering.service.engine
        engine.require_room("\n".join(turn.content for turn in self._turns))
        return conversation_prompt(engine, self._turns, self._tools)


def in_order(
    turns: Sequence[Turn], calls: Mapping[int, Sequence[str | None]], results: Mapping[int, str | None], field: str
) -> list[Turn]:
    """Turns in which what tools have given stands in the order of their calls: templates tell a model no more than that
    of which is whose.

    Args:
        calls: the ids of what each of the assistant's turns has called.
        results: of turns that are results, the ids of the calls that they are of. Where either is None, it stays.

    Raises:
        Refusal: a result of no call.
    """
    found, last = list(turns), list[str | None]()
    at = 0
    while at < len(found):
        last = list(calls.get(at, last if found[at].role == "tool" else ()))
        end = at
        while end < len(found) and found[end].role == "tool":
            end += 1
        run = range(at, end)
        if run and None not in last and all(results.get(n) is not None for n in run):
            for n in run:
                if results[n] not in last:
                    told = f"{field}: a tool's result is of the call {results[n]!r}, which the turn before has not made"
                    raise Refusal(400, told, "invalid_value", field)
            found[at:end] = [turns[n] for n in sorted(run, key=lambda n: last.index(results[n]))]
        at = max(end, at + 1)
    return found


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
