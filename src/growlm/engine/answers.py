"""Answers: text that grows token by token, is streamed and stops where it should; and what is told of it at the end."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from growlm.engine.sampling import SamplingConfig, TokenLogprob


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        text: the answer alone, without the prompt.
        module: which module wrote it; None for the base. Several that were active together are joined by "+".
        scores: the router's, best first; empty where the module was given.
        resident_bytes: weights in memory when it was written: base, router and modules.
        loaded: modules that were read from the disk for it.
        refused: the module that the router chose, and that a second look found to read the prompt no better than the
            base.
        mixture: with `mix`, how much each module counted at the end; they sum to 1.
        changes: with `reroute`, every change of module: tokens written before it, and the module.
        tokens: ids of the answer.
        modules: the modules that were active together, in the names' order: none for the base; with `mix` the heaviest,
            with `reroute` the last.
        finish_reason: "stop" (an end of text or a stop text) or "length".
        stop: the stop text that ended it, if one did.
        logprobs: of the answer's tokens, where they were asked for.
        prompt_logprobs: of the prompt's tokens but the first, where they were asked for.
    """

    text: str
    module: str | None
    scores: dict[str, float]
    resident_bytes: int
    loaded: list[str]
    tokens: list[int] = field(repr=False)
    prompt_tokens: int
    finish_reason: str
    stop: str | None = None
    refused: str | None = None
    mixture: dict[str, float] = field(default_factory=dict)
    changes: list[tuple[int, str | None]] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = field(default=None, repr=False)
    prompt_logprobs: list[TokenLogprob] | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tokens"}
        for name in ("logprobs", "prompt_logprobs"):
            each = found.pop(name)
            if each is not None:
                found[name] = [asdict(one) for one in each]
        return found


class Answer:
    """One answer while it is written.

    Attributes:
        streams: whether its text is wanted as it is written: in `pieces`, from which who reads it takes it.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], *, streams: bool = False) -> None:
        self._tokenizer, self._stop, self.streams = tokenizer, stop, streams
        self.tokens: list[int] = []
        self.pieces: deque[str] = deque()
        self.stopped_by: str | None = None
        self._detokenizer = Detokenizer(tokenizer)
        self._given: list[str] = []
        self._held = ""  # what may become a stop text

    def add(self, token: int) -> bool:
        """Returns whether the answer goes on."""
        self.tokens.append(token)
        if self._stop or self.streams:
            self._take(self._detokenizer.add(token))
        return self.stopped_by is None

    def generation(self, config: SamplingConfig, modules: list[str], **known: Any) -> Generation:
        full = len(self.tokens) == config.max_new_tokens and self.stopped_by is None
        return Generation(
            text=self._whole(),
            module="+".join(modules) or None,
            modules=modules,
            tokens=self.tokens,
            finish_reason="length" if full else "stop",
            stop=self.stopped_by,
            **known,
        )

    def _whole(self) -> str:
        if not self._stop and not self.streams:
            return self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        if self.stopped_by is None:
            self._take(self._detokenizer.rest())
            self._give(len(self._held))
        return "".join(self._given)

    def _take(self, text: str) -> None:
        self._held += text
        places = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if places:
            first, self.stopped_by = min(places)
            self._give(first)
            return
        # The longest end that a stop text begins with.
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                self._give(len(self._held) - size)
                return
        self._give(len(self._held))

    def _give(self, count: int) -> None:
        if count:
            self._given.append(self._held[:count])
            if self.streams:
                self.pieces.append(self._held[:count])
        self._held = self._held[count:]


class Detokenizer:
    """Text of tokens as they come, in whole characters: what a token adds is read off the few tokens before it, and not
    off the whole text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # the newest that have given text, and those after them that have given none yet
        self._told = 0  # how many of these have given text
        self._before = ""  # that text

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._tokens.append(token)
        text = self._text(self._tokens)
        if text.endswith("\ufffd"):  # half a character
            return ""
        new = text[len(self._before) :]
        if new:
            del self._tokens[: self._told]
            self._told, self._before = len(self._tokens), self._text(self._tokens)
        return new

    def rest(self) -> str:
        """What has been waiting for a character's other half, at the end."""
        text = self._text(self._tokens)[len(self._before) :]
        self._tokens, self._told, self._before = [], 0, ""
        return text

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
