"""Chat: a conversation as prompts. Knows turns and templates; the engine does the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from growlm.engine import Engine, Generation

_STOP = "\nUser:"


class Chat:
    """Turns with one engine. Uses the tokenizer's chat template, or else plain `User:` and `Assistant:` lines."""

    def __init__(self, engine: Engine, module: str | None = "auto", **sampling: Any) -> None:
        self._engine, self._sampling = engine, sampling
        self._module: str | None = None
        self.choose(module)
        self.messages: list[dict[str, str]] = []

    def choose(self, module: str | None) -> None:
        """Fixes the module for the turns to come; "auto" routes every turn.

        Raises:
            UnknownModuleError: no such module.
        """
        if module not in (None, "auto"):
            self._engine.store.module(str(module))
        self._module = module

    def reset(self) -> None:
        self.messages = []

    def say(self, text: str, *, seed: int = 0) -> Iterator[str | Generation]:
        """A user's turn; yields the answer as `Engine.stream` does."""
        self.messages.append({"role": "user", "content": text})
        templated = bool(getattr(self._engine.tokenizer, "chat_template", None))
        stop = () if templated else (_STOP,)
        try:
            for piece in self._engine.stream(
                self._prompt(templated), module=self._module, reuse=True, seed=seed, stop=stop, **self._sampling
            ):
                if isinstance(piece, Generation):
                    self.messages.append({"role": "assistant", "content": piece.text})
                yield piece
        except BaseException:
            self.messages.pop()
            raise

    def _prompt(self, templated: bool) -> str:
        if templated:
            return self._engine.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        turns = [f"{m['role'].capitalize()}: {m['content'].strip()}" for m in self.messages]
        return "\n".join([*turns, "Assistant:"])
