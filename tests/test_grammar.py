"""Grammars: an answer has the form that was asked for, whatever the model would rather say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from growlm.engine import Engine
from growlm.errors import ConfigError, DataError
from growlm.store import Store
from stores import domain_text, make_store

pytestmark = pytest.mark.usefixtures("one_thread")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("made")
    make_store(home, "llama", {"letters": {"kind": "lora", "r": 4}})
    return home


@pytest.fixture
def engine(made):
    with Engine(Store.open(made / "store")) as opened:
        yield opened


@pytest.mark.parametrize("name", [None, "letters"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 3}], ids=str)
def test_an_answer_is_json_of_the_schema(engine, name, sampling):
    answer = engine.generate("abc de", module=name, json_schema=PERSON, max_new_tokens=80, **sampling)
    found = json.loads(answer.text)
    assert list(found) == ["name", "age"]
    assert len(found["name"]) <= 5
    assert 0 <= found["age"] <= 99
    assert answer.finish_reason == "stop"
    assert (
        engine.generate("abc de", module=name, json_schema=json.dumps(PERSON), max_new_tokens=80, **sampling).text
        == answer.text
    )


def test_an_answer_matches_the_expression_and_ends_with_it(engine):
    answer = engine.generate("abc", module="letters", regex=r"[0-9]{3}-(yes|no)", temperature=2.0, max_new_tokens=30)
    assert re.fullmatch(r"[0-9]{3}-(yes|no)", answer.text)
    assert answer.finish_reason == "stop"


def test_an_answer_is_a_sentence_of_the_grammar(engine):
    grammar = 'start: item ("," item)* "."\nitem: /[a-c]{2}/'
    answer = engine.generate("abc", module="letters", grammar=grammar, temperature=1.0, max_new_tokens=60)
    assert re.fullmatch(r"[a-c]{2}(,[a-c]{2})*\.?", answer.text)


def test_an_answer_that_is_too_short_for_its_form_ends_with_its_length(engine):
    answer = engine.generate("abc", module=None, regex="x{20}", max_new_tokens=5)
    assert (answer.text, answer.finish_reason) == ("xxxxx", "length")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"regex": "[0-9"}, "regex: .*unclosed character class"),
        ({"json_schema": '{"type": 3}'}, "json_schema: type must be"),
        ({"json_schema": "{no"}, "json_schema: Expecting property name"),
        ({"json_schema": {"type": "string", "minLength": 5, "maxLength": 3}}, "json_schema: Unsatisfiable"),
        ({"grammar": "start: foo"}, "grammar: .*unknown name"),
    ],
    ids=str,
)
def test_a_form_that_cannot_be_is_refused_before_anything_runs(engine, asked, words):
    with pytest.raises(ConfigError, match=words) as caught:
        engine.submit("abc", module=None, **asked)
    assert "\n" not in str(caught.value)
    assert engine._loop.scheduler.idle


def test_a_form_that_admits_nothing_ends_its_request_and_no_other(engine):
    asked = engine.submit("abc", module=None, regex=r"[^\s\S]")
    other = engine.submit("abc", module=None, max_new_tokens=6)
    while engine.step():
        pass
    assert isinstance(asked.error, ConfigError)
    assert "admits no" in str(asked.error)
    assert len(other.result.tokens) == 6


# What else is asked of a choice, end to end


def test_logprobs_of_prompt_and_answer_are_those_of_the_module(engine):
    prompt = domain_text("letters", 4, words=30)
    for _ in range(2):  # with nothing kept, and with the prompt's beginning kept
        answer = engine.generate(prompt, module="letters", max_new_tokens=8, logprobs=3, prompt_logprobs=2)
        ids = torch.tensor([[*engine.tokenizer.encode(prompt), *answer.tokens]])
        wanted = engine.logits(ids, "letters")[0].log_softmax(-1)
        first = ids.shape[1] - len(answer.tokens)
        found = [*answer.prompt_logprobs, *answer.logprobs]
        assert [one.token for one in found] == ids[0, 1:].tolist()
        for at, one in enumerate(found):
            assert one.logprob == pytest.approx(wanted[at, one.token].item(), abs=1e-4)
            assert len(one.top) == (2 if at < first - 1 else 3)
            assert [v for _, v in one.top] == pytest.approx(wanted[at].topk(len(one.top)).values.tolist(), abs=1e-4)
    assert answer.to_json()["logprobs"][0]["token"] == answer.tokens[0]
    assert "logprobs" not in engine.generate("abc", module=None, max_new_tokens=1).to_json()


def test_biases_of_tokens_that_are_not_there_are_refused(engine):
    with pytest.raises(DataError, match="logit_bias: token id 99999"):
        engine.generate("abc", module=None, logit_bias={99999: 1.0})


def test_several_answers_are_those_of_their_seeds(engine):
    prompt = domain_text("letters", 5, words=20)
    sampling = {"module": "letters", "max_new_tokens": 10, "temperature": 1.0}
    found = engine.choices(prompt, 4, seed=7, **sampling)
    assert len({tuple(answer.tokens) for answer in found}) > 1
    for number, answer in enumerate(found):
        assert answer.tokens == engine.generate(prompt, seed=7 + number, **sampling).tokens
    routed = engine.choices(prompt, 3, max_new_tokens=3)
    assert {answer.module for answer in routed} == {engine.route(prompt).module}
    assert all(answer.scores == routed[0].scores for answer in routed)
    for n in (0, -1, 1.5, 1000):
        with pytest.raises(ConfigError, match="n is "):
            engine.choices(prompt, n)


def test_what_fails_the_first_of_several_answers_fails_them_all(engine, monkeypatch):
    monkeypatch.setattr(Store, "load", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.choices("abc", 3, module="letters")
    assert engine._loop.scheduler.idle
