"""Completions: `/v1/completions`, prompts that are gone on with."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from growlm.data import encode_marked, start_tokens
from growlm.engine import Generation
from growlm.engine.prompts import Prompt
from growlm.engine.request import Request
from growlm.engine.sampling import TokenLogprob
from growlm.server.answering import Answering, about, usage_of
from growlm.server.fields import CompletionBody, called_as_fields
from growlm.server.refusals import Refusal
from growlm.server.service import Asked
from growlm.server.spelling import Places

_MOST = 16  # tokens of an answer where none are asked for, as OpenAI's


class Completion:
    """One request, from its body to what is sent."""

    def __init__(self, answering: Answering, body: CompletionBody) -> None:
        self._answering, self._body = answering, body
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._prompts = _prompts(body)

    async def ask(self) -> Asked:
        body = self._body
        wanted = self._answering.names.wanted(body.model)
        most = _MOST if body.max_tokens is None else body.max_tokens
        if not most and not body.echo:
            raise Refusal(400, "max_tokens is 0; it may be that where echo is set", "invalid_value", "max_tokens")
        settings = {**body.sampling(), "max_new_tokens": max(most, 1)}
        if body.logprobs is not None:
            settings["logprobs"] = body.logprobs
            if body.echo:
                settings["prompt_logprobs"] = body.logprobs
        prompts = self._prompts
        if self._answering.parse_special:
            prompts = await self._answering.service.prepare(self._parsed)
        with called_as_fields():
            return await self._answering.ask(prompts, body.number, module=wanted, **settings)

    def _parsed(self) -> list[Prompt]:
        """The prompts, of which those that are texts are token ids in which special tokens are themselves."""
        tokenizer = self._answering.service.engine.tokenizer
        start = start_tokens(tokenizer)
        found: list[Prompt] = []
        for prompt in self._prompts:
            if isinstance(prompt, str) and prompt.strip():
                (ids,), _ = encode_marked(tokenizer, [prompt])
                found.append([*([] if ids[: len(start)] == start else start), *ids])
            else:
                found.append(prompt)
        return found

    def whole(self, answers: Sequence[Generation], asked: Asked) -> dict[str, Any]:
        answers = [self._told(answer) for answer in answers]
        return {
            **self._head(),
            "choices": [self._choice(number, answer, asked) for number, answer in enumerate(answers)],
            "usage": self._usage(answers),
            "growlm": about(answers[0]),
        }

    async def chunks(self, asked: Asked) -> AsyncGenerator[dict[str, Any], None]:
        body, answers = self._body, []
        places: dict[int, Places] = {}
        async for number, item in asked.items():
            if number not in places:
                places[number] = self._answering.spelling.begins()
                if body.echo:
                    text = self._prompt_text(asked, number)
                    places[number] = self._answering.spelling.begins(len(text))
                    said = None if body.logprobs is None else self._of_prompt(asked.requests[number], [])
                    yield self._chunk(number, text, logprobs=said)
            if isinstance(item, Generation):
                answers.append(self._told(item))
                chunk = self._chunk(number, "", answers[-1].finish_reason)
                chunk["choices"][0] |= body.ids_of(asked.requests[number], answers[-1])
                yield {**chunk, "growlm": about(item)}
            elif body.max_tokens != 0:
                said = None if body.logprobs is None else self._logprobs(item.logprobs, places[number])
                yield self._chunk(number, item.text, logprobs=said)
        if body.stream_options is not None and body.stream_options.include_usage:
            yield {**self._head(), "choices": [], "usage": self._usage(answers)}

    def _told(self, answer: Generation) -> Generation:
        """Without the token that is written where none is asked for."""
        if self._body.max_tokens != 0:
            return answer
        return replace(answer, text="", tokens=[], logprobs=[], finish_reason="length")

    def _head(self) -> dict[str, Any]:
        model = self._body.model or self._answering.names.store
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": model}

    def _chunk(self, number: int, text: str, reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head(), "choices": [choice]}

    def _usage(self, answers: Sequence[Generation]) -> dict[str, int]:
        """A prompt counts once, however many answers it has."""
        read = sum(answer.prompt_tokens for answer in answers) // self._body.number
        return usage_of(read, sum(len(answer.tokens) for answer in answers))

    def _choice(self, number: int, answer: Generation, asked: Asked) -> dict[str, Any]:
        body, said, written = self._body, None, answer.logprobs or []
        if body.logprobs is not None:
            said = self._of_prompt(asked.requests[number], written) if body.echo else self._logprobs(written)
        before = self._prompt_text(asked, number) if body.echo else ""
        own = {"growlm": about(answer)} if len(self._prompts) > 1 else {}  # each prompt may have another module
        ids = body.ids_of(asked.requests[number], answer)
        choice = {
            "index": number,
            "text": before + answer.text,
            "logprobs": said,
            "finish_reason": answer.finish_reason,
        }
        return {**choice, **ids, **own}

    def _of_prompt(self, request: Request, written: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Of a prompt, whose first token has nothing before it that it could be likely after, and of what follows."""
        said = self._logprobs([TokenLogprob(request.tokens[0], 0.0), *request.prompt_logprobs, *written])
        said["token_logprobs"][0] = said["top_logprobs"][0] = None
        return said

    def _prompt_text(self, asked: Asked, number: int) -> str:
        prompt = self._prompts[number // self._body.number]
        if isinstance(prompt, str):
            return prompt
        text: str = self._answering.service.engine.tokenizer.decode(asked.requests[number].tokens)
        return text

    def _logprobs(self, each: Sequence[TokenLogprob], places: Places | None = None) -> dict[str, Any]:
        """
        Args:
            places: where they begin; by default at the beginning of the text.
        """
        spelling, tokens = self._answering.spelling, [one.token for one in each]
        texts = spelling.texts(tokens)
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in each],
            "top_logprobs": [self._top(one, text) for one, text in zip(each, texts, strict=True)],
            "text_offset": (places or spelling.begins()).of(tokens),
        }

    def _top(self, one: TokenLogprob, text: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for other, (_, value) in zip(self._answering.spelling.texts([t for t, _ in one.top]), one.top, strict=True):
            found.setdefault(other, value)  # of several that read the same, such as parts of a character, the likeliest
        found.setdefault(text, one.logprob)
        return found


def _prompts(body: CompletionBody) -> list[Prompt]:
    """
    Raises:
        Refusal: there is none.
    """
    prompt: Any = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise Refusal(400, "prompt is empty; give a text, or token ids", "invalid_value", "prompt")
    return list(prompt)
