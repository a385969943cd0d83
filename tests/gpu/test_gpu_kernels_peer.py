"""PEER's kernels on a GPU, at the sizes that they are for: against the processor, and that they wait for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from growlm.layers import PEER, kernels
from growlm.layers.product_keys import best_keys, best_sums
from growlm.layers.rows import Choices, products, table_gradient, weighted_sum
from growlm.layers.tables import free_bytes

pytestmark = pytest.mark.gpu
D, CHOICES = 1024, 128


@pytest.fixture(autouse=True)
def _compiles(device: str) -> None:
    if not kernels.available(torch.device(device)):
        pytest.skip("Triton cannot compile for this device")


@contextmanager
def never_waiting() -> Iterator[None]:
    """Nothing in it reads back from the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("experts", [3, 5000])
def test_rows(device, near, experts, dtype):
    """A few that all tokens choose, or many that few do."""
    from growlm.layers.kernels import rows

    n = 100
    x, weights, table = draw(n, D).to(dtype), draw(n, CHOICES, 1, seed=1).to(dtype), draw(experts, D, seed=2).to(dtype)
    ids = torch.randint(experts, (n, CHOICES), generator=torch.Generator().manual_seed(3))
    there = [t.to(device) for t in (x, weights, table, ids)]
    wanted = products(x.float(), table.float(), ids)
    for schedule in ("token", "expert"):
        found = rows.products(there[0], there[2], there[3], schedule=schedule)
        near(f"kernels: products by {schedule}", found, wanted, dtype)
    with never_waiting():
        choices = Choices(there[3])
        sums = weighted_sum(there[1], there[2], there[3])
        dense = table_gradient(there[1], there[0], there[2], choices, False)
    near("kernels: weighted sum", sums, weighted_sum(weights.float(), table.float(), ids), dtype)
    gradient = table_gradient(weights.float(), x.float(), table.float(), Choices(ids), False)
    near("kernels: dense gradient", dense, gradient, dtype)
    near("kernels: sparse gradient", table_gradient(there[1], there[0], there[2], choices, True), gradient, dtype)


@pytest.mark.parametrize("k", [1, 16, 32])
def test_retrieval(device, near, k):
    queries, keys = draw(1000, 256), draw(1024, 256, seed=1)
    scores, ids = best_keys(queries, keys, k)
    sums = best_sums(scores, scores, k)
    there = [t.to(device) for t in (queries, keys, scores)]
    best_sums(there[2], there[2], k)  # which pairs there are is sent once
    with never_waiting():
        found = best_keys(there[0], there[1], k)
        found_sums = best_sums(there[2], there[2], k)
    near("kernels: best keys", found[0], scores)
    near("kernels: scores of the ids", (queries @ keys.T).gather(1, found[1].cpu()), scores)
    assert float((found[1].cpu() != ids).float().mean()) < 1e-3  # near-ties alone
    assert torch.equal(found_sums[0].cpu(), sums[0])


def test_rows_beyond_2_to_the_31_elements(device, near):
    if (free_bytes(torch.device(device)) or 0) < 6 << 30:
        pytest.skip("not 6 GB free")
    table = torch.zeros((1 << 21) + 3, D, dtype=torch.bfloat16, device=device)
    table[-1] = draw(D).to(table)
    ids = torch.tensor([[len(table) - 1, 0]], device=device)
    near("kernels: the last row", weighted_sum(torch.ones(1, 2, 1).to(table), table, ids), draw(1, D), table.dtype)
    x = draw(1, D, seed=1).to(table)
    near("kernels: the last row's product", products(x, table, ids)[0, :1, 0], (x.float() * table[-1].float()).sum(1),
         table.dtype)  # fmt: skip


def test_the_same_input_gives_the_same_bits(device):
    torch.manual_seed(0)
    pool = PEER(256, 32 * 32, 8, 16, device=device).eval()
    x, seen = draw(300, 256).to(device), []
    for _ in range(3):
        pool.zero_grad()
        out = pool(x)
        out.square().sum().backward()
        seen.append([out, pool.up.grad._values(), pool.down.grad._values(), pool.keys.keys_a.grad])
    for again in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], again, strict=True))
