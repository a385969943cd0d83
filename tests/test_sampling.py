"""Sampling: what is drawn and how likely, and settings that cannot be, refused in one line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growlm.engine import SamplingConfig
from growlm.engine.sampling import Sampler, sample
from growlm.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

LOGITS = torch.tensor([[1.0, 3.0, 2.0, -40.0], [80.0, -80.0, 0.0, 79.0]])


def draw(logits: torch.Tensor, *, seed: int = 0, **settings) -> list[int]:
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(logits))]
    return sample(logits, SamplingConfig(seed=seed, **settings), generators).tolist()


@pytest.mark.parametrize("temperature", [0, 0.0, 5e-324, 1e-46, 1e-40, 1e-38, 1e-20, 1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("bound", [{}, {"top_k": 2}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_colder_the_nearer_to_greedy_down_to_the_coldest(temperature, bound, dtype):
    assert draw(LOGITS.to(dtype), temperature=temperature, **bound) == [1, 0]
    assert draw(1e4 * LOGITS.to(dtype), temperature=temperature, **bound) == [1, 0]


@pytest.mark.parametrize("temperature", [1e6, 1e30, 10**20])
def test_the_hottest_draws_any(temperature):
    row = LOGITS[:1].expand(200, -1)
    assert set(draw(row, temperature=temperature)) == {0, 1, 2, 3}
    assert set(draw(row, temperature=temperature, top_k=2)) == {1, 2}


def test_shares_are_those_of_the_softmax():
    logits = torch.tensor([[0.0, math.log(3.0)]]).expand(4000, -1)
    drawn = draw(logits, temperature=1.0)
    assert sum(drawn) / len(drawn) == pytest.approx(0.75, abs=0.03)
    drawn = draw(logits, temperature=0.5)
    assert sum(drawn) / len(drawn) == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize("seed", [0, 7, 2**63, 2**64 - 1])
def test_every_seed_that_is_allowed_can_be_drawn_with(seed):
    config = SamplingConfig(temperature=1.0, seed=seed)
    generator = torch.Generator().manual_seed(config.seed)
    assert sample(LOGITS[:1], config, [generator]).shape == (1,)


def test_stop_texts_may_be_any_list_and_are_kept_as_a_tuple():
    assert SamplingConfig(stop=["\n", "User:"]).stop == ("\n", "User:")
    assert SamplingConfig(stop=()).stop == ()


BAD = {
    "max_new_tokens": [0, -1, 1.5, "12", None, math.nan, math.inf],
    "temperature": [-1, -1e-9, math.nan, math.inf, -math.inf, 1e39, 10**400, "0.5", None],
    "top_k": [-1, 2.0, "3", None],
    "top_p": [0, -0.1, 1.0000001, math.nan, math.inf, "0.9", None],
    "seed": [-1, 2**64, 0.5, "7", None],
    "min_p": [-0.1, 1.1, math.nan, "0.1", None, True],
    "presence_penalty": [-2.1, 2.1, math.nan, "1", None, True],
    "frequency_penalty": [-2.1, 2.1, math.inf, "1", None],
    "repetition_penalty": [0, -1, math.nan, math.inf, "1", None],
    "logit_bias": [[], None, {"a": 1}, {-1: 1}, {1: 101}, {1: math.nan}, {1: "2"}, {1.5: 1}, {True: 1}],
    "logprobs": [-1, 21, 1.5, "3"],
    "prompt_logprobs": [-1, 21, 1.5, "3"],
    "json_schema": [3, 0.5, ["a"]],
    "regex": ["", 3, True],
    "grammar": ["", 3, True],
    "stop": [None, "", "abc", 3, ("",), ("a", ""), (None,), ["a", 3], {"a"}],
}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in BAD.items() for v in values], ids=str)
def test_what_cannot_be_is_refused_by_its_name(name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        SamplingConfig(**{name: value})
    assert "\n" not in str(caught.value)


def test_two_grammars_are_refused():
    with pytest.raises(ConfigError, match="json_schema and regex exclude each other"):
        SamplingConfig(json_schema=True, regex="a")


# One request's choice of tokens


def sampler(prompt: Sequence[int] = (), **settings: Any) -> Sampler:
    return Sampler(SamplingConfig(**settings), prompt, torch.device("cpu"))


def test_a_token_that_was_written_is_penalised_once_and_for_each_time():
    chooses = sampler(presence_penalty=1.0, frequency_penalty=0.5)
    logits = torch.tensor([3.0, 1.8, 0.0])
    # 3.0, then 1.5 against 1.8, then 1.5 against 0.3, then 1.0 against 0.3, then 0.5, then 0.0 against 0.3
    assert [chooses.choose(logits) for _ in range(6)] == [0, 1, 0, 0, 0, 1]
    assert logits.tolist() == pytest.approx([3.0, 1.8, 0.0])  # its own copy


def test_prompt_tokens_are_penalised_for_repetition_alone():
    logits = torch.tensor([3.0, 2.9, -1.0])
    assert sampler([0], repetition_penalty=1.5).choose(logits) == 1
    assert sampler([0], presence_penalty=2.0).choose(logits) == 0
    assert sampler([0, 1], repetition_penalty=1000.0).choose(torch.tensor([-1.0, -0.5, -0.6])) == 2  # below 0: lower


def test_biases_are_added():
    logits = torch.tensor([3.0, 2.0, 1.0])
    assert sampler(logit_bias={2: 2.5}).choose(logits) == 2
    assert sampler(logit_bias={"0": -100}).choose(logits) == 1


@given(
    logits=st.lists(st.floats(-5, 5), min_size=2, max_size=8),
    min_p=st.floats(0.01, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(logits, min_p, seed):
    values = torch.tensor(logits)
    drawn = sampler(temperature=1.0, min_p=min_p, seed=seed).choose(values)
    shares = values.softmax(-1)
    assert shares[drawn] >= min_p * shares.max() * (1 - 1e-6)


def test_logprobs_are_those_of_the_model_before_anything_else():
    chooses = sampler(temperature=0.7, logit_bias={0: -50}, logprobs=2)
    logits = torch.tensor([4.0, 2.0, 1.0])
    token = chooses.choose(logits)
    wanted = logits.log_softmax(-1).tolist()
    (found,) = chooses.logprobs
    assert found.token == token != 0
    assert found.logprob == pytest.approx(wanted[token])
    assert [token for token, _ in found.top] == [0, 1]
    assert [logprob for _, logprob in found.top] == pytest.approx(wanted[:2])
    assert sampler(logprobs=0).choose(logits) == 0
