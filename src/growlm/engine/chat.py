"""Chat: a conversation as prompts. Knows turns; `growlm.data.template` writes them, and the engine does the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from growlm.base.settings import foreign
from growlm.data import NO_TOOLS, Template, Tools, Turn, has_template
from growlm.engine.answers import Generation
from growlm.engine.engine import Engine
from growlm.engine.prompts import Prompt
from growlm.engine.sampling import SamplingConfig
from growlm.engine.selection import AUTO, Wanted, select
from growlm.errors import BaseModelError
from growlm.router import Route

_STOP = "\nUser:"


def conversation_prompt(
    engine: Engine, turns: Sequence[Turn], tools: Tools = NO_TOOLS
) -> tuple[Prompt, tuple[str, ...]]:
    """A conversation as the engine reads it, for the assistant to go on with, and the texts that end its turn: in the
    base's chat template, or else in plain `User:` and `Assistant:` lines.

    Raises:
        BaseModelError: the template refuses it, or has no place for tools.
    """
    if tools is not NO_TOOLS and not takes_tools(engine):
        raise BaseModelError(f"{engine.base.where}: its chat template has no place for tools; leave them out")
    if has_template(engine.tokenizer):
        # Token ids: a template writes its own start of text.
        with foreign(engine.base.where, "its chat template cannot write this conversation: "):
            return Template(engine.tokenizer).prompt(turns, tools), ()
    lines = [f"{turn.role.capitalize()}: {turn.content.strip()}" for turn in turns]
    return "\n".join([*lines, "Assistant:"]), (_STOP,)


def takes_tools(engine: Engine) -> bool:
    """Whether the base's chat template tells it of tools."""
    return has_template(engine.tokenizer) and Template(engine.tokenizer).takes_tools


def routed_text(turns: Sequence[Turn]) -> str:
    """What the router sees of a conversation: what the user has said so far, the newest last, and nothing of the
    answers. The choice is the same whether or not keys and values of earlier turns are still in memory."""
    return "\n".join(turn.content for turn in turns if turn.role == "user")


class Chat:
    """Turns with one engine. Uses the tokenizer's chat template, or else plain `User:` and `Assistant:` lines."""

    def __init__(self, engine: Engine, module: Wanted = AUTO, **sampling: Any) -> None:
        SamplingConfig(**sampling)  # says now what would fail every turn
        self._engine, self._sampling = engine, sampling
        self._module: Wanted = None
        self.choose(module)
        self.messages: list[dict[str, str]] = []

    def choose(self, module: Wanted) -> None:
        """Fixes the module, or several, for the turns to come, as `Engine.generate` takes them; "auto" routes every
        turn.

        Raises:
            UnknownModuleError: no such module.
            ConfigError: modules that cannot be active together.
        """
        self._module = select(self._engine.store, module) or None

    def reset(self) -> None:
        self.messages = []

    def say(self, text: str, *, seed: int = 0) -> Iterator[str | Generation]:
        """A user's turn; yields the answer as `Engine.stream` does. A turn that fails or is left is forgotten."""
        said = [*self.messages, {"role": "user", "content": text}]
        turns = [Turn(m["role"], m["content"]) for m in said]
        module, route = self._module, Route(None, {})
        if module == AUTO:
            route = self._engine.route(routed_text(turns))
            module = route.module
        prompt, stop = conversation_prompt(self._engine, turns)
        for piece in self._engine.stream(prompt, module=module, seed=seed, stop=stop, **self._sampling):
            if isinstance(piece, Generation):
                self.messages = [*said, {"role": "assistant", "content": piece.text}]
                piece = replace(piece, scores=route.scores, refused=route.refused)
            yield piece
