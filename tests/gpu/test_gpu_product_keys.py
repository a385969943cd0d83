"""Product keys, PEER, product-key memory and their tables on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from growlm.layers.peer import PEER, ProductKeyMemory
from growlm.layers.pools import WithPools, imitation
from growlm.layers.product_keys import MaskedBatchNorm, ProductKeys, Retrieval, retrievals
from growlm.layers.row_cache import CachedPool, RowCache
from growlm.layers.rows import Choices, row_products, weighted_rows
from growlm.layers.tables import free_bytes, new_table, untouched_zeros

pytestmark = pytest.mark.gpu

D, N = 32, 60
DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grads_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("training", [False, True])
def test_the_same_keys_are_found(device, near, norm, training):
    torch.manual_seed(0)
    keys = ProductKeys(D, 12 * 20, 3, 5, key_size=16, query_norm=norm).train(training)
    there = copy.deepcopy(keys).to(device)
    for module, where in ((keys, "cpu"), (there, device)):
        for _ in range(2):  # the second pass reads what the first left in the statistics
            scores, experts = module(draw(N, D).to(where))
        scores.backward(draw(*scores.shape, seed=1).to(where))
        if module is keys:
            wanted = scores, experts
    near(f"product keys, norm {norm}: scores", scores, wanted[0])
    assert torch.equal(experts.cpu(), wanted[1])
    for name, grad in grads_of(keys).items():
        near(f"product keys, norm {norm}: {name}", grads_of(there)[name], grad)
    for name, buffer in keys.named_buffers():
        near(f"product keys, norm {norm}: statistics", dict(there.named_buffers())[name].float(), buffer.float())


def test_batch_norm_counts_real_tokens_alone(device, near):
    norm = MaskedBatchNorm(D)
    there = copy.deepcopy(norm).to(device)
    mask = torch.arange(N) % 3 > 0
    for given in (mask, torch.zeros(N, dtype=torch.bool), None):
        near("masked batch norm: output", there(draw(N, D).to(device), None if given is None else given.to(device)),
             norm(draw(N, D), given))  # fmt: skip
        near("masked batch norm: running variance", there.running_var, norm.running_var)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("sparse", [True, False])
def test_rows_of_tables(device, near, sparse, parts, dtype):
    x, table = draw(N, D).to(dtype), draw(40, parts * D, seed=1).to(dtype)
    ids = torch.randint(40, (N, 7), generator=torch.Generator().manual_seed(2))
    results = []
    for where, kind in ((device, dtype), ("cpu", torch.float32)):
        leaves = [t.to(where, kind, copy=True).requires_grad_() for t in (x, table)]
        choices = Choices(ids.to(where))
        products = row_products(*leaves, choices, sparse=sparse)
        sums = weighted_rows(products.tanh(), leaves[1], choices, sparse=sparse)
        sums.backward(draw(*sums.shape, seed=3).to(where, kind))
        assert leaves[1].grad.is_sparse == sparse
        results.append([products, sums, leaves[0].grad, leaves[1].grad])
    for name, one, other in zip(("products", "sums", "input", "table"), *results, strict=True):
        assert one.dtype == dtype
        near(f"rows of tables: {name}", one, other, dtype)


def pools() -> dict[str, Callable[[], Any]]:
    sizes = (D, 12 * 20, 3, 5)
    return {
        "peer": lambda: PEER(*sizes),
        "peer, sigmoid, 2 neurons": lambda: PEER(*sizes, scores="sigmoid", neurons_per_expert=2, query_norm="layer"),
        "peer, gated": lambda: PEER(*sizes, gated=True, query_norm="none"),
        "memory": lambda: ProductKeyMemory(*sizes),
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", pools())
def test_pools(device, near, name, training):
    torch.manual_seed(0)
    pool = pools()[name]().train(training)
    there = copy.deepcopy(pool).to(device)
    results = []
    for module, where in ((there, device), (pool, "cpu")):
        x = draw(2, N // 2, D).to(where, copy=True).requires_grad_()
        with retrievals() as found:
            out = module(x)
        out.backward(draw(*out.shape, seed=1).to(where))
        results.append([out, x.grad, *grads_of(module).values()])
        assert found[0].experts.shape == (N, 3, 5)
    for part, one, other in zip(("output", "input", *grads_of(pool)), *results, strict=True):
        near(f"{name}: {part}", one, other)
    tables = ("up", "down") if isinstance(pool, PEER) else ("values",)
    for part in tables:
        assert getattr(there, part).grad.is_sparse
        rows = [torch.unique(getattr(m, part).grad._indices()[0].cpu()) for m in (there, pool)]
        assert torch.equal(*rows)


def test_a_pool_in_bfloat16_of_the_same_choice(device, near):
    torch.manual_seed(0)
    pool = PEER(D, 12 * 20, 3, 5, query_norm="layer").to(torch.bfloat16).float()
    there = copy.deepcopy(pool).to(device, torch.bfloat16)
    tokens = draw(N, D).bfloat16()
    scores, experts = pool.keys(tokens.float())
    retrieval = Retrieval(experts, scores, scores.softmax(-1))
    results = []
    for module, where, kind in ((there, device, torch.bfloat16), (pool, "cpu", torch.float32)):
        x = tokens.to(where, kind, copy=True).requires_grad_()
        moved = Retrieval(*(t.detach().to(where) for t in (retrieval.experts, retrieval.scores, retrieval.gates)))
        out = module.apply_to(x, moved)
        out.backward(draw(*out.shape, seed=1).to(where, kind))
        results.append([out, x.grad, module.up.grad, module.down.grad])
    for part, one, other in zip(("output", "input", "up", "down"), *results, strict=True):
        near(f"peer, same choice: {part}", one, other, torch.bfloat16)
    near("peer: scores", there.keys(tokens.to(device))[0], scores, torch.bfloat16)


def test_under_autocast_with_tables_in_float32(device, near):
    torch.manual_seed(0)
    pool = PEER(D, 12 * 20, 3, 5, query_norm="layer")
    there = copy.deepcopy(pool).to(device)
    x = draw(N, D).to(device).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        out = there(x)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert bool(x.grad.isfinite().all())
    assert there.up.grad.dtype == torch.float32


@pytest.mark.parametrize("room", ["all", "some"])
def test_rows_that_stay_in_main_memory_give_the_same_bits(device, room):
    torch.manual_seed(0)
    pool = PEER(D, 12 * 20, 2, 3).eval()
    here = copy.deepcopy(pool).to(device).eval()
    tables = pool.up.data, pool.down.data
    cached = copy.deepcopy(here)
    cached.up, cached.down = (nn.Parameter(t) for t in tables)  # as a file's mapping would be: on the processor
    most = (2 * D * 4 + 16) * 240 + 4 * 240
    served = CachedPool(cached, most if room == "all" else most // 4, device)
    assert {slab.device.type for slab in served.cache.slabs} == {device}
    with torch.no_grad():
        x = draw(3, N, D).to(device)
        for _ in range(2):
            assert torch.equal(served(x), here(x)) or room == "some"
            torch.testing.assert_close(served(x), here(x), rtol=1e-5, atol=1e-6)
    assert served.cache.reads >= 100


def test_a_row_cache_reads_what_the_tables_hold(device):
    table = draw(100, 8)
    cache = RowCache([table], 10_000, 20, device)
    for seed in range(5):
        ids = torch.randint(100, (20,), generator=torch.Generator().manual_seed(seed)).to(device)
        with cache.reading(ids) as slots:
            assert slots.device.type == device
            assert torch.equal(cache.slabs[0][slots].cpu(), table[ids.cpu()])


def test_pools_at_a_frozen_feed_forward(device, near):
    torch.manual_seed(0)
    holder = nn.ModuleList([nn.Linear(D, D), PEER(D, 64, 2, 3), PEER(D, 64, 2, 3)]).eval()
    there = copy.deepcopy(holder).to(device)
    x = draw(N, D)
    for beside, instead in (([1], []), ([], [1]), ([1], [2]), ([], [1, 2])):
        made = [WithPools(h[0], [h[i] for i in beside], [h[i] for i in instead]) for h in (there, holder)]
        near("pools at a feed-forward", made[0](x.to(device)), made[1](x))
        with imitation() as found:
            made[0](x.to(device))
        with imitation() as wanted:
            made[1](x)
        for one, other in zip(found, wanted, strict=True):
            near("pools at a feed-forward: imitation", one, other)


def test_tables_and_their_memory(device):
    table = new_table(4096, 1024, device=device, dtype=torch.bfloat16)
    assert (table.shape, table.dtype, table.device.type) == ((4096, 1024), torch.bfloat16, device)
    zeros = untouched_zeros((4096, 1024), torch.float32, torch.device(device))
    assert float(zeros.abs().max()) == 0
    assert free_bytes(torch.device(device)) > 0
    with pytest.raises(MemoryError, match="free on"):
        PEER(1024, 1 << 40, 1, 1, sub_keys=(1 << 20, 1 << 20), device=device)


def test_the_same_input_gives_the_same_bits(device):
    torch.manual_seed(0)
    pool = PEER(D, 12 * 20, 3, 5).to(device)
    seen = []
    for _ in range(2):
        pool.zero_grad()
        pool.eval()(draw(N, D).to(device)).sum().backward()
        seen.append(
            [pool.up.grad._values(), pool.down.grad._values(), pool.keys.keys_a.grad, pool.keys.query.weight.grad]
        )
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
