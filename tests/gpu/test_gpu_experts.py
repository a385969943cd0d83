"""Routed experts on a GPU: routers, dispatch, grouped products, feed-forwards, heads, and new experts beside old."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from growlm.layers.experts import AttentionExperts, SparseFeedForward
from growlm.layers.grouped import Dispatch, grouped_product
from growlm.layers.insertion import AttentionUnion, Beside, FeedForwardUnion, NewExperts
from growlm.layers.routing import ExpertRouter, Routing

pytestmark = pytest.mark.gpu

D, E, K, N = 32, 6, 2, 50
DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In float32, with weights that the dtype can hold: what is compared then is how it is computed."""
    return module.to(dtype).float()


def both(
    module: nn.Module, device: str, dtype: torch.dtype, run: Callable[[nn.Module, Tensor], Tensor], *shape: int
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """On the device in `dtype` and on the processor in float32: the output, and the gradients of input and weights."""
    torch.manual_seed(0)
    module, x = rounded(module, dtype), draw(*shape).to(dtype)
    results = []
    for where, kind in ((device, dtype), ("cpu", torch.float32)):
        here, given = copy.deepcopy(module).to(where, kind), x.to(where, kind, copy=True).requires_grad_()
        out = run(here, given)
        out.backward(draw(*out.shape, seed=1).to(out.device, out.dtype))
        grads = {name: p.grad for name, p in here.named_parameters() if p.grad is not None}
        results.append([out, given.grad, *grads.values()])
    return results[0], results[1], ["output", "input", *grads]


@pytest.mark.parametrize("kind", ["mlp", "linear", "cosine"])
@pytest.mark.parametrize("gates", ["probabilities", "renormalised"])
def test_routers_choose_alike(device, near, kind, gates):
    torch.manual_seed(0)
    router = ExpertRouter(D, E, K, kind=kind, size=16, gates=gates).eval()
    wanted, found = router(draw(N, D)), copy.deepcopy(router).to(device)(draw(N, D).to(device))
    assert torch.equal(found.experts.cpu(), wanted.experts)
    near(f"router {kind}: logits", found.logits, wanted.logits)
    near(f"router {kind}: gates, {gates}", found.gates, wanted.gates)


@pytest.mark.parametrize("kind", ["mlp", "linear", "cosine"])
def test_routers_in_bfloat16(device, near, kind):
    torch.manual_seed(0)
    router = rounded(ExpertRouter(D, E, K, kind=kind, size=16).eval(), torch.bfloat16)
    hidden = draw(N, D).bfloat16()
    wanted = router(hidden.float())
    found = copy.deepcopy(router).to(device, torch.bfloat16)(hidden.to(device))
    assert found.logits.dtype == found.gates.dtype == torch.float32
    near(f"router {kind}: logits", found.logits, wanted.logits, torch.bfloat16)


def test_a_router_draws_experts_in_training(device):
    router = ExpertRouter(D, E, 3, size=16, num_sampled=2).to(device).train()
    torch.manual_seed(3)
    first = router(draw(N, D).to(device))
    again = router(draw(N, D).to(device))
    torch.manual_seed(3)
    same = router(draw(N, D).to(device))
    assert torch.equal(first.experts, same.experts)
    assert not torch.equal(first.experts, again.experts)
    assert torch.equal(first.experts[:, 0], again.experts[:, 0])
    assert all(len(set(row)) == 3 for row in first.experts.tolist())


def test_dispatch_sorts_alike_and_back(device):
    experts = draw(N, E).topk(K).indices
    here, there = Dispatch.of(experts, E + 1), Dispatch.of(experts.to(device), E + 1)
    for name in ("order", "back", "ends"):
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name)), name
    tokens = draw(N, D).to(device)
    assert torch.equal(there.unsort(there.spread(tokens)), tokens[:, None].expand(-1, K, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(32, 64), (30, 64), (32, 50), (5, 3)], ids=str)
def test_grouped_products_with_experts_that_nobody_chose(device, near, sizes, dtype):
    """Aligned sizes are torch's grouped product, others a loop."""
    counts = torch.tensor([0, 7, 0, 20, 1, 0])
    ends = counts.cumsum(0).int()
    rows, weight = draw(28, sizes[0]).to(dtype), draw(6, *sizes, seed=1).to(dtype)
    results = []
    for where, kind in ((device, dtype), ("cpu", torch.float32)):
        leaves = [x.to(where, kind, copy=True).requires_grad_() for x in (rows, weight)]
        # What memory held before must not show in the gradients of experts without rows.
        del_me = [torch.full_like(leaf, float("nan")) for leaf in leaves]
        del del_me
        out = grouped_product(*leaves, ends.to(where))
        results.append([out, *torch.autograd.grad(out, leaves, draw(*out.shape, seed=2).to(where, kind))])
    for name, one, other in zip(("output", "rows", "weight"), *results, strict=True):
        assert one.dtype == dtype
        near(f"grouped product {sizes[0]} x {sizes[1]}: {name}", one, other, dtype)


