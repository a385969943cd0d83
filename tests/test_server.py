"""The server: clients of OpenAI's interface are told what the engine alone answers, and nothing is left behind."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from growlm.cli import main
from growlm.engine import Engine
from growlm.engine.chat import Chat
from growlm.errors import BudgetError, ConfigError
from growlm.server.keys import Keys
from growlm.server.service import Asked
from growlm.server.spelling import Spelling
from growlm.store import Store
from servers import Served, leaving, serving, wait_for
from stores import domain_text

SHAPES = {
    "letters": {"kind": "lora", "r": 4},
    "digits": {"placement": "interleaved", "vocabulary": "both"},
    "signs": {"kind": "lora+recall", "r": 4},
}
DIGITS = domain_text("digits", 7)
GREEDY = {"temperature": 0, "max_tokens": 8}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def alone(made) -> Iterator[Engine]:
    """The same store, asked directly."""
    with Engine(Store.open(made)) as engine:
        yield engine


# Completions


@pytest.mark.parametrize(
    ("model", "module"),
    [
        ("digits", "digits"),
        ("store:signs", "signs"),
        ("base", None),
        ("auto", "auto"),
        ("store", "auto"),
        (None, "auto"),
    ],
)
def test_a_completion_is_what_the_engine_writes_under_the_module_that_is_named(served, alone, model, module):
    wanted = alone.generate(DIGITS, module=module, max_new_tokens=8)
    response = served.post("/v1/completions", prompt=DIGITS, **GREEDY, **({"model": model} if model else {}))
    found = response.json()
    (choice,) = found["choices"]
    assert choice == {"index": 0, "text": wanted.text, "logprobs": None, "finish_reason": wanted.finish_reason}
    assert found["usage"] == {
        "prompt_tokens": wanted.prompt_tokens, "completion_tokens": len(wanted.tokens),
        "total_tokens": wanted.prompt_tokens + len(wanted.tokens),
    }  # fmt: skip
    assert found["growlm"]["module"] == wanted.module
    assert found["growlm"]["scores"] == pytest.approx(wanted.scores)
    assert response.headers["x-growlm-module"] == (wanted.module or "base")


def test_prompts_are_texts_or_ids_one_or_several(served, alone):
    texts = [DIGITS, domain_text("letters", 3)]
    ids = [alone.tokens_of(text) for text in texts]
    wanted = [alone.generate(text, module="signs", max_new_tokens=8).text for text in texts]
    for prompt in (texts, ids):
        found = served.post("/v1/completions", prompt=prompt, model="signs", **GREEDY).json()
        assert [choice["text"] for choice in found["choices"]] == wanted
        assert [choice["index"] for choice in found["choices"]] == [0, 1]
    for prompt in (texts[0], ids[0]):
        found = served.post("/v1/completions", prompt=prompt, model="signs", **GREEDY).json()
        assert [choice["text"] for choice in found["choices"]] == wanted[:1]


def test_several_answers_are_drawn_with_the_seeds_that_follow(served, alone):
    drawn = {"temperature": 1.5, "seed": 5}
    wanted = [answer.text for answer in alone.choices(DIGITS, 3, module="digits", max_new_tokens=8, **drawn)]
    body = {"prompt": [DIGITS, "abc"], "model": "digits", "n": 3, "max_tokens": 8, **drawn}
    found = served.post("/v1/completions", **body).json()
    assert [choice["text"] for choice in found["choices"]][:3] == wanted
    assert len(found["choices"]) == 6
    assert found["usage"]["prompt_tokens"] == len(alone.tokens_of(DIGITS)) + len(alone.tokens_of("abc"))
    texts = [""] * 6
    for chunk in served.events("/v1/completions", **body):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in found["choices"]]


def test_log_probabilities_are_the_engines(served, alone):
    wanted = alone.generate(DIGITS, module="digits", max_new_tokens=4, logprobs=2, prompt_logprobs=2)
    body = {"prompt": DIGITS, "model": "digits", "temperature": 0, "max_tokens": 4, "logprobs": 2}
    said = served.post("/v1/completions", **body).json()["choices"][0]["logprobs"]
    assert said["token_logprobs"] == pytest.approx([one.logprob for one in wanted.logprobs], abs=1e-4)
    for top, token, one in zip(said["top_logprobs"], said["tokens"], wanted.logprobs, strict=True):
        assert max(top.values()) == pytest.approx(one.top[0][1], abs=1e-4)
        assert token in top
    echoed = served.post("/v1/completions", **body, echo=True).json()["choices"][0]
    assert echoed["text"].startswith(DIGITS)
    assert echoed["logprobs"]["token_logprobs"][0] is None
    both = [*wanted.prompt_logprobs, *wanted.logprobs]
    assert echoed["logprobs"]["token_logprobs"][1:] == pytest.approx([one.logprob for one in both], abs=1e-4)
    nothing = served.post("/v1/completions", **{**body, "max_tokens": 0}, echo=True).json()
    assert nothing["choices"][0]["text"] == DIGITS
    assert nothing["usage"]["completion_tokens"] == 0
    assert len(nothing["choices"][0]["logprobs"]["tokens"]) == nothing["usage"]["prompt_tokens"]
    chunks = served.events("/v1/completions", **{**body, "max_tokens": 0}, echo=True, return_token_ids=True)
    last = chunks[-1]["choices"][0]
    assert (last["finish_reason"], last["token_ids"]) == ("length", [])
    chunks = served.events("/v1/completions", **body, echo=True)
    streamed = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert [p for one in streamed for p in one["token_logprobs"]][1:] == pytest.approx(
        echoed["logprobs"]["token_logprobs"][1:], abs=1e-4
    )
    stopped = {**body, "max_tokens": 12, "stop": alone.generate(DIGITS, module="digits", max_new_tokens=12).text[4:8]}
    whole = served.post("/v1/completions", **stopped).json()["choices"][0]["logprobs"]["tokens"]
    chunks = served.events("/v1/completions", **stopped)
    assert [t for c in chunks for t in (c["choices"][0]["logprobs"] or {"tokens": []})["tokens"]] == whole
    # In a stream they come piece by piece.
    chunks = served.events("/v1/completions", **body)
    streamed = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert [p for one in streamed for p in one["token_logprobs"]] == pytest.approx(said["token_logprobs"], abs=1e-4)


def test_special_tokens_in_a_prompt_are_letters_unless_the_server_is_told_otherwise(served, made, alone):
    end = alone.tokenizer.eos_token
    asked = {"prompt": f"ab{end}cd", "model": "base", "max_tokens": 1, "return_token_ids": True}

    def ids(server: Served) -> list[int]:
        found = server.post("/v1/completions", **asked).json()["choices"][0]["prompt_token_ids"]
        return list(found)

    assert alone.tokenizer.eos_token_id not in ids(served)
    with serving(made, parse_special=True) as other:
        assert ids(other).count(alone.tokenizer.eos_token_id) == 1
        asked["prompt"] = "plain"
        assert ids(other) == ids(served)
        asked["prompt"] = ""
        assert other.post("/v1/completions", **asked).status_code == 400


# Chat


def test_a_turn_is_answered_as_in_a_chat_with_the_engine(served, alone):
    talk = Chat(alone, max_new_tokens=8)
    for text in (DIGITS, domain_text("digits", 8)):
        *_, wanted = talk.say(text)
        told = talk.messages[:-1]
        found = served.post("/v1/chat/completions", messages=told, **GREEDY).json()
        assert found["choices"][0]["message"]["content"] == wanted.text
        assert found["choices"][0]["finish_reason"] == wanted.finish_reason
        assert found["growlm"]["module"] == wanted.module == "digits"
        assert found["growlm"]["scores"] == pytest.approx(wanted.scores)


def test_content_may_come_in_parts(served):
    parts = [{"type": "text", "text": DIGITS}]
    one, other = (
        served.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **GREEDY).json()
        for content in (DIGITS, parts)
    )
    assert one["choices"] == other["choices"]


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_has_one_reason_at_its_end_and_usage_where_it_is_asked_for(served, usage):
    body = {"messages": [{"role": "user", "content": DIGITS}], **GREEDY}
    whole = served.post("/v1/chat/completions", **body).json()
    chunks = served.events(
        "/v1/chat/completions", **body, **({"stream_options": {"include_usage": True}} if usage else {})
    )
    if usage:
        *chunks, last = chunks
        assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in chunks)
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["growlm"] == {**whole["growlm"], "loaded": []}


def test_a_stop_text_is_never_half_sent(served, alone):
    text = alone.generate(DIGITS, module="digits", max_new_tokens=12).text
    stop = text[4:8]
    chunks = served.events(
        "/v1/completions", prompt=DIGITS, model="digits", temperature=0, max_tokens=12, stop=["nowhere", stop]
    )
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(pieces) == text[: text.index(stop)]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


# Clients


def test_openais_own_client_finds_what_it_expects(served, alone):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        assert {model.id for model in client.models.list()} == {"auto", "base", *SHAPES}
        assert client.models.retrieve("digits").id == "digits"
        messages: Any = [{"role": "user", "content": DIGITS}]
        whole = client.chat.completions.create(model="auto", messages=messages, **GREEDY)
        stream = client.chat.completions.create(model="auto", messages=messages, stream=True, **GREEDY)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == whole.choices[0].message.content
        wanted = alone.generate("abc", module="letters", max_new_tokens=8).text
        assert client.completions.create(model="letters", prompt="abc", **GREEDY).choices[0].text == wanted
        with pytest.raises(
            openai.NotFoundError, match="no model 'nobody'; there are auto, base, digits, letters, signs"
        ):
            client.chat.completions.create(model="nobody", messages=messages)
        with pytest.raises(openai.BadRequestError, match="temperature is -1"):
            client.chat.completions.create(model="auto", messages=messages, temperature=-1)


# Bad input


TOOLS = [{"type": "function", "function": {"name": "rent"}}]
ASK = {"prompt": "abc", "max_tokens": 2}
SAY = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("path", "body", "status", "message", "param"),
    [
        ("completions", {**ASK, "model": "nobody"}, 404, "no model 'nobody'", "model"),
        ("completions", {**ASK, "model": "no/../such \x7f"}, 404, "no model 'no/../such", "model"),
        ("completions", {"max_tokens": 2}, 400, "prompt: Field required", "prompt"),
        ("completions", {**ASK, "prompt": []}, 400, "prompt is empty", "prompt"),
        ("completions", {**ASK, "prompt": ""}, 400, "empty", None),
        ("completions", {**ASK, "prompt": [1 << 40]}, 400, "", None),
        ("completions", {**ASK, "temperature": "hot"}, 400, "temperature is 'hot'", "temperature"),
        ("completions", {**ASK, "top_p": 7}, 400, "top_p is 7", None),
        ("completions", {**ASK, "n": 0}, 400, "n is 0", "n"),
        ("completions", {**ASK, "n": -1000}, 400, "n is -1000", "n"),
        ("completions", {**ASK, "stop": ["a"] * 17}, 400, "stop: at most 16", "stop"),
        ("completions", {**ASK, "stop": "a" * 257}, 400, "stop: at most 16", "stop"),
        ("completions", {**ASK, "regex": "a" * 70000}, 400, "regex is", "regex"),
        ("responses", {"input": "a", "text": {"format": "x"}}, 400, "text: its format", "text"),
        ("responses", {"input": "a", "n": 2}, 400, "n: this form has one answer", "n"),
        ("completions", {**ASK, "logprobs": 21}, 400, "logprobs is 21", "logprobs"),
        ("completions", {**ASK, "max_tokens": 0}, 400, "max_tokens is 0", "max_tokens"),
        ("completions", {**ASK, "max_tokens": 10**6}, 400, "and 1000000 new ones exceed the 256 ", None),
        ("completions", {**ASK, "suffix": "x"}, 400, "suffix: ", "suffix"),
        ("completions", {**ASK, "response_format": {"type": "x"}}, 400, "response_format: expected", "response_format"),
        ("completions", {**ASK, "prompt": ["a"] * 500}, 400, "500 answers in one request", None),
        ("chat/completions", {"messages": []}, 400, "messages is []", "messages"),
        ("chat/completions", {"messages": [{"role": "judge", "content": "a"}]}, 400, "role is 'judge'", "messages"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "content is missing", "messages"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400, "type 'image_url'", "messages",
        ),
        ("chat/completions", {**SAY, "tools": [{"type": "function"}]}, 400, "knows functions alone", "tools"),
        ("chat/completions", {**SAY, "tools": [{"type": "x"}]}, 400, "tools[0] is of type 'x'", "tools"),
        ("chat/completions", {**SAY, "tools": TOOLS}, 400, "has no place for tools", "tools"),
        ("chat/completions", {**SAY, "tool_choice": "required"}, 400, "tool_choice: ", "tool_choice"),
        ("chat/completions", {**SAY, "functions": [{"name": "x"}]}, 400, "functions: ", "functions"),
        ("chat/completions", {**SAY, "top_logprobs": 2}, 400, "top_logprobs needs", "top_logprobs"),
        ("chat/completions", {"messages": [{"role": "user", "content": "abc " * 400}]}, 400, "exceed the 256 ", None),
        ("nothing", {}, 404, "no such path", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_is_told_in_one_line_by_field(served, path, body, status, message, param, stream):
    response = served.post(f"/v1/{path}", **body, stream=stream)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    wait_for(served.idle)


def test_stream_options_are_for_streams(served):
    response = served.post("/v1/completions", **ASK, stream_options={"include_usage": True})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stream_options")


def test_a_body_that_is_no_json_and_a_wrong_method_are_told(served):
    headers = {"content-type": "application/json"}
    response = served.http.post("/v1/completions", content=b"{", headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    response = served.http.post("/v1/completions", content=b"[1]", headers=headers)
    assert response.status_code == 400
    response = served.http.get("/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


def test_fields_that_change_nothing_are_named_and_ignored(served):
    response = served.post("/v1/completions", **ASK, user="me", store=None, metadata={"a": "b"})
    assert response.status_code == 200
    assert response.headers["x-growlm-ignored"] == "metadata, user"
    response = served.post("/v1/completions", **ASK, **{"a\r\nX-Evil: 1": 1, "Ω": 1, "n" * 5000: 1})
    assert response.status_code == 200
    assert response.headers["x-growlm-ignored"].startswith("a??X-Evil: 1, nnn")
    assert "x-evil" not in response.headers


@pytest.mark.parametrize(
    ("path", "body", "ignored"),
    [
        ("completions", {**ASK, "best_of": 1, "suffix": ""}, None),
        ("responses", {"input": "abc", "return_token_ids": True, "model": "base"}, "return_token_ids"),
        ("messages", {**SAY, "model": "base", "max_tokens": 2, "return_token_ids": True, "stop": "x"},
         "return_token_ids, stop"),
    ],
)  # fmt: skip
def test_fields_that_a_form_does_not_honour_are_named(served, path, body, ignored):
    response = served.post(f"/v1/{path}", **body)
    assert response.status_code == 200, response.text
    assert (response.headers.get("x-growlm-ignored") or "").removeprefix("best_of, suffix") == (ignored or "")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        '{"input": "a", "model": "base", "text": {"format": {"type": "text"}, "x": NaN}}',
        '{"input": "a", "model": "base", "tool_choice": {"type": "auto", "x": -Infinity}}',
        '{"input": "a", "model": "base", "text": {"x": "\\ud800"}}',
        '{"input": "\\ud800 a", "model": "base"}',
    ],
)
def test_numbers_that_are_none_and_halves_of_characters_are_refused(served, body, stream):
    content = body[:-1] + f', "stream": {"true" if stream else "false"}' + "}"
    response = served.http.post("/v1/responses", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    whole = body.replace("\\ud800", "\\ud83d\\ude00").replace("NaN", "1").replace("-Infinity", "1")
    response = served.http.post("/v1/responses", content=whole, headers={"content-type": "application/json"})
    assert response.status_code == 200


def test_prompts_of_one_request_are_drawn_each_by_itself_and_each_names_its_module(served):
    body = {"prompt": ["abc", "abc", DIGITS], "model": "auto", "max_tokens": 8, "temperature": 2.0}
    drawn = [served.post("/v1/completions", **body).json()["choices"] for _ in range(4)]
    assert any(one[0]["text"] != one[1]["text"] for one in drawn)
    assert drawn[0][2]["growlm"]["module"] == "digits"
    same = [served.post("/v1/completions", **body, seed=3).json()["choices"] for _ in range(2)]
    assert [[c["text"] for c in one] for one in same] == [[c["text"] for c in same[0]]] * 2


def test_tokens_that_are_parts_of_a_character_have_their_bytes_and_its_place(served):
    prompt = "a\u00e9\u65e5b"
    body = {"prompt": prompt, "model": "base", "max_tokens": 1, "echo": True, "logprobs": 0, "temperature": 0}
    whole = served.post("/v1/completions", **body).json()["choices"][0]
    tokens = served.engine.tokens_of(prompt)
    assert len(tokens) > len(prompt)  # some are parts
    offsets = whole["logprobs"]["text_offset"][: len(tokens)]
    assert offsets == sorted(offsets)
    assert max(offsets) == len(prompt) - 1
    streamed = [
        offset
        for event in served.events("/v1/completions", **body)
        for choice in event["choices"]
        if choice["logprobs"]
        for offset in choice["logprobs"]["text_offset"]
    ]
    assert streamed == whole["logprobs"]["text_offset"]
    spelling = Spelling(served.engine.tokenizer)
    assert bytes(byte for token in tokens for byte in spelling.bytes_of(token)).decode() == prompt


def test_an_error_in_mid_stream_of_responses_is_an_event_of_its_own(served, monkeypatch):
    items = Asked.items

    async def broken(asked: Asked) -> Any:
        async for item in items(asked):
            yield item
            raise BudgetError("there is no room")

    monkeypatch.setattr(Asked, "items", broken)
    body = {"input": "abc", "model": "base", "max_output_tokens": 4, "stream": True}
    with served.http.stream("POST", "/v1/responses", json=body) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    assert events[-1] == {
        "type": "error", "sequence_number": len(events) - 1, "code": "memory_budget", "message": "there is no room",
        "param": None,
    }  # fmt: skip


# Bounds


def test_more_than_the_queue_holds_is_refused_and_the_rest_is_answered(made):
    with serving(made, engine={"max_batch": 1}, service={"max_queued": 1}) as served, served.engine._loop.stepping:
        found: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: found.append(served.post("/v1/completions", **ASK))) for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(found) == 3)
        assert {response.status_code for response in found} == {503}
        assert found[0].headers["retry-after"] == "1"
        served.engine._loop.stepping.give_back()
        try:
            for thread in threads:
                thread.join()
        finally:
            served.engine._loop.stepping.__enter__()
        assert sorted(response.status_code for response in found) == [200, 200, 503, 503, 503]


def test_those_who_are_refused_over_and_over_are_held_back(made):
    with serving(made, engine={"max_batch": 1}, service={"max_queued": 0}) as served:
        asked: list[httpx.Response] = []
        served.service._taken = 1  # all places

        def ask() -> None:
            asked.append(served.post("/v1/completions", **ASK))

        began, threads = time.monotonic(), [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {response.status_code for response in asked} == {503}
        assert time.monotonic() - began > 0.2  # of twelve, the last for 0.36 s
        served.service._taken = 0
        assert served.post("/v1/completions", **ASK).status_code == 200


def test_an_answer_that_takes_too_long_is_ended(made):
    with serving(made, service={"timeout": 0.2}) as served:
        with served.engine._loop.stepping:
            response = served.post("/v1/completions", **ASK)
        assert response.status_code == 504
        assert response.headers["x-should-retry"] == "false"
        wait_for(served.idle)
        served.service.timeout = 20  # a busy machine may not answer in 0.2 s
        assert served.post("/v1/completions", **ASK).status_code == 200


def test_a_budget_in_which_a_module_cannot_fit_is_told_and_not_tried_again(made):
    with Engine(Store.open(made), memory="1GB") as engine:
        least = engine.fixed_bytes + engine.workspace_bytes
    with serving(made, engine={"memory": least + 30_000}) as served:
        response = served.post("/v1/completions", **ASK, model="digits")
        assert response.status_code == 422, response.text
        assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("timeout", [None, 60])
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_client_leaves_is_written_no_further(made, stream, timeout):
    body = {"prompt": DIGITS, "model": "digits", "temperature": 0, "max_tokens": 200, "stream": stream}
    with serving(made, service={"timeout": timeout}) as served:
        served.engine._loop.writer.end_tokens = set()
        for number in range(30):
            seconds = 0.03 + 0.001 * number
            with served.http.stream("POST", "/v1/completions", json=body) if stream else nullcontext() as response:
                if response is not None:
                    next(response.iter_lines())
            with nullcontext() if stream else leaving(served, "/v1/completions", body, seconds):
                pass
        wait_for(served.idle)
        assert served.engine._loop.rooms.num_bytes() == 0
        assert "growlm_generation_tokens_total 0.0" in served.http.get("/metrics").text
        assert served.post("/v1/completions", **ASK).status_code == 200


class Broken(BaseException):
    """As an error of another language: no Exception."""


def test_a_step_that_fails_ends_its_own_requests_alone(made, monkeypatch, caplog):
    with serving(made) as served:
        writer = served.engine._loop.writer
        write = writer.write

        def broken(request: Any, logits: Any) -> bool:
            if "poison" in request.config.stop:
                raise Broken("poisoned")
            return write(request, logits)

        monkeypatch.setattr(writer, "write", broken)
        assert served.post("/v1/completions", **ASK, stop="poison").status_code == 500
        assert served.post("/v1/completions", **ASK).status_code == 200
        assert served.http.get("/health").status_code == 200
        assert "poisoned" in caplog.text


def test_an_engine_that_cannot_go_on_is_told_and_nobody_waits(made, monkeypatch):
    with serving(made) as served:

        def broken() -> bool:
            raise RuntimeError("no more")

        monkeypatch.setattr(served.engine, "step", broken)
        response = served.post("/v1/completions", **ASK)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
        assert served.http.get("/health").status_code == 500
        assert served.post("/v1/completions", **ASK).status_code == 500
        assert served.service._taken == 0


def test_an_error_inside_has_an_id_and_a_line_in_the_log(served, monkeypatch):
    def broken() -> list[Any]:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("growlm.server.names.Names.cards", lambda self: broken())
    response = served.http.get("/v1/models", headers={"X-Request-Id": "odd-1"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "odd-1")
    assert "oops" not in response.text
    wait_for(lambda: any(line["id"] == "odd-1" and line["status"] == 500 for line in lines_of(served)))


def test_the_header_names_who_is_known_to_write(served):
    body = {"prompt": [DIGITS, domain_text("letters", 3)], "max_tokens": 2}
    assert served.post("/v1/completions", **body).headers["x-growlm-module"] == "digits, letters"
    with served.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        assert "base" not in response.headers.get("x-growlm-module", "")


def test_a_salt_holds_for_the_router_too(served, monkeypatch):
    salts: list[str] = []
    put = served.engine._prefixes.put

    def noting(*arguments: Any, salt: str, **named: Any) -> Any:
        salts.append(salt)
        return put(*arguments, salt=salt, **named)

    monkeypatch.setattr(served.engine._prefixes, "put", noting)
    text = domain_text("digits", 77, words=40)
    wait_for(served.idle)
    salts.clear()
    served.post("/v1/chat/completions", messages=[{"role": "user", "content": text}], max_tokens=2, cache_salt="mine")
    wait_for(served.idle)
    assert set(salts) == {"\0mine"}


def test_an_error_in_mid_stream_is_an_event(served, monkeypatch):
    def broken(request: Any, logits: Any) -> None:
        if len(request.answer.tokens) >= 3:
            raise ConfigError("it broke")
        return write(request, logits)

    write = served.engine._loop.writer.write
    monkeypatch.setattr(served.engine._loop.writer, "write", broken)
    chunks = served.events("/v1/completions", prompt=DIGITS, model="digits", **GREEDY)
    assert chunks[-1]["error"]["message"] == "it broke"
    assert all(choice["finish_reason"] is None for chunk in chunks[:-1] for choice in chunk["choices"])


# The door


def test_keys_open_what_they_are_for(made, tmp_path):
    (tmp_path / "keys").write_text("# those of the team\nopen-sesame\n\nother\n")
    (tmp_path / "admin").write_text("root\n")
    keys, admin = Keys.read(tmp_path / "keys"), Keys.read(tmp_path / "admin")
    with serving(made, keys=keys, admin_keys=admin, max_body=2000) as served:

        def status(path: str, **headers: str) -> int:
            return served.http.get(path, headers=headers).status_code

        assert [status(path) for path in ("/health", "/ready", "/version")] == [200, 200, 200]
        for path in ("/v1/models", "/tokenizer_info", "/metrics", "/openapi.json"):
            assert status(path) == 401
            assert status(path, Authorization="Bearer wrong") == 401
        for key in ("open-sesame", "other"):
            assert status("/v1/models", Authorization=f"Bearer {key}") == 200
            assert status("/v1/models", **{"x-api-key": key}) == 200
            assert status("/metrics", Authorization=f"Bearer {key}") == 401
        assert status("/metrics", Authorization="Bearer root") == 200
        error = served.http.get("/v1/models").json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        # How large a body may be.
        headers = {"Authorization": "Bearer other"}
        long = {"prompt": "a" * 3000}
        assert served.http.post("/v1/completions", json=long, headers=headers).status_code == 413
        pieces = iter([b'{"prompt": "', *[b"a" * 500] * 6, b'"}'])
        assert served.http.post("/v1/completions", content=pieces, headers=headers).status_code == 413
    lines = [json.loads(line) for line in served.log.getvalue().splitlines()]
    assert {(line["path"], line["status"]) for line in lines} >= {("/metrics", 401), ("/metrics", 200)}
    assert "sesame" not in served.log.getvalue()


def test_a_request_keeps_its_id_and_has_a_line_in_the_log(served):
    response = served.http.post("/v1/completions", json=ASK, headers={"X-Request-Id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    found: list[Any] = []
    wait_for(lambda: found or found.extend(one for one in lines_of(served) if one["id"] == "mine-1"))
    assert (found[0]["method"], found[0]["path"], found[0]["status"]) == ("POST", "/v1/completions", 200)
    assert found[0]["module"] == response.headers["x-growlm-module"]
    assert len(served.http.get("/health").headers["x-request-id"]) == 32


def lines_of(served: Served) -> list[Any]:
    return [json.loads(line) for line in served.log.getvalue().splitlines()]


@pytest.mark.parametrize("content", [None, b"", b"# no key\n", b"\xff\n"])
def test_a_file_without_keys_is_refused(tmp_path, content):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        Keys.read(path)


def test_what_is_measured_is_told(served):
    served.post("/v1/completions", **ASK, model="digits")
    text = served.http.get("/metrics").text
    assert 'growlm_request_success_total{finished_reason="length"}' in text
    assert 'growlm_module_requests_total{module="digits"}' in text
    assert "growlm_time_to_first_token_seconds_count" in text
    assert f"growlm_resident_bytes {float(served.engine.resident_bytes)}" in text


def test_tokens_of_a_text_and_back(served, alone):
    ids = alone.tokenizer.encode(DIGITS)
    found = served.post("/tokenize", prompt=DIGITS).json()
    assert (found["tokens"], found["count"]) == (ids, len(ids))
    assert served.post("/detokenize", tokens=ids).json() == {"prompt": DIGITS}
    assert served.post("/tokenize", messages=SAY["messages"]).json()["count"] > 3
    assert served.post("/tokenize").status_code == 400
    assert served.post("/detokenize", tokens=[10**9]).status_code == 400
    assert served.post("/detokenize", tokens=[]).json() == {"prompt": ""}
    assert served.http.get("/tokenizer_info").json()["eos_token"] == alone.tokenizer.eos_token


def test_a_page_elsewhere_may_ask_where_it_is_allowed_to(made, served):
    asks = {"Origin": "https://page.test", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in served.http.options("/v1/completions", headers=asks).headers
    with serving(made, origins=["https://page.test"], keys=Keys(["key"])) as other:
        response = other.http.options("/v1/completions", headers=asks)
        assert response.headers["access-control-allow-origin"] == "https://page.test"


def test_a_server_that_stops_ends_what_is_asked(made):
    with serving(made) as served:
        asked: list[Any] = []
        thread = threading.Thread(
            target=lambda: asked.append(served.events("/v1/completions", prompt=DIGITS, temperature=0, max_tokens=100))
        )
        thread.start()
        wait_for(lambda: served.service.running_and_waiting() != (0, 0))
    thread.join()
    assert asked[0][-1]["choices"][0]["finish_reason"] in ("length", "stop")  # it was drained
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/health")


# The command


def serve(made: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "growlm", "serve", str(made), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard)


def heard() -> None:
    """Ctrl-C, though whoever runs the tests does so in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_the_command_serves_until_it_is_told_to_stop(made):
    with serve(made, "--port", "0", "--memory", "1GB") as process:
        assert process.stderr is not None
        told = next(line for line in process.stderr if line.startswith("serving"))
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1: 3 modules", told)
        assert found is not None, told
        link = re.match(r"page: (http://127\.0\.0\.1:\d+)/#key=(\S+), ", process.stderr.readline())
        assert link is not None
        headers = {"Authorization": f"Bearer {link[2]}"}
        assert httpx.get(f"{link[1]}/admin/jobs", headers=headers).json() == {"data": []}
        assert httpx.get(f"{link[1]}/admin/jobs").status_code == 401
        answer = httpx.post(f"http://127.0.0.1:{found[1]}/v1/completions", json=ASK, timeout=30)
        assert answer.status_code == 200
        with serve(made, "--port", found[1]) as other:
            assert other.communicate(timeout=60)[1].count("cannot listen at 127.0.0.1") == 1
        assert other.returncode == 1
        process.terminate()
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert [line["status"] for line in lines] == [200, 401, 200]


