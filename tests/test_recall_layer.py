"""The mixture of a model and what a text says: against a plain loop, and where there is nothing to mix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from growlm.layers.recall import FEATURES, LEVELS, NOTHING, mixed, mixture_losses, recalled
from growlm.training.recalling import Sample, fit

# n tokens, v vocabulary, w neighbours, j levels

VOCAB = 11
WIDTH = 70  # more than the last level asks for


def drawn(n: int, width: int, seed: int, *, most: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (n, v), and lengths and tokens (n, w) of neighbours: of some few, of one none at all."""
    g = torch.Generator().manual_seed(seed)
    own = (2 * torch.randn(n, VOCAB, generator=g)).log_softmax(-1)
    lengths = torch.randint(0, most, (n, width), generator=g).sort(-1, descending=True).values
    lengths[0] = 0
    lengths[1, 2:] = 0
    tokens = torch.where(lengths > 0, torch.randint(0, VOCAB, (n, width), generator=g), -1)
    return own, lengths, tokens


def gates_of(seed: int) -> Tensor:
    return torch.randn(len(LEVELS), FEATURES, generator=torch.Generator().manual_seed(seed)) * 0.5


def again(n: int) -> Tensor:
    """(n,) tokens of each context that its prompt has had before."""
    return torch.arange(n) % 7


def by_a_loop(
    own: list[float], lengths: list[int], tokens: list[int], repeated: int, gates: list[list[float]]
) -> list[float]:
    """Probabilities (v,) of one token."""
    entropy = -sum(math.exp(p) * p for p in own if p > -math.inf)
    weights, estimates = [1.0], [[math.exp(p) for p in own]]
    for least, gate in zip(LEVELS, gates, strict=True):
        length = lengths[min(least, len(lengths)) - 1]
        said = [token for token, other in zip(tokens, lengths, strict=True) if other >= length > 0]
        if not said or gate[0] == NOTHING:
            continue
        shares = [said.count(token) / len(said) for token in range(VOCAB)]
        believed = [max(p, -12.0) for p in own]
        seen = [
            1.0,
            math.log(length),
            math.log(len(said)),
            max(shares),
            max(p for p, share in zip(believed, shares, strict=True) if share == max(shares)) / 4,
            sum(believed[token] for token in said) / len(said) / 4,
            max(own),
            entropy / 4,
            float(repeated >= length),
            max(math.log(1 + repeated) - math.log(1 + length), 0),
        ]
        weights.append(math.exp(sum(g * f for g, f in zip(gate, seen, strict=True))))
        estimates.append(shares)
    return [sum(w * e[t] for w, e in zip(weights, estimates, strict=True)) / sum(weights) for t in range(VOCAB)]


@pytest.mark.parametrize("width", [1, 3, WIDTH])
@pytest.mark.parametrize("closed", [(), (0,), (1, 3)], ids=str)
def test_the_mixture_is_that_of_a_plain_loop(width, closed):
    own, lengths, tokens = drawn(40, width, seed=width)
    gates = gates_of(1)
    gates[list(closed), 0] = NOTHING
    out = mixed(own, recalled(own, lengths, tokens, again(len(own))), gates)
    rows = zip(own.tolist(), lengths.tolist(), tokens.tolist(), again(len(own)).tolist(), strict=True)
    wanted = [by_a_loop(*row, gates.tolist()) for row in rows]
    torch.testing.assert_close(out.exp(), torch.tensor(wanted), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.logsumexp(-1), torch.zeros(len(out)), atol=1e-5, rtol=0)
    assert (out - own).abs().amax(-1).gt(1e-3).sum() > 10


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_neighbours_that_agree_equally_does_not_matter(seed):
    """Which lies nearer in an array depends on what else is in it."""
    own, lengths, tokens = drawn(60, WIDTH, seed, most=3)
    gates = gates_of(seed)
    shuffled = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(9)).argsort(-1)
    order = shuffled.gather(1, (-lengths.gather(1, shuffled)).sort(dim=-1, stable=True).indices)
    assert torch.equal(lengths.gather(1, order), lengths)
    found = mixed(own, recalled(own, lengths, tokens.gather(1, order), again(len(own))), gates)
    torch.testing.assert_close(
        found, mixed(own, recalled(own, lengths, tokens, again(len(own))), gates), atol=1e-5, rtol=1e-5
    )


def test_closed_gates_and_no_neighbours_leave_all_bit_equal():
    own, lengths, tokens = drawn(30, WIDTH, seed=3)
    gates = gates_of(2)
    out = mixed(own, recalled(own, lengths, tokens, again(len(own))), gates)
    assert torch.equal(out[0], own[0])  # without a neighbour
    assert not torch.equal(out[1:], own[1:])
    gates[:, 0] = NOTHING
    assert torch.equal(mixed(own, recalled(own, lengths, tokens, again(len(own))), gates), own)
    nothing = recalled(own, torch.zeros_like(lengths), torch.full_like(tokens, -1), again(len(own)))
    assert torch.equal(mixed(own, nothing, gates_of(2)), own)
    assert nothing.masses.sum() == 0
    assert nothing.features.isfinite().all()


def test_what_the_model_rules_out_is_only_what_the_text_says():
    own = torch.tensor([[0.0, -math.inf, -math.inf], [-math.inf, 0.0, -math.inf]])
    found = recalled(own, torch.tensor([[4, 4], [2, 0]]), torch.tensor([[1, 1], [1, -1]]), again(2))
    assert found.features.isfinite().all()
    out = mixed(own, found, gates_of(4))
    assert out[0, 2] == out[1, 0] == out[1, 2] == -math.inf
    assert (out[0, :2] > -math.inf).all()
    torch.testing.assert_close(out.logsumexp(-1), torch.zeros(2), atol=1e-6, rtol=0)


def test_the_losses_of_a_mixture_are_those_of_its_distribution():
    own, lengths, tokens = drawn(50, WIDTH, seed=5)
    labels = torch.randint(0, VOCAB, (50,), generator=torch.Generator().manual_seed(6))
    found, gates = recalled(own, lengths, tokens, again(len(own))), gates_of(7)
    losses = -own.gather(1, labels[:, None])[:, 0]
    mine = mixture_losses(losses, found.probability(labels), found.gates(gates))
    wanted = -mixed(own, found, gates).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)


def test_gates_learn_that_a_model_copies_what_its_prompt_has_said_before():
    """The same context, text and model; what comes next differs by whether the prompt has had the context."""
    own = torch.tensor([[0.7, 0.3, 0.0]]).clamp(min=1e-6).log().repeat(200, 1)
    copied = torch.arange(200) % 2 == 0
    found = recalled(own, torch.full((200, 2), 2), torch.ones(200, 2, dtype=torch.int64), torch.where(copied, 5, 0))
    labels = torch.where(copied, 0, 1)
    losses = -own.gather(1, labels[:, None])[:, 0]
    sample = Sample(losses, found.probability(labels), found.features, found.masses.sum(-1) > 0, torch.arange(200))
    out = mixed(own, found, fit(sample, 1e-4, torch.zeros(len(LEVELS), FEATURES)))
    assert out.exp()[copied, 0].min() > 0.65
    assert out.exp()[~copied, 1].min() > 0.9
