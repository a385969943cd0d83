"""Tools: what a client lets the model call stands in its prompt, and calls in answers are told as such."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import anthropic
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


def test_anthropics_client_is_told_of_calls_and_tells_what_they_gave(served):
    client = anthropic.Anthropic(base_url=served.url, api_key="none")
    tool = {"name": "rent", "description": "What a room costs.", "input_schema": RENT["function"]["parameters"]}
    asked: dict[str, Any] = {"model": "base", "messages": ASKED, "tools": [tool], "max_tokens": 200}
    whole = client.messages.create(**asked, extra_body={"regex": CALLS})
    (block,) = whole.content
    assert (whole.stop_reason, block.type, block.name, block.input) == ("tool_use", "tool_use", "rent", {"room": 7})
    with client.messages.stream(**asked, extra_body={"regex": f"He asks\\. {CALLS}{CALLS}"}) as stream:
        streamed = stream.get_final_message()
    assert [(one.type, getattr(one, "input", None)) for one in streamed.content] == [
        ("text", None), ("tool_use", {"room": 7}), ("tool_use", {"room": 7})
    ]  # fmt: skip
    assert (streamed.content[0].text, streamed.stop_reason) == ("He asks. ", "tool_use")
    with client.messages.stream(**asked, extra_body={"regex": "plain"}) as stream:
        plain = stream.get_final_message()
    assert [one.text for one in plain.content] == ["plain"]
    assert plain.stop_reason != "tool_use"
    # What was called and what it gave stand in the prompt as in the other forms.
    given = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "49"}]}
    more = [*ASKED, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [given]}]
    counted = client.messages.count_tokens(model="base", messages=more, tools=[tool]).input_tokens
    assert counted == len(served.engine.tokens_of(_of_chat(served)))


def _of_chat(served: Served) -> list[int]:
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "rent", "arguments": {"room": 7}}}]}
    body = {"messages": [*ASKED, called, {"role": "tool", "content": "49"}], "tools": [RENT], "model": "base"}
    choice = served.post("/v1/chat/completions", **body, max_tokens=1, return_token_ids=True).json()["choices"][0]
    return list(choice["prompt_token_ids"])


def test_openais_newer_form_tells_calls_and_reads_what_they_gave(served):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    tool = {"type": "function", "name": "rent", **{n: RENT["function"][n] for n in ("description", "parameters")}}
    asked: dict[str, Any] = {"model": "base", "input": ASKED, "tools": [tool], "temperature": 0}
    whole = client.responses.create(**asked, max_output_tokens=200, extra_body={"regex": CALLS})
    (call,) = whole.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "rent", {"room": 7})
    events = list(
        client.responses.create(
            **asked, max_output_tokens=200, stream=True, extra_body={"regex": f"He asks\\. {CALLS}{CALLS}"}
        )
    )
    last = events[-1].response
    assert [one.type for one in last.output] == ["message", "function_call", "function_call"]
    assert last.output_text == "He asks. "
    assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == "He asks. "
    done = [one for one in events if one.type == "response.function_call_arguments.done"]
    assert [(one.output_index, one.arguments) for one in done] == [(1, '{"room": 7}'), (2, '{"room": 7}')]
    assert [one.sequence_number for one in events] == list(range(len(events)))
    given = {"type": "function_call_output", "call_id": call.call_id, "output": "49"}
    again = client.responses.create(**{**asked, "input": [*ASKED, call, given]}, max_output_tokens=1)
    assert again.usage.input_tokens == len(_of_chat(served))


def _both_ways(first: str, second: str) -> dict[str, dict[str, Any]]:
    """A conversation in which two calls are answered, by the ids that are named, in each form."""
    calls = [{"id": name, "function": {"name": "rent", "arguments": {"room": n}}} for n, name in enumerate("ab", 1)]
    chat = [{"role": "tool", "tool_call_id": one, "content": f"cost of {one}"} for one in (first, second)]
    used = [{"type": "tool_use", "id": name, "name": "rent", "input": {"room": n}} for n, name in enumerate("ab", 1)]
    given = [{"type": "tool_result", "tool_use_id": one, "content": f"cost of {one}"} for one in (first, second)]
    named = [{"type": "function_call", "call_id": c["id"], "name": "rent", "arguments": '{"room": 1}'} for c in calls]
    outputs = [{"type": "function_call_output", "call_id": one, "output": f"cost of {one}"} for one in (first, second)]
    return {
        "chat/completions": {"messages": [*ASKED, {"role": "assistant", "tool_calls": calls}, *chat]},
        "messages": {"messages": [*ASKED, {"role": "assistant", "content": used}, {"role": "user", "content": given}]},
        "responses": {"input": [*ASKED, *named, *outputs]},
    }


@pytest.mark.parametrize("path", ["chat/completions", "messages", "responses"])
def test_what_tools_gave_stands_in_the_order_of_their_calls(served, monkeypatch, path):
    read: list[str] = []
    tokens_of = served.engine._prompts.encode

    def seen(prompt: Any, *arguments: Any, **named: Any) -> Any:
        tokens = tokens_of(prompt, *arguments, **named)
        read.append(served.engine.tokenizer.decode(tokens))
        return tokens

    monkeypatch.setattr(served.engine._prompts, "encode", seen)
    sized = {"max_output_tokens": 1} if path == "responses" else {"max_tokens": 1}
    for order in (("a", "b"), ("b", "a")):
        response = served.post(f"/v1/{path}", **_both_ways(*order)[path], model="base", **sized)
        assert response.status_code == 200, response.text
        assert read[-1].index("cost of a") < read[-1].index("cost of b")
    wrong = served.post(f"/v1/{path}", **_both_ways("a", "c")[path], model="base", **sized)
    assert (wrong.status_code, "the call 'c', which the turn before has not made" in wrong.text) == (400, True)


def test_a_tool_that_failed_is_told_as_such(served):
    body = _both_ways("a", "b")["messages"]
    counted = [served.post("/v1/messages/count_tokens", **body, model="base").json()["input_tokens"] for _ in range(1)]
    body["messages"][-1]["content"][0]["is_error"] = True
    counted.append(served.post("/v1/messages/count_tokens", **body, model="base").json()["input_tokens"])
    assert counted[1] - counted[0] == len(served.engine.tokens_of("Error: "))


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("messages", {"messages": ASKED, "tools": [{"name": "a b"}]}, "tools: "),
        ("messages", {"messages": ASKED, "tools": [{"name": "a", "type": "web_search_1"}]}, "functions alone"),
        ("messages", {"messages": ASKED, "tool_choice": {"type": "any"}}, "tool_choice: "),
        ("responses", {"input": "a", "tools": [{"type": "web_search"}]}, "tools[0] is of type 'web_search'"),
        ("responses", {"input": "a", "tools": [{"type": "function"}]}, "tools: "),
        ("responses", {"input": [{"type": "reasoning"}]}, "input[0] is of type 'reasoning'"),
        ("responses", {"input": [{"type": "function_call", "name": "a", "arguments": "x"}]}, "no JSON object"),
    ],
)
def test_tools_that_cannot_be_are_told_in_each_form(served, path, body, told):
    refused = served.post(f"/v1/{path}", model="base", **({"max_tokens": 2} if path == "messages" else {}), **body)
    assert refused.status_code == 400
    assert told in refused.json()["error"]["message"]


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


@pytest.mark.parametrize("arguments", ["{", "[1]", "7", "[" * 100_000, '{"a": NaN}', '{"a": "\\ud800"}'])
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
        ('So: <tool_call>{"name": "a", "arguments": {"b": 1}}', "So: ", [Call("a", {"b": 1})]),
        ('<tool_call>[{"name": "a", "arguments": {}}, {"name": "c", "parameters": {}}]</tool_call>', "",
         [Call("a", {}), Call("c", {})]),
        ('{"name": "a", "parameters": {"b": [1]}}', "", [Call("a", {"b": [1]})]),
        ("<tool_call>broken</tool_call>", "<tool_call>broken</tool_call>", []),
        ('{"name": "a"}', '{"name": "a"}', []),
        ('{"no": "call"}', '{"no": "call"}', []),
        ("<tool_call>7</tool_call>", "<tool_call>7</tool_call>", []),
        ("[" * 5000, "[" * 5000, []),
        ('{"name": "Bob", "parameters": {"age": 7}}', '{"name": "Bob", "parameters": {"age": 7}}', []),
        ('So: <tool_call>{"name": "b", "arguments": {}}', 'So: <tool_call>{"name": "b", "arguments": {}}', []),
        ('{"name": ["a"], "arguments": {}}', '{"name": ["a"], "arguments": {}}', []),
        ('{"name": "a", "arguments": {"b": NaN}}', '{"name": "a", "arguments": {"b": NaN}}', []),
        ('{"name": "a", "arguments": {"b": "\\ud800"}}', '{"name": "a", "arguments": {"b": "\\ud800"}}', []),
    ],
)  # fmt: skip
def test_calls_are_found_and_all_else_is_text(text, said, calls):
    assert calls_in(text, {"a", "c"}) == (said, calls)


@given(
    st.lists(
        st.sampled_from(["<tool", "_call>", "</tool_call>", '{"name": "a", ', '"arguments": {}}', "text ", "<", " "])
    ),
    st.lists(st.integers(0, 120)),
)
def test_a_stream_says_what_the_whole_says_however_it_is_cut(parts, cuts):
    text = "".join(parts)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    held = Held({"a"})
    sent = "".join(held.add(text[start:end]) for start, end in itertools.pairwise(edges))
    rest, calls = held.end()
    whole, expected = calls_in(text, {"a"})
    assert calls == expected
    assert sent + rest == whole
