"""Responses and messages: what their own clients are told is what a chat with the engine says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from growlm.engine import Engine
from growlm.engine.chat import Chat
from growlm.server.keys import Keys
from growlm.store import Store
from servers import serving
from stores import domain_text

SHAPES = {"letters": {"kind": "lora", "r": 4}, "digits": {"placement": "interleaved", "vocabulary": "both"}}
DIGITS, MORE = domain_text("digits", 7), domain_text("digits", 8)
TURNS: Any = [{"role": "user", "content": DIGITS}]
GREEDY: Any = {"model": "auto", "max_tokens": 8, "extra_body": {"temperature": 0}}
ASKED: Any = {"model": "auto", "max_output_tokens": 8, "temperature": 0}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def said(made) -> list[Any]:
    """The answers of a chat of two turns."""
    with Engine(Store.open(made)) as engine:
        talk = Chat(engine, max_new_tokens=8)
        return [list(talk.say(text))[-1] for text in (DIGITS, MORE)]


@pytest.fixture
def claude(served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def gpt(served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_messages_are_answered_as_in_a_chat(claude, said):
    first = claude.messages.create(messages=TURNS, **GREEDY)
    assert first.content[0].text == said[0].text
    assert (first.stop_reason, first.stop_sequence) == ("max_tokens", None)
    assert (first.usage.input_tokens, first.usage.output_tokens) == (said[0].prompt_tokens, len(said[0].tokens))
    assert first.growlm["module"] == "digits"
    turns = [*TURNS, {"role": "assistant", "content": said[0].text}, {"role": "user", "content": MORE}]
    assert claude.messages.create(messages=turns, **GREEDY).content[0].text == said[1].text
    counted = claude.messages.count_tokens(model="auto", messages=turns)
    assert counted.input_tokens == said[1].prompt_tokens
    ruled = claude.messages.create(model="digits", system="Be brief.", max_tokens=1, messages=TURNS)
    assert ruled.usage.input_tokens > first.usage.input_tokens


def test_a_stream_of_messages_adds_up(claude, said):
    with claude.messages.stream(messages=TURNS, **GREEDY) as stream:
        text = "".join(stream.text_stream)
        whole = stream.get_final_message()
    assert text == whole.content[0].text == said[0].text
    assert whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == len(said[0].tokens)


def test_a_stop_sequence_is_named(claude, said):
    stop = said[0].text[3:5]
    found = claude.messages.create(messages=TURNS, stop_sequences=["no", stop], **GREEDY)
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", stop)
    assert found.content[0].text == said[0].text[: said[0].text.index(stop)]


def test_responses_are_answered_as_in_a_chat(gpt, said):
    first = gpt.responses.create(input=DIGITS, **ASKED)
    assert first.output_text == said[0].text
    assert (first.status, first.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (first.usage.input_tokens, first.usage.output_tokens) == (said[0].prompt_tokens, len(said[0].tokens))
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": DIGITS}]},
        *(item.model_dump() for item in first.output),  # as clients send back what they were given
        {"role": "user", "content": MORE},
    ]
    assert gpt.responses.create(input=turns, **ASKED).output_text == said[1].text
    ruled = gpt.responses.create(model="digits", instructions="Be brief.", input=DIGITS, max_output_tokens=1)
    assert ruled.usage.input_tokens > first.usage.input_tokens


def test_a_stream_of_responses_adds_up(gpt, said):
    events = list(gpt.responses.create(input=DIGITS, stream=True, **ASKED))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert "".join(event.delta for event in events[4:-4]) == events[-1].response.output_text == said[0].text
    stop = said[0].text[3:5]
    with gpt.responses.stream(input=DIGITS, **ASKED, extra_body={"stop": stop}) as stream:
        assert stream.get_final_response().output_text == said[0].text[: said[0].text.index(stop)]


def test_each_form_has_its_own_errors(served, claude, gpt):
    with pytest.raises(anthropic.NotFoundError, match="no model 'nobody'") as missing:
        claude.messages.create(model="nobody", max_tokens=8, messages=TURNS)
    assert missing.value.response.json()["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="the last one must be the user's"):
        claude.messages.create(model="auto", max_tokens=8, messages=[*TURNS, {"role": "assistant", "content": "a"}])
    with pytest.raises(anthropic.BadRequestError, match="has no place for tools"):
        claude.messages.create(model="auto", max_tokens=8, messages=TURNS, tools=[{"name": "a", "input_schema": {}}])
    assert served.post("/v1/messages", model="auto", messages=TURNS).json()["error"]["message"].startswith("max_tokens")
    with pytest.raises(openai.BadRequestError, match="no answer is kept here"):
        gpt.responses.create(model="auto", input=DIGITS, previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError, match="no model 'nobody'"):
        gpt.responses.create(model="nobody", input=DIGITS)


def test_an_error_in_mid_stream_is_an_event_of_its_form(served, monkeypatch):
    def broken(request: Any, logits: Any) -> bool:
        if len(request.answer.tokens) >= 3:
            raise RuntimeError("it broke")
        return write(request, logits)

    write = served.engine._loop.writer.write
    monkeypatch.setattr(served.engine._loop.writer, "write", broken)
    body = {"messages": TURNS, "max_tokens": 8, "stream": True}
    with served.http.stream("POST", "/v1/messages", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-2] == "event: error"
    told = json.loads(lines[-1].removeprefix("data: "))
    assert told == {"type": "error", "error": {"type": "api_error", "message": told["error"]["message"]}}
    assert "it broke" not in told["error"]["message"]


def test_a_key_is_asked_for_in_each_form(made):
    with serving(made, keys=Keys(["right"])) as served:
        for key, right in (("wrong", False), ("right", True)):
            with anthropic.Anthropic(base_url=served.url, api_key=key, max_retries=0) as client:
                if right:
                    assert client.messages.create(model="auto", max_tokens=1, messages=TURNS).content
                else:
                    with pytest.raises(anthropic.AuthenticationError):
                        client.messages.create(model="auto", max_tokens=1, messages=TURNS)
