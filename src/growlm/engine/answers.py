"""Answers: text that grows token by token, is streamed and stops where it should; and what is told of it at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from growlm.engine.sampling import SamplingConfig


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        text: the answer alone, without the prompt.
        module: which module wrote it; None for the base. Several that were active together are joined by "+".
        scores: the router's, best first; empty where the module was given.
        resident_bytes: weights in memory when it was written: base, router and modules.
        loaded: modules that were read from the disk for it.
        mixture: with `mix`, how much each module counted at the end; they sum to 1.
        changes: with `reroute`, every change of module: tokens written before it, and the module.
        tokens: ids of the answer.
        modules: the modules that were active together, in the names' order: none for the base; with `mix` the heaviest,
            with `reroute` the last.
        finish_reason: "stop" (an end of text or a stop text) or "length".
    """

    text: str
    module: str | None
    scores: dict[str, float]
    resident_bytes: int
    loaded: list[str]
    tokens: list[int] = field(repr=False)
    prompt_tokens: int
    finish_reason: str
    mixture: dict[str, float] = field(default_factory=dict)
    changes: list[tuple[int, str | None]] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tokens"}


class Answer:
    """One answer while it is written."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], emit: Callable[[str], bool] | None) -> None:
        self._tokenizer, self._stop, self._emit = tokenizer, stop, emit
        self.tokens: list[int] = []
        self.stopped = False
        self._sent = 0

    def add(self, token: int) -> bool:
        self.tokens.append(token)
        if self._stop or self._emit:
            text = self.text()
            if any(s in text for s in self._stop):
                self.stopped = True
            if self._emit:
                self._send(text)
        return not self.stopped

    def text(self) -> str:
        return self._tokenizer.decode(self.tokens, skip_special_tokens=True)

    def generation(self, config: SamplingConfig, modules: list[str], **known: Any) -> Generation:
        full = len(self.tokens) == config.max_new_tokens and not self.stopped
        return Generation(
            text=self._final_text(),
            module="+".join(modules) or None,
            modules=modules,
            tokens=self.tokens,
            finish_reason="length" if full else "stop",
            **known,
        )

    def _final_text(self) -> str:
        text = self.text()
        cuts = [text.index(s) for s in self._stop if s in text]
        text = text[: min(cuts)] if cuts else text
        if self._emit and len(text) > self._sent:
            self._emit(text[self._sent :])
        return text

    def _send(self, text: str) -> None:
        # Half a character, or what may become a stop text, waits for the next token.
        end = len(text)
        if text.endswith("\ufffd"):
            end = len(text.rstrip("\ufffd"))
        for stop in self._stop:
            if stop in text:
                end = min(end, text.index(stop))
            for size in range(min(len(stop) - 1, end), 0, -1):
                if text[:end].endswith(stop[:size]):
                    end -= size
                    break
        if end > self._sent:
            assert self._emit is not None
            if not self._emit(text[self._sent : end]):
                self.stopped = True
            self._sent = end