def test_a_grouped_product_of_weights_in_the_middle_of_sixteen_bytes(device, near):
    """As a view of a file has them."""
    dtype = torch.bfloat16
    rows, weight = torch.randn(8, 16).to(dtype), torch.randn(2, 16, 24).to(dtype)
    ends = torch.tensor([3, 8], dtype=torch.int32)
    moved = torch.empty(weight.nbytes + 8, dtype=torch.uint8, device=device)[8:].view(dtype).view(weight.shape)
    moved.copy_(weight)
    near("grouped product: unaligned", grouped_product(rows.to(device), moved, ends.to(device)),
         grouped_product(rows.float(), weight.float(), ends), dtype)  # fmt: skip


def test_a_grouped_product_of_no_rows(device):
    weight = draw(E, D, D).to(device).requires_grad_()
    out = grouped_product(torch.empty(0, D, device=device), weight, torch.zeros(E, dtype=torch.int32, device=device))
    assert out.shape == (0, D)
    out.sum().backward()
    assert float(weight.grad.abs().max()) == 0


def fixed(experts: Tensor, gates: Tensor, x: Tensor) -> Routing:
    """In bfloat16 two experts can be too near to call: what they compute is compared for the same choice."""
    return Routing(torch.zeros(len(x), E, device=x.device), experts.to(x.device), gates.to(x.device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_a_feed_forward_of_experts(device, near, gated, dtype):
    torch.manual_seed(0)
    layer = SparseFeedForward(D, 24, E, K, size=16, gated=gated, bias=True)
    chosen = draw(N, E).softmax(-1).topk(K)

    def run(layer: Any, x: Tensor) -> Tensor:
        return layer.apply_to(x, fixed(chosen.indices, chosen.values, x))

    found, wanted, names = both(layer, device, dtype, run, N, D)
    for name, one, other in zip(names, found, wanted, strict=True):
        near(f"experts: {name}", one, other, dtype)


def test_a_feed_forward_of_experts_with_its_own_router(device, near):
    torch.manual_seed(0)
    layer = SparseFeedForward(D, 24, E, K, size=16)
    found, wanted, names = both(layer, device, torch.float32, lambda layer, x: layer(x)[0], 2, N // 2, D)
    for name, one, other in zip(names, found, wanted, strict=True):
        near(f"experts and router: {name}", one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mixture_of_heads(device, near, dtype):
    torch.manual_seed(0)
    layer = AttentionExperts(D, 16, E, K, size=16, bias=True)
    chosen = draw(N, E).softmax(-1).topk(K)

    def run(layer: Any, x: Tensor) -> Tensor:
        routing = fixed(chosen.indices, chosen.values, x)
        queries, dispatch = layer.queries(x, routing)
        return layer.outputs(queries.tanh(), routing, dispatch)

    found, wanted, names = both(layer, device, dtype, run, N, D)
    for name, one, other in zip(names, found, wanted, strict=True):
        near(f"mixture of heads: {name}", one, other, dtype)


def test_under_autocast_products_are_in_bfloat16(device, near):
    torch.manual_seed(0)
    layer = SparseFeedForward(D, 24, E, K, size=16)
    here, x = copy.deepcopy(layer).to(device), draw(N, D)
    routing = layer.router(x)
    with torch.autocast(device, torch.bfloat16):
        found = here.apply_to(x.to(device), fixed(routing.experts, routing.gates, x.to(device)))
        assert here.up(x.to(device), torch.full((E,), N, dtype=torch.int32, device=device)).dtype == torch.bfloat16
    near("experts: under autocast", found, layer.apply_to(x, routing), torch.bfloat16)


@pytest.mark.parametrize("opened", [False, True])
def test_new_experts_beside_old_ones(device, near, opened):
    torch.manual_seed(0)
    old = SparseFeedForward(D, 24, E, K, size=16).requires_grad_(False)
    heads = AttentionExperts(D, 16, E, K, size=16).requires_grad_(False)
    new = nn.ModuleList([NewExperts(old.router, old.up, old.down, 3), NewExperts(old.router, old.up, old.down, 2)])
    attention = nn.ModuleList([NewExperts(heads.router, heads.query, heads.output, 2)])
    holder = nn.ModuleList([old, heads, new, attention])
    for part in holder.modules():
        if isinstance(part, NewExperts) and opened:
            part.enable_new_experts()

    def run(holder: Any, x: Tensor) -> Tensor:
        first = FeedForwardUnion(holder[0], list(holder[2]))
        second = AttentionUnion(holder[1], list(holder[3]))
        routing = second.router(x)
        queries, dispatch = second.queries(x, routing)
        return first(x)[0] + second.outputs(queries, routing, dispatch)

    found, wanted, names = both(holder, device, torch.float32, run, N, D)
    assert len(names) == (2 + 3 * 3 if opened else 2)
    for name, one, other in zip(names, found, wanted, strict=True):
        near(f"new experts beside old: {name}", one, other)


def test_experts_beside_a_dense_feed_forward(device, near):
    torch.manual_seed(0)
    holder = nn.ModuleList([nn.Linear(D, D), SparseFeedForward(D, 24, E, K, size=16)])
    found, wanted, names = both(holder, device, torch.float32, lambda h, x: Beside(h[0], [h[1]])(x), N, D)
    for name, one, other in zip(names, found, wanted, strict=True):
        near(f"experts beside a dense part: {name}", one, other)
