"""Routed experts against a loop over tokens, and the losses on what routers decide by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from growlm.layers.experts import AttentionExperts, SparseFeedForward
from growlm.layers.losses import (
    load_balance,
    load_concentration,
    mutual_information,
    router_z,
    routing_regularisation,
)
from growlm.layers.routing import ExpertRouter
from interruptions import fresh

KINDS = ("mlp", "linear", "cosine")


def tokens(n: int = 30, d: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).requires_grad_(True)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    experts=st.integers(1, 6),
    k=st.integers(1, 6),
    kind=st.sampled_from(KINDS),
    gated=st.booleans(),
    gates=st.sampled_from(["probabilities", "renormalised"]),
)
def test_feed_forward_equals_a_loop(n: int, experts: int, k: int, kind: str, gated: bool, gates: str) -> None:
    k = min(k, experts)
    torch.manual_seed(n)
    layer = SparseFeedForward(12, 8, experts, k, gated=gated, bias=True, kind=kind, size=8, gates=gates)
    x = tokens(n)
    out, routing = layer(x)
    wanted = torch.zeros(n, 12)
    for i in range(n):
        for j in range(k):
            e = int(routing.experts[i, j])
            inner = x[i] @ layer.up.weight[e]
            inner = F.gelu(inner[:8]) * inner[8:] if gated else F.gelu(inner)
            wanted[i] = wanted[i] + routing.gates[i, j] * (inner @ layer.down.weight[e])
    torch.testing.assert_close(out, wanted + layer.bias, rtol=1e-4, atol=1e-6)
    weigh = torch.randn(n, 12)
    leaves = [x, *layer.parameters()]
    got = torch.autograd.grad((out * weigh).sum(), leaves, retain_graph=True, allow_unused=True)
    want = torch.autograd.grad(((wanted + layer.bias) * weigh).sum(), leaves, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_attention_experts_map_and_reduce_as_a_loop() -> None:
    layer = AttentionExperts(12, 8, 5, 2, size=8)
    x = tokens()
    routing = layer.router(x)
    queries, dispatch = layer.queries(x, routing)
    out = layer.outputs(queries, routing, dispatch)
    wanted = torch.stack(
        [
            sum(
                routing.gates[i, j] * (x[i] @ layer.query.weight[e] @ layer.output.weight[e])
                for j, e in enumerate(routing.experts[i])
            )
            for i in range(len(x))
        ]
    )
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-6)


def test_gates_are_probabilities_that_are_not_renormalised() -> None:
    router = ExpertRouter(12, 6, 2, size=8)
    routing = router(tokens())
    probabilities = routing.logits.softmax(-1)
    torch.testing.assert_close(routing.gates, probabilities.topk(2).values)
    assert (routing.gates.sum(-1) < 1).all()


def test_cosine_router_compares_directions() -> None:
    router = ExpertRouter(12, 6, 2, kind="cosine", size=8)
    x = tokens().detach()
    assert router(x).logits.abs().max() <= 1 + 1e-5  # the temperature starts at one
    torch.testing.assert_close(router(x).logits, router(3 * x).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_cosine_router_looks_at_directions_of_experts_too() -> None:
    router = ExpertRouter(12, 6, 2, kind="cosine", size=8)
    router.temperature.fill_(0.7)
    router.embeddings.mul_(torch.arange(1.0, 7.0)[:, None])  # their lengths mean nothing
    x = tokens()
    wanted = F.cosine_similarity(router.project(x)[:, None], router.embeddings[None], dim=-1) * math.exp(0.7)
    torch.testing.assert_close(router(x).logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_tokens_result_does_not_depend_on_the_batch() -> None:
    layer = SparseFeedForward(12, 8, 6, 2, size=8).eval()
    x = tokens(64).detach()
    x[10:] = x[10]  # fifty alike: nothing is dropped for being too many
    whole, _ = layer(x)
    alone, _ = layer(x[:3])
    torch.testing.assert_close(whole[:3], alone, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(whole[10:], whole[10].expand(54, 12), rtol=1e-5, atol=1e-7)


def test_layers_keep_no_state() -> None:
    layer = SparseFeedForward(12, 8, 6, 2, size=8)
    before = dict(vars(layer.router))
    layer(tokens())
    assert vars(layer.router) == before


def test_sampling_draws_in_training_only() -> None:
    router = ExpertRouter(12, 8, 2, size=8, num_sampled=1)
    x = tokens(200).detach()
    top = router.eval()(x).experts
    drawn = router.train()(x).experts
    assert torch.equal(drawn[:, 0], top[:, 0])  # the first is never drawn
    assert not torch.equal(drawn[:, 1], top[:, 1])
    assert (drawn[:, 0] != drawn[:, 1]).all()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"top_k": 7}, "top_k is 7, expected 1 to num_experts, 6"),
        ({"top_k": 0}, "top_k is 0"),
        ({"num_sampled": 3}, "num_sampled is 3, expected 0 to top_k, 2"),
        ({"kind": "tree"}, "router kind 'tree'"),
        ({"gates": "hard"}, "gates 'hard'"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ExpertRouter(12, 6, **{"top_k": 2, **options})


# Losses


HAND = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()


def entropy(*p: float) -> float:
    return -sum(x * math.log(x) for x in p)


def test_mutual_information_by_hand() -> None:
    marginal = entropy(0.3, 0.525, 0.175)
    each = (entropy(0.5, 0.25, 0.25) + entropy(0.1, 0.8, 0.1)) / 2
    assert float(mutual_information(HAND)) == pytest.approx(-marginal + each, abs=1e-6)
    assert float(load_concentration(HAND)) == pytest.approx(marginal, abs=1e-6)


def test_st_moe_losses_by_hand() -> None:
    # The first token chooses expert 0, the second expert 1: shares 1/2, 1/2, 0; mean probabilities .3, .525, .175.
    experts = torch.tensor([[0], [1]])
    assert float(load_balance(HAND, experts)) == pytest.approx(3 * (0.5 * 0.3 + 0.5 * 0.525), abs=1e-6)
    assert float(router_z(HAND + 2)) == pytest.approx(4.0, abs=1e-5)


def test_routing_regularisation_is_the_squared_norm() -> None:
    assert float(routing_regularisation(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))) == 14.0


@pytest.mark.parametrize("loss", [mutual_information, load_concentration, router_z])
def test_padding_counts_for_nothing(loss) -> None:
    padded = torch.cat([HAND, torch.full((5, 3), 9.0)])
    counted = torch.tensor([1, 1, 0, 0, 0, 0, 0])
    assert float(loss(padded, counted)) == pytest.approx(float(loss(HAND)), abs=1e-6)


def test_padding_counts_for_nothing_in_the_balance() -> None:
    padded, experts = torch.cat([HAND, torch.full((2, 3), 9.0)]), torch.tensor([[0], [1], [2], [2]])
    counted = torch.tensor([1, 1, 0, 0])
    assert float(load_balance(padded, experts, counted)) == pytest.approx(float(load_balance(HAND, experts[:2])))


@pytest.mark.parametrize("scale", [1e4, 1e-9])
def test_losses_stay_finite(scale: float) -> None:
    logits = (HAND * scale).half().requires_grad_(True)
    total = mutual_information(logits) + load_concentration(logits) + router_z(logits)
    (grad,) = torch.autograd.grad(total, logits)
    assert torch.isfinite(total)
    assert torch.isfinite(grad).all()


# Of seven tokens the first rank has five, two of them padding, and the second two.
MANY = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
CHOSEN = MANY.topk(2).indices
COUNTED = torch.tensor([1, 0, 1, 0, 1, 1, 1])
LOSSES = ("mutual_information", "load_concentration", "router_z", "load_balance")


def _losses(logits: Tensor, chosen: Tensor, counted: Tensor | None) -> list[Tensor]:
    plain = [loss(logits, counted) for loss in (mutual_information, load_concentration, router_z)]
    return [*plain, load_balance(logits, chosen, counted)]


def _rank(rank: int, store: str, masked: bool, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    own = slice(0, 5) if rank == 0 else slice(5, 7)
    logits = MANY[own].clone().requires_grad_(True)
    losses = _losses(logits, CHOSEN[own], COUNTED[own] if masked else None)
    grads = [torch.autograd.grad(loss, logits)[0].tolist() for loss in losses]
    results.put((rank, [float(loss) for loss in losses], grads))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [False, True])
def test_statistics_are_those_of_all_ranks(masked: bool, tmp_path) -> None:
    """Every token counts alike, whichever rank has it and however many that rank has."""
    results = fresh.Queue()
    arguments = (str(tmp_path / "store"), masked, results)
    workers = [fresh.Process(target=_rank, args=(r, *arguments)) for r in range(2)]
    for worker in workers:
        worker.start()
    found = sorted(results.get(timeout=600) for _ in workers)
    for worker in workers:
        worker.join()
    whole = MANY.clone().requires_grad_(True)
    losses = _losses(whole, CHOSEN, COUNTED if masked else None)
    wanted = [torch.autograd.grad(loss, whole)[0] for loss in losses]
    for rank, values, grads in found:
        own = slice(0, 5) if rank == 0 else slice(5, 7)
        for name, loss, value, grad, want in zip(LOSSES, losses, values, grads, wanted, strict=True):
            assert value == pytest.approx(float(loss), abs=1e-6), name
            # Every rank's loss is the whole batch's: the sum of both, which a data-parallel step halves, is twice it.
            torch.testing.assert_close(torch.tensor(grad) / 2, want[own], rtol=1e-4, atol=1e-6)
