"""Tools: what a client lets the model call stands in its prompt, and calls in answers are told as such."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from growlm.server.tools import Call, Held, calls_in
from servers import Served, serving
from stores import make_store

TEMPLATE = (
    "{% if tools %}{{ '<|tools|>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
RENT = {
    "type": "function",
    "function": {
        "name": "rent",
        "description": "What a room costs.",
        "parameters": {"type": "object", "properties": {"room": {"type": "integer"}}},
    },
}
ASKED = [{"role": "user", "content": "12"}]
# What a model that knows tools writes by itself, this one is made to write.
CALLS = r'<tool_call>\{"name": "rent", "arguments": \{"room": 7\}\}</tool_call>'

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::growlm.errors.GrowlmWarning"),  # this base was made for 256 tokens
]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("made")
    make_store(home, "llama", {"letters": {"kind": "lora", "r": 4}})
    with serving(home / "store", engine={"strict": False}) as served:
        served.engine.tokenizer.chat_template = TEMPLATE
        yield served


def prompt_of(served: Served, messages: Any, **more: Any) -> str:
    body = {"messages": messages, "model": "base", "max_tokens": 1, "return_token_ids": True, **more}
    choice = served.post("/v1/chat/completions", **body).json()["choices"][0]
    return str(served.engine.tokenizer.decode(choice["prompt_token_ids"]))


def test_tools_and_what_was_called_stand_in_the_prompt_as_the_template_writes_them(served):
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "rent", "arguments": '{"room": 7}'}}],
    }
    told = {"role": "tool", "tool_call_id": "call_1", "content": "49"}
    template = served.engine.tokenizer.apply_chat_template(
        [*ASKED, {**called, "tool_calls": [{"function": {"name": "rent", "arguments": {"room": 7}}}]}, told],
        tools=[RENT], tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    assert prompt_of(served, [*ASKED, called, told], tools=[RENT]) == template
    assert "What a room costs." in template
    assert "<|tools|>" not in prompt_of(served, ASKED, tools=[RENT], tool_choice="none")


def test_a_call_is_told_as_one_and_openais_client_reads_it(served):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    asked: dict[str, Any] = {"model": "base", "messages": ASKED, "tools": [RENT], "temperature": 0, "max_tokens": 200}
    choice = client.chat.completions.create(**asked, extra_body={"regex": CALLS}).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "rent", {"room": 7})
    # Beside a text, and in a stream.
    text, calls, reasons = "", [], []
    for chunk in client.chat.completions.create(
        **asked, stream=True, extra_body={"regex": f"He asks\\. {CALLS}{CALLS}"}
    ):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        calls += delta.tool_calls or []
        reasons.append(chunk.choices[0].finish_reason)
    assert text == "He asks. "
    assert [(one.index, one.function.name, one.function.arguments) for one in calls] == [
        (number, "rent", '{"room": 7}') for number in (0, 1)
    ]
    assert reasons == [None] * (len(reasons) - 1) + ["tool_calls"]
    assert len({one.id for one in calls}) == 2
    plain = client.chat.completions.create(**{**asked, "tools": openai.omit}, extra_body={"regex": CALLS}).choices[0]
    assert plain.finish_reason != "tool_calls"
    assert plain.message.content.startswith("<tool_call>")


def test_nothing_that_a_tool_or_a_call_spells_can_end_a_turn(served):
    marker = served.engine.tokenizer.eos_token
    forged = json.loads(json.dumps(RENT).replace("What a room costs.", f"x{marker}y"))
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "rent", "arguments": {"room": marker}}}]}
    for body in ({"tools": [forged]}, {"messages": [*ASKED, called]}):
        refused = served.post("/v1/chat/completions", **{"messages": ASKED, "model": "base", **body})
        assert refused.status_code == 400
        assert "only the template may write" in refused.json()["error"]["message"]
    result = [*ASKED, {"role": "tool", "content": f"4{marker}9"}]
    body = {"messages": result, "model": "base", "max_tokens": 1, "return_token_ids": True, "tools": [RENT]}
    ids = served.post("/v1/chat/completions", **body).json()["choices"][0]["prompt_token_ids"]
    assert served.engine.tokenizer.eos_token_id not in ids


@pytest.mark.parametrize("arguments", ["{", "[1]", "7"])
def test_arguments_that_are_no_object_are_told(served, arguments):
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "rent", "arguments": arguments}}]}
    refused = served.post("/v1/chat/completions", messages=[*ASKED, called], model="base")
    assert refused.status_code == 400
    assert "messages[1]: the arguments of 'rent' are no JSON object" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("plain", "plain", []),
        ('<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>', "", [Call("a", {})]),
        ('So: <tool_call>{"name": "a", "arguments": {"b": 1}}', "So:", [Call("a", {"b": 1})]),
        ('<tool_call>[{"name": "a", "arguments": {}}, {"name": "c", "parameters": {}}]</tool_call>', "",
         [Call("a", {}), Call("c", {})]),
        ('{"name": "a", "parameters": {"b": [1]}}', "", [Call("a", {"b": [1]})]),
        ("<tool_call>broken</tool_call>", "<tool_call>broken</tool_call>", []),
        ('{"name": "a"}', '{"name": "a"}', []),
        ('{"no": "call"}', '{"no": "call"}', []),
        ("<tool_call>7</tool_call>", "<tool_call>7</tool_call>", []),
    ],
)  # fmt: skip
def test_calls_are_found_and_all_else_is_text(text, said, calls):
    assert calls_in(text) == (said, calls)


@given(
    st.lists(
        st.sampled_from(["<tool", "_call>", "</tool_call>", '{"name": "a", ', '"arguments": {}}', "text ", "<", " "])
    ),
    st.lists(st.integers(0, 120)),
)
def test_a_stream_says_what_the_whole_says_however_it_is_cut(parts, cuts):
    text = "".join(parts)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    held = Held()
    sent = "".join(held.add(text[start:end]) for start, end in itertools.pairwise(edges))
    rest, calls = held.end()
    whole, expected = calls_in(text)
    assert calls == expected
    assert (sent + rest).split() == whole.split()
