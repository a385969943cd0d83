"""FLOPs of the benchmarks, against counts by hand and by torch, and the budgets of the comparison of PEER."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from growlm.layers import PEER, ProductKeyMemory
from growlm.model import GrowlmConfig, GrowlmForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
flops = import_module("benchmarks.lib.flops")
peer = import_module("benchmarks.quality.peer")

D, W, T, V = 32, 40, 16, 61
SIZES = {
    "vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": W,
    "attention": "softmax", "num_experts": 4, "num_experts_per_tok": 3, "router": "linear", "peer_num_experts": 42,
    "peer_num_heads": 2, "peer_top_k": 3, "peer_key_size": 10,
}  # fmt: skip
# Of a token: head, then for both layers four projections, and attention over all keys.
WITHOUT_FEED_FORWARD = 2 * V * D + 2 * (4 * 2 * D * D + 2 * 2 * T * D)
QUERIES = 2 * D * 2 * 10 + 2 * 2 * 5 * (6 + 7)
BY_HAND = {
    "dense": 2 * 2 * D * W,
    "experts": 2 * D * 4 + 3 * 2 * 2 * D * W,
    "peer": QUERIES + 2 * 3 * 2 * 2 * D,
    "memory": QUERIES + 2 * 3 * 2 * D,
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_counts_are_those_by_hand(kind: str) -> None:
    config = GrowlmConfig(**SIZES, feed_forward=kind)
    # Some versions of transformers compute the angles of positions, half a head a token, by a matrix product.
    wanted = pytest.approx(WITHOUT_FEED_FORWARD + 2 * BY_HAND[kind], abs=D / 2)
    assert flops.forward_flops(GrowlmForCausalLM(config), T) == wanted
    assert flops.config_flops(config, T) == wanted


@pytest.mark.parametrize("neurons", [1, 3])
@pytest.mark.parametrize("gated", [False, True])
def test_rows_cost_what_torch_counts_for_their_products(neurons: int, gated: bool) -> None:
    """Of rows that are gathered first and then multiplied, as a reference would."""
    n, chosen = 5, 7
    layer = PEER(D, 42, 2, 3, neurons_per_expert=neurons, gated=gated)
    up, down = (t[torch.randint(42, (n, chosen))].unflatten(-1, (-1, D)) for t in (layer.up, layer.down))
    with FlopCounterMode(display=False) as counter:
        torch.einsum("nsfd,nd->nsf", up, torch.randn(n, D))
        torch.einsum("nsf,nsfd->nd", torch.randn(n, chosen, neurons), down)
    assert flops.row_flops(layer, n * chosen) == counter.get_total_flops()
    memory = ProductKeyMemory(D, 42, 2, 3)
    assert flops.row_flops(memory, n * chosen) == 2 * n * chosen * D


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "table"), [("small", "kinds"), ("small", "experts"), ("large", "kinds")])
def test_models_of_a_budget_cost_the_same(budget: str, table: str) -> None:
    wanted = peer.budget_flops(budget)
    for kind, changes in peer.TABLES[table].values():
        config, found = peer.at_budget(budget, kind, changes)
        assert found == pytest.approx(wanted, rel=peer.NEAR)
        assert config.feed_forward.count(kind) == (1 if kind != "dense" else config.num_hidden_layers)


def test_what_costs_more_than_the_budget_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"peer .* costs more than the budget of 3.15 MFLOP a token"):
        peer.at_budget("small", "peer", {"peer_num_heads": 64})
