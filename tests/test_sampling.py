"""Sampling: what is drawn and how likely, and settings that cannot be, refused in one line."""

from __future__ import annotations

import math

import pytest
import torch

from growlm.engine import SamplingConfig
from growlm.engine.sampling import sample
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
    "stop": [None, "", "abc", 3, ("",), ("a", ""), (None,), ["a", 3], {"a"}],
}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in BAD.items() for v in values], ids=str)
def test_what_cannot_be_is_refused_by_its_name(name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        SamplingConfig(**{name: value})
    assert "\n" not in str(caught.value)
