"""Fields of requests: what clients may send, as pydantic checks it, and what the engine is asked for because of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from growlm.data import Tools
from growlm.engine import Generation
from growlm.engine.request import Request
from growlm.errors import settings_written
from growlm.server.refusals import Refusal
from growlm.server.tools import Called, Tool, tools_of

_CALLED = {"max_new_tokens": "max_tokens", "json_schema": "response_format"}
_LONGEST_GRAMMAR = 1 << 16  # characters: longer ones take seconds to compile
_MOST_STOPS, _LONGEST_STOP = 16, 256
_NO_BOUND = -1  # vLLM's word for a top_k that keeps all


class StreamOptions(BaseModel):
    include_usage: bool = False


class Body(BaseModel):
    """What requests for text have in common. `null` is what a field is by default, as clients send it."""

    model_config = ConfigDict(extra="allow")
    # Fields that would change the answer, and that nothing here can honour.
    unsupported: ClassVar[dict[str, str]] = {}
    passed_over: ClassVar[tuple[str, ...]] = ()  # of the fields below, those that this form does not honour
    several: ClassVar[bool] = True  # whether its form has room for more than one answer

    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=1024)
    response_format: dict[str, Any] | None = None
    regex: str | None = Field(default=None, max_length=_LONGEST_GRAMMAR)
    grammar: str | None = Field(default=None, max_length=_LONGEST_GRAMMAR)
    cache_salt: str | None = None
    return_token_ids: bool | None = None

    def ignored(self) -> list[str]:
        """Fields that are not known and change nothing.

        Raises:
            Refusal: one that is not known and would.
        """
        given = {**(self.model_extra or {}), **{name: getattr(self, name) for name in self.passed_over}}
        extra = {name: value for name, value in given.items() if value not in (None, [], {}, False)}
        for name, told in self.unsupported.items():
            if name in extra and extra[name] not in ("", 1):  # which ask for nothing
                raise Refusal(400, f"{name}: {told}", "unsupported", name)
        return sorted(extra)

    def require(self) -> None:
        """
        Raises:
            Refusal: fields that contradict each other.
        """
        if self.stream_options is not None and not self.stream:
            told = "stream_options is for streams; set stream, or leave it out"
            raise Refusal(400, told, "invalid_value", "stream_options")
        if self.number > 1 and not self.several:
            raise Refusal(400, "n: this form has one answer; ask several times", "unsupported", "n")

    def sampling(self) -> dict[str, Any]:
        """Settings of `SamplingConfig`. By default the temperature is 1, as OpenAI's, and each answer is drawn anew."""
        given = {
            name: getattr(self, name)
            for name in ("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")
        }
        given["top_k"] = None if self.top_k == _NO_BOUND else self.top_k
        given["regex"], given["grammar"] = self.regex, self.grammar
        given["json_schema"] = self._json_schema()
        given["temperature"] = 1.0 if self.temperature is None else self.temperature
        given["seed"] = None if self.seed is None else self.seed % 2**64
        given["stop"] = stop_texts((self.stop,) if isinstance(self.stop, str) else self.stop or (), "stop")
        if self.cache_salt is not None:
            given["salt"] = self.cache_salt
        return {name: value for name, value in given.items() if value is not None}

    def _json_schema(self) -> dict[str, Any] | None:
        form = self.response_format
        if form is None or form.get("type") == "text":
            return None
        if form.get("type") == "json_object":
            return {"type": "object"}
        schema = form.get("json_schema")
        if form.get("type") == "json_schema" and isinstance(schema, dict) and isinstance(schema.get("schema"), dict):
            if len(json.dumps(schema["schema"])) <= _LONGEST_GRAMMAR:
                return dict(schema["schema"])
            told = f"the schema is longer than {_LONGEST_GRAMMAR} characters"
            raise Refusal(400, f"response_format: {told}", "invalid_value", "response_format")
        told = 'expected type text, json_object, or json_schema with {"json_schema": {"schema": ...}}'
        raise Refusal(400, f"response_format: {told}", "invalid_value", "response_format")

    def ids_of(self, request: Request, answer: Generation) -> dict[str, list[int]]:
        """Token ids of a prompt and its answer, where they are asked for."""
        return {"prompt_token_ids": request.tokens, "token_ids": answer.tokens} if self.return_token_ids else {}

    @property
    def number(self) -> int:
        return 1 if self.n is None else self.n


def stop_texts(texts: Sequence[str], field: str) -> tuple[str, ...]:
    """Texts that end an answer: as many, and as long, as can be looked for after every token.

    Raises:
        Refusal: more, or longer ones.
    """
    if len(texts) > _MOST_STOPS or any(len(text) > _LONGEST_STOP for text in texts):
        told = f"{field}: at most {_MOST_STOPS} texts of at most {_LONGEST_STOP} characters"
        raise Refusal(400, told, "invalid_value", field)
    return tuple(texts)


class CompletionBody(Body):
    unsupported = {
        "suffix": "text is only written behind a prompt; leave it out",
        "best_of": "answers are not ranked; use n",
    }

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)


class ContentPart(BaseModel):
    """A part of a message: a text, or in Anthropic's form a tool that was called, or what it gave."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    content: str | list[ContentPart] | None = None
    id: str | None = None
    tool_use_id: str | None = None
    is_error: bool | None = None


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: list[Called] | None = None
    tool_call_id: str | None = None


class ChatBody(Body):
    unsupported = {
        "functions": "give them as tools",
        "audio": "answers are text",
    }

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: str | dict[str, Any] | None = None

    def tools_offered(self) -> Tools:
        """
        Raises:
            Refusal: tools that cannot be.
        """
        calls = {number: message.tool_calls for number, message in enumerate(self.messages)}
        return tools_of(self.tools, self.tool_choice, calls, "messages")

    def require(self) -> None:
        super().require()
        if self.top_logprobs and not self.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs: true", "invalid_value", "top_logprobs")


@contextmanager
def called_as_fields() -> Iterator[None]:
    """Inside, messages call settings as the fields of requests are called."""
    with settings_written(lambda name: _CALLED.get(name, name)):
        yield


def room_for_answer(length: int | None, prompt_tokens: int, most: int) -> int:
    """Tokens that an answer may have where none are asked for: up to the end of what the base reads, of which a prompt
    that leaves no room hears from the engine."""
    return most if length is None else max(min(length - prompt_tokens, most), 1)
