"""PEER against plain loops: retrieval over all keys, experts one by one, gradients; growth, memory, bad sizes."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from growlm.layers import PEER, ProductKeyMemory, ProductKeys, product_keys, retrievals, rows, tables
from growlm.layers.product_keys import best_keys, best_sums, sub_key_counts
from growlm.layers.rows import Choices, row_products, weighted_rows

D = 12


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (2, 15)), D, generator=generator, dtype=dtype).requires_grad_(True)


def normalised(keys: ProductKeys, x: Tensor) -> Tensor:
    """Queries (n, h, z), written out."""
    queries = (x @ keys.query.weight.T).view(len(x), keys.num_heads, keys.key_size)
    norm = keys.norm
    if norm is None:
        return queries
    across, shape = (0, queries.shape[1:]) if isinstance(norm, nn.BatchNorm1d) else (-1, (keys.key_size,))
    mean, var = queries.mean(across, keepdim=True), queries.var(across, unbiased=False, keepdim=True)
    if isinstance(norm, nn.BatchNorm1d) and (len(x) < 2 or not norm.training):
        mean, var = norm.running_mean.view(shape), norm.running_var.view(shape)
    return (queries - mean) / (var + norm.eps).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)


def all_scores(keys: ProductKeys, x: Tensor) -> Tensor:
    """Of every key that can be found, (n, h, N)."""
    whole = [torch.cat([a, b]) for a in keys.keys_a[: keys.num_open] for b in keys.keys_b]
    return torch.einsum("nhz,ez->nhe", normalised(keys, x), torch.stack(whole))


def reference(layer: PEER, hidden: Tensor) -> Tensor:
    """The equation, a token, a head and an expert at a time."""
    x = hidden.reshape(-1, D)
    scores, experts = all_scores(layer.keys, x).topk(layer.keys.top_k, -1)
    gates = scores.softmax(-1) if layer.scores == "softmax" else scores.sigmoid()
    f = layer.neurons_per_expert
    out = []
    for i in range(len(x)):
        total = torch.zeros_like(x[i])
        for gate, e in zip(gates[i].flatten(), experts[i].flatten(), strict=True):
            inner = layer.up[e].view(-1, D) @ x[i]
            inner = F.gelu(inner[:f]) * inner[f:] if layer.gated else F.gelu(inner)
            total = total + gate * (inner @ layer.down[e].view(f, D))
        out.append(total)
    return torch.stack(out).view(hidden.shape)


def same_gradients(got: Tensor, want: Tensor, leaves: list[Tensor], rtol: float = 1e-4, atol: float = 1e-6) -> None:
    weigh = torch.randn_like(got)
    pairs = zip(
        torch.autograd.grad((got * weigh).sum(), leaves, retain_graph=True),
        torch.autograd.grad((want * weigh).sum(), leaves),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a.to_dense(), b, rtol=rtol, atol=atol)


# The whole layer


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 12),
    sub_keys=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    heads=st.integers(1, 3),
    k=st.integers(1, 8),
    f=st.integers(1, 3),
    gated=st.booleans(),
    scores=st.sampled_from(["softmax", "sigmoid"]),
    norm=st.sampled_from(["batch", "layer", "none"]),
)
def test_equals_a_loop(n, sub_keys, heads, k, f, gated, scores, norm) -> None:
    torch.manual_seed(n)
    count = sub_keys[0] * sub_keys[1]
    layer = PEER(
        D, count, heads, min(k, count), scores=scores, neurons_per_expert=f, gated=gated, query_norm=norm,
        sub_keys=sub_keys,
    ).double()  # fmt: skip
    x = tokens(1, n, dtype=torch.float64)
    out, wanted = layer(x), reference(layer, x)
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-8)
    leaves = [x, *(p for name, p in layer.named_parameters() if norm != "batch" or n > 1 or "norm" not in name)]
    same_gradients(out, wanted, leaves)


def test_float32_equals_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """In many parts, as large inputs go."""
    monkeypatch.setattr(rows, "_CACHED", 3 * 8 * D * 4)  # three tokens' rows
    monkeypatch.setattr(product_keys, "_HELD", 70)
    torch.manual_seed(0)
    layer, x = PEER(D, 30, 2, 4), tokens()
    out, wanted = layer(x), reference(layer, x)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-6)
    same_gradients(out, wanted, [x, *layer.parameters()], rtol=1e-3, atol=1e-5)


def test_product_key_memory_equals_a_loop() -> None:
    torch.manual_seed(0)
    layer, x = ProductKeyMemory(D, 30, 2, 4), tokens(9)
    scores, ids = all_scores(layer.keys, x).topk(4, -1)
    wanted = torch.einsum("nhk,nhkd->nd", scores.softmax(-1), layer.values[ids])
    out = layer(x)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-6)
    same_gradients(out, wanted, [x, *layer.parameters()], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sparse", [True, False])
def test_gradcheck(sparse: bool) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[0, 3, 3], [5, 0, 1], [3, 3, 3], [2, 1, 0]])  # one row twice for a token, row 4 never
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    table = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    masked = {"masked": False} if sparse else {}
    check = torch.autograd.gradcheck
    assert check(lambda x, t: row_products(x, t, Choices(ids), sparse=False), (x, table), **masked)
    assert check(lambda w, t: weighted_rows(w, t, Choices(ids), sparse=False), (weights, table), **masked)
    if sparse:
        for made in (lambda: row_products(x, table, Choices(ids)), lambda: weighted_rows(weights, table, Choices(ids))):
            (grad,) = torch.autograd.grad(made().square().sum(), table)
            assert grad.is_sparse
            assert grad.is_coalesced()
            assert grad.indices().tolist() == [[0, 1, 2, 3, 5]]
    queries = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert check(lambda q, c: best_keys(q, c, 2)[0], (queries, keys))


def test_gradients_of_tables_are_the_rows_that_were_read() -> None:
    layer, x = PEER(D, 400, 2, 3), tokens(2, 5)
    with retrievals() as found:
        layer(x).square().sum().backward()
    read = found[0].experts.unique()
    for table in (layer.up, layer.down):
        assert table.grad is not None
        assert table.grad.is_sparse
        assert torch.equal(table.grad.coalesce().indices()[0], read)
    # A second pass adds to it.
    first = layer.up.grad.to_dense()
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.up.grad.to_dense(), 2 * first)


def test_no_tensor_of_all_chosen_rows_is_kept() -> None:
    """What autograd keeps is smaller than tokens x heads x k x d."""
    layer, x = PEER(64, 400, 4, 8), torch.randn(2, 50, 64, requires_grad=True)
    kept: list[int] = []
    tables = {layer.up.data_ptr(), layer.down.data_ptr()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in tables:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert max(kept) <= 2 * 50 * 4 * 64
    assert max(kept) < 2 * 50 * 4 * 8 * 64 / 4


def test_bfloat16_rows() -> None:
    torch.manual_seed(0)
    layer = PEER(D, 30, 2, 4, neurons_per_expert=2, gated=True)
    low = copy.deepcopy(layer)
    low.up.data, low.down.data = low.up.bfloat16(), low.down.bfloat16()
    x = tokens()
    out = low(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, layer(x), rtol=0.05, atol=0.01)
    out.sum().backward()
    assert low.up.grad is not None
    assert low.up.grad.dtype == torch.bfloat16
    torch.testing.assert_close(
        low.up.grad.to_dense().float(),
        torch.autograd.grad(layer(x).sum(), layer.up)[0].to_dense(),
        rtol=0.1,
        atol=0.02,
    )


def test_autocast_chooses_by_float32_scores() -> None:
    layer, x = PEER(D, 900, 2, 4).eval(), tokens().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16), retrievals() as found:
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert found[0].scores.dtype == torch.float32
    out.float().sum().backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiles() -> None:
    torch.manual_seed(0)
    layer, x = PEER(D, 30, 2, 4), tokens()
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager")
    out, wanted = compiled(x), layer(x)
    torch.testing.assert_close(out, wanted)
    out.sum().backward()
    wanted.sum().backward()
    got = dict(compiled._orig_mod.named_parameters())
    for name, p in layer.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(got[name].grad.to_dense(), p.grad.to_dense(), msg=name)


def test_starts_at_the_stated_scale() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 400, 64)
    for options in ({}, {"scores": "sigmoid"}, {"neurons_per_expert": 2}, {"query_norm": "none"}):
        for layer in (PEER, ProductKeyMemory):
            if layer is ProductKeyMemory and "neurons_per_expert" in options:
                continue
            out = layer(64, 4096, 4, 8, output_rms=0.5, **options)(x)
            assert 0.3 < float(out.detach().square().mean().sqrt()) < 0.75, options


@pytest.mark.parametrize("which", ["dropout", "query_dropout"])
def test_dropout_is_for_training(which: str) -> None:
    layer, x = PEER(D, 30, 2, 4, **{which: 0.5}), tokens()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer, x = PEER(D, 30, 2, 4, dropout=0.5, query_norm="none"), tokens().detach()
    layer.requires_grad_(False)
    mean = layer(x.expand(4000, *x.shape)).mean(0)
    layer.eval()
    assert float((mean - layer(x)).norm() / layer(x).norm()) < 0.06


def test_layers_keep_no_state_and_tell_who_watches() -> None:
    layer, x = PEER(D, 30, 2, 4).eval(), tokens()
    before = {name: set(vars(module)) for name, module in layer.named_modules()}
    with retrievals() as found:
        layer(x)
    layer(x)
    assert len(found) == 1
    assert found[0].experts.shape == found[0].gates.shape == (30, 2, 4)
    torch.testing.assert_close(found[0].gates.sum(-1), torch.ones(30, 2))
    assert {name: set(vars(module)) for name, module in layer.named_modules()} == before


def test_a_token_by_itself() -> None:
    layer, x = PEER(D, 30, 2, 4), tokens(3)
    layer.eval()
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


def test_no_tokens() -> None:
    layer = PEER(D, 30, 2, 4)
    x = torch.zeros(2, 0, D, requires_grad=True)
    out = layer(x)
    assert out.shape == (2, 0, D)
    out.sum().backward()


# Retrieval


@settings(max_examples=40, deadline=None)
@given(
    a=st.integers(1, 40),
    b=st.integers(1, 40),
    k=st.integers(1, 24),
    m=st.integers(1, 6),
    seed=st.integers(0, 1000),
    values=st.sampled_from([1, 3, 10**6]),  # how many different numbers: few make ties
    infinite=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
)
def test_best_sums_are_those_of_all_pairs(a, b, k, m, seed, values, infinite) -> None:
    k = min(k, a * b)
    random = torch.Generator().manual_seed(seed)
    halves = []
    for size in (a, b):
        half = torch.randint(values, (m, size), generator=random).float()
        half[torch.rand(m, size, generator=random) < infinite] = -torch.inf
        halves.append(half)
    (sa, ia), (sb, ib) = (half.topk(min(k, half.shape[1]), -1) for half in halves)
    scores, i, j = best_sums(sa, sb, k)
    everything = (halves[0][:, :, None] + halves[1][:, None, :]).flatten(1)
    assert torch.equal(scores, everything.topk(k, -1).values)
    ids = ia.gather(1, i) * b + ib.gather(1, j)
    assert torch.equal(everything.gather(1, ids), scores)  # they are where they are said to be
    assert all(len(set(row)) == k for row in ids.tolist())  # and none twice


@settings(max_examples=30, deadline=None)
@given(
    keys=st.integers(1, 3000),
    k=st.integers(1, 24),
    m=st.integers(1, 700),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_best_keys_are_those_of_all(keys: int, k: int, m: int, ties: bool, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    queries, table = (torch.randint(-3, 4, (rows, 2 if ties else 6), generator=random).float() for rows in (m, keys))
    scores, ids = best_keys(queries, table, k)
    everything = queries @ table.T
    assert torch.equal(scores, everything.topk(min(k, keys), -1).values)
    assert torch.equal(everything.gather(1, ids), scores)
    assert all(len(set(row)) == min(k, keys) for row in ids.tolist())


def test_retrieval_over_a_large_pool() -> None:
    torch.manual_seed(0)
    keys = ProductKeys(D, 120 * 80, 4, 16, key_size=8, sub_keys=(120, 80)).eval()
    x = tokens(20).detach()
    scores, experts = keys(x)
    everything = all_scores(keys, x)
    torch.testing.assert_close(scores, everything.topk(16, -1).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(everything.gather(-1, experts), scores, rtol=1e-5, atol=1e-5)


def test_a_head_that_finds_nothing_adds_nothing() -> None:
    layer, x = PEER(D, 9, 1, 2, query_norm="none"), tokens(4)
    search = layer.keys.search
    layer.keys.search = lambda q: (torch.full_like(search(q)[0], -torch.inf), search(q)[1])  # type: ignore[method-assign]
    out = layer(x)
    assert torch.equal(out, torch.zeros_like(out))


def test_a_tokens_result_does_not_depend_on_the_batch() -> None:
    layer, x = PEER(D, 900, 2, 4), tokens(64).detach()
    layer(x)
    layer.eval()
    torch.testing.assert_close(layer(x)[:3], layer(x[:3]), rtol=1e-5, atol=1e-6)


def test_batch_norm_is_torchs_and_leaves_padding_out() -> None:
    torch.manual_seed(0)
    ours, torchs = ProductKeys(D, 30, 2, 4, key_size=8), nn.BatchNorm1d(16)
    x = tokens(50).detach()
    padded = torch.cat([x, torch.full((30, D), 100.0)])
    mask = torch.arange(80) < 50
    wanted = torchs(ours.query(x)).view(50, 2, 8)
    torch.testing.assert_close(ours.queries(padded, mask)[:50], wanted, rtol=1e-4, atol=1e-5)
    assert ours.norm is not None
    torch.testing.assert_close(ours.norm.state_dict(), torchs.state_dict())
    ours.eval(), torchs.eval()
    torch.testing.assert_close(ours.queries(x), torchs(ours.query(x)).view(50, 2, 8), rtol=1e-4, atol=1e-5)
    # Whatever stands in padding: what is computed from it may be no number.
    ours.train()
    nothing = torch.cat([x, torch.full((30, D), torch.nan)])
    torch.testing.assert_close(ours.queries(nothing, mask)[:50], wanted, rtol=1e-4, atol=1e-5)
    torchs.train(), torchs(ours.query(x))
    torch.testing.assert_close(ours.norm.state_dict(), torchs.state_dict())
    ours.eval()
    # A lone token has no variance: it goes by the running statistics.
    before = copy.deepcopy(ours.norm.state_dict())
    evaluated = ours.queries(x[:1])
    ours.train()
    torch.testing.assert_close(ours.queries(x[:1]), evaluated)
    assert torch.equal(ours.norm.state_dict()["running_var"], before["running_var"])


def test_the_gradient_leaves_padding_out_too() -> None:
    torch.manual_seed(0)
    norm, x = ProductKeys(D, 30, 2, 4, key_size=8).norm, torch.randn(9, 16, dtype=torch.float64)
    assert norm is not None
    norm = norm.double()
    mask, weigh = torch.arange(9) < 6, torch.randn(9, 16, dtype=torch.float64)
    found, wanted = (x.clone().requires_grad_(True) for _ in range(2))
    (norm(found, mask) * weigh)[:6].sum().backward()
    (norm(wanted[:6]) * weigh[:6]).sum().backward()
    assert found.grad is not None
    torch.testing.assert_close(found.grad, wanted.grad)


@pytest.mark.parametrize("padded", [False, True])
def test_a_gradient_is_of_its_own_pass(padded: bool) -> None:
    """Passes that train, between a pass and its gradient, change the statistics and not the gradient."""
    layer, x = PEER(D, 30, 2, 4), tokens()
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[1, 9:] = not padded
    layer(tokens(9, seed=1), None)
    for training in (False, True):
        layer.train(training)
        wanted = torch.autograd.grad(layer(x, mask if padded else None).square().sum(), x)[0]
        out = layer(x, mask if padded else None)
        layer.train()
        layer(3 * tokens(9, seed=2))
        assert torch.equal(torch.autograd.grad(out.square().sum(), x)[0], wanted)


def test_query_norm_makes_use_even() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 64) + 3 * torch.randn(64)  # features whose means differ, as hidden states' do
    used = {n: ProductKeys(64, 1024, 4, 8, key_size=32, query_norm=n)(x)[1].unique().numel() for n in ("batch", "none")}
    assert used["batch"] > 1.5 * used["none"]


def test_rows_that_are_not_open_change_nothing() -> None:
    torch.manual_seed(0)
    small = PEER(D, 8 * 6, 2, 5, sub_keys=(8, 6))
    large = PEER(D, 11 * 6, 2, 5, sub_keys=(11, 6), num_open=8)
    with torch.no_grad():
        for name, p in large.named_parameters():
            old = small.get_parameter(name)
            p[: len(old)] = old
    for mode in (True, False):
        small.train(mode), large.train(mode)
        x = tokens(3, 7)
        with retrievals() as found:
            a, b = small(x), large(x)
        assert torch.equal(a, b)
        assert torch.equal(found[0].experts, found[1].experts)
    large.keys.num_open = 11
    with torch.no_grad():
        large.keys.keys_a[8:] *= 100
    with retrievals() as found:
        large(x)
    assert (found[0].experts >= 48).any()


@pytest.mark.parametrize(("number", "pair"), [(1024**2, (1024, 1024)), (1000, (25, 40)), (7, (1, 7)), (1, (1, 1))])
def test_sub_keys_are_the_nearest_factors(number: int, pair: tuple[int, int]) -> None:
    assert sub_key_counts(number) == pair
    keys = ProductKeys(D, number, 1, 1)
    assert (len(keys.keys_a), len(keys.keys_b)) == pair


# Bad sizes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_experts": 65_537}, "num_experts is 65537, at best 1 x 65537 .* use 65536 or 65538"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"top_k": 37}, "top_k is 37, expected 1 to the experts that can be found, 36"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 13, "num_open": 2}, "top_k is 13, expected 1 to the experts that can be found, 12"),
        ({"num_open": 7}, "num_open is 7, expected 1 to the rows of side a, 6"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"key_size": 7}, "key_size is 7, expected an even number"),
        ({"sub_keys": (5, 7)}, "5 x 7 = 35 keys, expected num_experts, 36"),
        ({"query_norm": "rms"}, "query_norm 'rms'"),
        ({"scores": "relu"}, "scores 'relu'"),
        ({"neurons_per_expert": 0}, "neurons_per_expert is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"hidden_size": 0}, "hidden_size is 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PEER(**{"hidden_size": D, "num_experts": 36, "num_heads": 2, "top_k": 4, **options})


@pytest.mark.parametrize("layer", [PEER, ProductKeyMemory])
def test_a_pool_larger_than_memory_is_refused_before_it_is_made(layer: type[nn.Module]) -> None:
    with pytest.raises(MemoryError, match=r"the rows of 10000000000 experts need [\d,]+ bytes, and [\d,]+ are free"):
        layer(1024, 10**10)
    with torch.device("meta"):  # nothing is taken there
        assert math.prod(layer(1024, 10**10).keys.keys_a.shape) > 0


def test_room_is_counted_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 100 * D * 4 * 2
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(tables, "free_bytes", lambda device, free=free: free)
        if fits:
            assert PEER(D, 100).up.shape == (100, D)
        else:
            with pytest.raises(MemoryError, match=f"need {needed:,} bytes, and {free:,} are free"):
                PEER(D, 100)


@pytest.mark.slow
def test_the_limit_of_a_process_counts() -> None:
    """What is free on the machine may not be to be had by this process."""
    code = """
import resource
from pathlib import Path
import torch
from growlm.layers import PEER
from growlm.layers.tables import free_bytes, new_table
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (100 << 20),) * 2)
print(50 << 20 < free_bytes(torch.device("cpu")) <= 100 << 20)
for make in (lambda: PEER(256, 512 * 512), lambda: new_table(512 * 512, 256, device="cpu", dtype=torch.float32)):
    try:
        make()
    except MemoryError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    counted, refused, asked = done.stdout.splitlines()
    assert counted == "True"
    assert refused.startswith("the rows of 262144 experts need 536,870,912 bytes, and ")
    assert asked.startswith("268,435,456 bytes for a table cannot be had (Cannot allocate memory); ")


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert tables._free_of_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert tables._free_of_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 2500\ninactive_file 700\n")
    assert tables._free_of_container(tmp_path) == 1700


@pytest.mark.slow
def test_importing_layers_takes_torch_alone() -> None:
    code = "import sys, growlm.layers; print(any(m in sys.modules for m in ('transformers', 'datasets', 'numpy.ma')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