def test_a_second_interruption_cuts_short_what_is_answered_and_is_no_error(made):
    with serve(made, "--port", "0", "--no-access-log") as process:
        assert process.stderr is not None
        link = next(found for line in process.stderr if (found := re.match(r"page: (\S+)/#key=(\S+),", line)))
        body = {"prompt": "abc", "model": "base", "max_tokens": 200, "ignore_eos": True, "stream": True}
        headers = {"Authorization": f"Bearer {link[2]}"}
        with httpx.stream("POST", f"{link[1]}/v1/completions", json=body, headers=headers, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            told = process.stderr.readline()
            assert told == "1 answer to be ended first, in 30 s at the most; Ctrl-C ends it now\n"
            process.send_signal(signal.SIGINT)  # not before: two that come at once are one
            assert process.wait(timeout=30) == 130
        assert process.stderr.read() == "growlm: interrupted\n"


def test_an_answer_that_does_not_end_in_time_is_told_so_and_the_server_ends_well(made):
    with serve(made, "--port", "0", "--no-access-log", "--drain", "0") as process:
        assert process.stderr is not None
        link = next(found for line in process.stderr if (found := re.match(r"page: (\S+)/#key=(\S+),", line)))
        body = {"prompt": "abc", "model": "base", "max_tokens": 250, "logprobs": 20, "stream": True}
        headers = {"Authorization": f"Bearer {link[2]}"}
        with httpx.stream("POST", f"{link[1]}/v1/completions", json=body, headers=headers, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert process.wait(timeout=30) == 0
        assert "Traceback" not in process.stderr.read()
        if len(events) < 250:  # it was not through before
            assert events[-1]["error"]["code"] == "shutting_down"


def test_modules_that_the_budget_is_too_small_for_are_told_when_it_is_served(made):
    with Engine(Store.open(made), memory="1GB") as engine:
        sizes = {name: engine.modules.found(name).bytes for name in engine.store.modules}
        fixed = engine.fixed_bytes + engine.workspace_bytes
    with serve(made, "--port", "0", "--memory", str(fixed + min(sizes.values()) // 2)) as process:
        assert process.stderr is not None
        told = []
        for line in process.stderr:
            if line.startswith("page: "):
                break
            told.append(line)
        process.terminate()
    assert [name for name in sizes if any(f"{name} " in line and "raise --memory by" in line for line in told)] == list(
        sizes
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "99999"], "--port is 99999"),
        (["--host", "no.such.host.invalid"], "cannot listen at no.such.host.invalid"),
        (["--max-queued", "-1"], "--max-queued is -1"),
        (["--timeout", "-2"], "--timeout is -2"),
        (["--api-key-file", "nowhere"], "nowhere: No such file"),
        (["--max-body", "much"], "--max-body"),
        (["--max-batch", "0"], "--max-batch is 0"),
        (["--watch", "-1"], "--watch is -1"),
        (["--learn-from", "nowhere"], "--learn-from nowhere: is no folder"),
        (["--job-memory", "much"], "--job-memory"),
    ],
)
def test_options_that_cannot_be_are_told_before_anything_is_served(made, options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["serve", str(made), "--port", "0", *options])
    assert caught.value.code == 1
    told = capsys.readouterr().err.strip()
    assert message in told
    assert told.count("\n") == 0


# The harness


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("model", ["digits", "signs", "base"])
def test_the_harness_scores_over_http_what_it_scores_directly(served, made, model):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from growlm.evaluation.harness import HarnessModel

    there = LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions",
        model=model,
        tokenizer=str(made.parent / "base"),
        batch_size=2,
        max_length=200,
    )
    here = HarnessModel(str(made), module=model, max_length=200)
    pairs = [(domain_text(d, 990), " " + domain_text(d, n, words=2)) for d in ("digits", "signs") for n in range(3)]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    found, wanted = (each.loglikelihood(asked, disable_tqdm=True) for each in (there, here))
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], rel=1e-4, abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
