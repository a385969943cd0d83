"""PEER's kernels against what they replace: outputs, gradients, updates, ties; and compiled for a GPU that is none.

Without a GPU they run in Triton's interpreter, on the processor's tensors.
"""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from growlm.layers import PEER, ProductKeyMemory, kernels, rows
from growlm.layers.product_keys import best_keys
from growlm.layers.rows import Choices, row_products, weighted_rows
from growlm.layers.tables import untouched_zeros
from growlm.training import optim
from growlm.training.optim import RowAdamW, _draws, _Rounding

pytest.importorskip("triton", reason="Triton is not installed: builds of torch for a GPU bring it")

from growlm.layers.kernels import product_keys as key_kernels
from growlm.layers.kernels import row_update as update_kernels
from growlm.layers.kernels import rows as row_kernels

# Padding times an infinite key is no number; numpy says so, a GPU does not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    # Of the interpreter of Triton 3.6.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
SCHEDULES = ["token", "expert"]
WIDTHS = [1, 7, 16, 18, 40]


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> Iterator[None]:
    """So that sizes that the interpreter can do have several."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            for name in ("_QUERIES", "_KEYS", "_FEATURES"):
                patch.setattr(key_kernels, name, 16)
            patch.setattr(key_kernels, "_SUMMED", 2)
            patch.setattr(update_kernels, "_WIDEST", 16)
        yield


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Layers use the kernels, or they do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "available", lambda tensor: on)
        yield


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def integers(most: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def close(found: Tensor, exact: Tensor) -> None:
    """In the dtype it should have, and as near to what is exact in float32 as that allows."""
    assert exact.dtype == torch.float32
    torch.testing.assert_close(found, exact.to(found.dtype))


# Rows of tables

SIZES = {
    "n": st.integers(0, 6),
    "s": st.integers(0, 9),
    "m": st.integers(1, 3),
    "d": st.sampled_from(WIDTHS),
    "experts": st.integers(1, 12),  # few: the same one more than once for a token, and for many tokens
    "dtype": st.sampled_from(DTYPES),
}


def inputs(n: int, s: int, m: int, d: int, experts: int, dtype: torch.dtype, strided: bool = False) -> list[Tensor]:
    """Tokens, weights, table and ids; `strided` are parts of larger tensors."""
    x, weights = draw(n, d, dtype=dtype), draw(n, s, m, seed=1, dtype=dtype)
    table, ids = draw(experts, m * d, seed=2, dtype=dtype), integers(experts, n, s, seed=3)
    if strided:
        x, table = torch.cat([x, x + 1], 1)[:, :d], torch.cat([table + 1, table], 1)[:, m * d :]
        weights, ids = weights.transpose(0, 2).contiguous().transpose(0, 2), ids.T.contiguous().T
    return [x, weights, table, ids]


@settings(max_examples=35)
@given(**SIZES, schedule=st.sampled_from(SCHEDULES), strided=st.booleans())
def test_products(schedule: str, **sizes: Any) -> None:
    x, _, table, ids = inputs(**sizes)
    wanted = (table.float()[ids].unflatten(-1, (sizes["m"], -1)) * x.float()[:, None, None]).sum(-1)
    found = row_kernels.products(x, table, ids, schedule=schedule)
    assert found.dtype == sizes["dtype"]
    close(found, wanted)
    torch.testing.assert_close(found, rows.products(x, table.contiguous(), ids), rtol=0.05, atol=0.2)


@settings(max_examples=35)
@given(**SIZES, strided=st.booleans())
def test_weighted_sum(**sizes: Any) -> None:
    _, weights, table, ids = inputs(**sizes)
    wanted = (table.float()[ids].unflatten(-1, (sizes["m"], -1)) * weights.float()[..., None]).sum((1, 2))
    found = row_kernels.weighted_sum(weights, table, ids)
    assert found.dtype == sizes["dtype"]
    close(found, wanted)
    if weights.numel():
        torch.testing.assert_close(found, rows.weighted_sum(weights, table.contiguous(), ids), rtol=0.02, atol=0.02)


@settings(max_examples=35)
@given(**SIZES, strided=st.booleans(), sparse=st.booleans())
def test_gradient_of_a_table(sparse: bool, **sizes: Any) -> None:
    x, weights, table, ids = inputs(**sizes)
    wanted = torch.zeros(sizes["experts"], sizes["m"] * sizes["d"], device=DEVICE)
    added = (weights.float()[..., None] * x.float()[:, None, None]).flatten(2).flatten(0, 1)
    wanted.index_add_(0, ids.flatten(), added)
    with switched(True):
        found = rows.table_gradient(weights, x, table, Choices(ids), sparse)
    assert found.is_sparse == sparse
    assert found.shape == table.shape
    assert found.dtype == sizes["dtype"]
    close(found.to_dense(), wanted)
    if sparse:
        assert found.is_coalesced()
        assert torch.equal(found.indices()[0], ids.unique())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_many_blocks(dtype: torch.dtype) -> None:
    """Wider than any block, more choices, and a row that is chosen again and again."""
    n, s, m, d = 5, 21, 2, 1100
    x, weights, table, ids = inputs(n, s, m, d, 4, dtype)
    ids[:, :15] = 2
    chosen = table.float()[ids].unflatten(-1, (m, d))
    for schedule in SCHEDULES:
        close(row_kernels.products(x, table, ids, schedule=schedule), (chosen * x.float()[:, None, None]).sum(-1))
    close(row_kernels.weighted_sum(weights, table, ids), (chosen * weights.float()[..., None]).sum((1, 2)))
    added = (weights.float()[..., None] * x.float()[:, None, None]).flatten(2).flatten(0, 1)
    _, order, starts = Choices(ids).by_row()
    wanted = torch.zeros(4, m * d, device=DEVICE).index_add_(0, ids.flatten(), added)
    close(row_kernels.gradient_of_rows(weights, x, order, starts), wanted[ids.unique()])


@pytest.mark.parametrize("kind", [torch.int64, torch.int32], ids=str)
def test_rows_beyond_2_to_the_31_elements(kind: torch.dtype) -> None:
    """Of a table that takes memory only where it was written."""
    d = 1024
    table = untouched_zeros(((1 << 21) + 3, d), torch.bfloat16, torch.device(DEVICE))
    assert table.numel() > 1 << 31
    table[-1], table[2] = draw(2, d, dtype=torch.bfloat16)
    ids = torch.tensor([[len(table) - 1, 2, len(table) - 1]], device=DEVICE).to(kind)
    x = draw(1, d, seed=1, dtype=torch.bfloat16)
    wanted = (table[ids[0].long()].float() * x.float()).sum(-1)
    for schedule in SCHEDULES:
        close(row_kernels.products(x, table, ids, schedule=schedule)[0, :, 0], wanted)
    close(row_kernels.weighted_sum(torch.ones(1, 3, 1, device=DEVICE).to(table), table, ids)[0],
          table[ids[0].long()].float().sum(0))  # fmt: skip
    first = untouched_zeros(tuple(table.shape), torch.float32, torch.device(DEVICE))
    update_kernels.update_rows(
        table, ids[0, :1], x, first, torch.zeros(len(table), device=DEVICE), *torch.ones(2, 1, device=DEVICE),
        betas=(0.9, 0.95), eps=1e-8, kept=1.0, noise=None, shifts=None,
    )  # fmt: skip
    torch.testing.assert_close(first[-1], 0.1 * x[0].float())
    assert not bool(first[:9].any())


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_through_the_layers_functions(dtype: torch.dtype, sparse: bool) -> None:
    """Each against the operators that it replaces, in float32."""
    x, weights, table, ids = inputs(6, 5, 2, 18, 9, dtype)
    results = []
    for on in (True, False):
        kind = dtype if on else torch.float32
        leaves = [t.to(kind, copy=True).requires_grad_() for t in (x, weights, table)]
        with switched(on):
            choices = Choices(ids)
            products = row_products(leaves[0], leaves[2], choices, sparse=sparse)
            sums = weighted_rows(leaves[1] + products, leaves[2], choices, sparse=sparse)
            # A sum's gradient has no memory of its own.
            (sums.sum() + (sums * draw(*sums.shape, seed=5, dtype=kind)).sum()).backward()
        results.append([products, sums, *(t.grad.to_dense() for t in leaves)])
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.float(), wanted, **({"rtol": 0.05, "atol": 0.3} if dtype == torch.bfloat16 else {})
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tokens_bits_depend_on_nothing_else(dtype: torch.dtype) -> None:
    """Neither on what is in the batch with it, nor on its place there."""
    x, weights, table, ids = inputs(5, 7, 2, 40, 5, dtype)
    there = torch.randperm(5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for part in (there, there[:2]):
        for schedule in SCHEDULES:
            whole, alone = (
                row_kernels.products(t, table, i, schedule=schedule) for t, i in ((x, ids), (x[part], ids[part]))
            )
            assert torch.equal(whole[part], alone)
        whole, alone = (row_kernels.weighted_sum(w, table, i) for w, i in ((weights, ids), (weights[part], ids[part])))
        assert torch.equal(whole[part], alone)
    if DEVICE == "cuda":  # products of the interpreter are numpy's, which are not so
        queries, keys = draw(40, 18), draw(50, 18, seed=1)
        whole, alone = key_kernels.best_keys(queries, keys, 4), key_kernels.best_keys(queries[11:13], keys, 4)
        assert all(torch.equal(a[11:13], b) for a, b in zip(whole, alone, strict=True))


def test_the_same_input_gives_the_same_bits() -> None:
    layer = PEER(18, 6 * 7, 2, 3, gated=True).to(DEVICE)
    x, seen = draw(9, 18), []
    for _ in range(2):
        one = copy.deepcopy(layer)
        with switched(True):
            out = one(x)
            out.square().sum().backward()
            RowAdamW(one.parameters(), lr=0.1).step()
        seen.append([out, *one.parameters(), *(p.grad.to_dense() for p in one.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_what_the_kernels_cannot_take_goes_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("not for a kernel")

    for module, names in (
        (row_kernels, ("products", "weighted_sum", "gradient_of_rows")), (key_kernels, ("best_keys", "best_sums")),
        (update_kernels, ("update_rows",)),
    ):  # fmt: skip
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    with switched(True):
        layer = PEER(8, 30, 2, 4).double().to(DEVICE)
        layer(draw(5, 8).double()).sum().backward()
        assert best_keys(draw(3, 8), draw(40, 8), 33)[0].shape == (3, 33)
        table = nn.Parameter(draw(6, 4).double())
        table.grad = torch.sparse_coo_tensor([[1, 2]], draw(2, 4).double(), (6, 4), check_invariants=False).to(DEVICE)
        RowAdamW([table], lr=0.1).step()
        assert not row_kernels.fits(draw(4, 6).T)


# Product keys


@settings(max_examples=25)
@given(
    count=st.integers(1, 70),
    k=st.integers(1, 20),
    q=st.integers(0, 20),
    z=st.sampled_from([1, 7, 18, 34]),
    values=st.sampled_from([1, 3, 1000]),  # how many different numbers: few make ties
    infinite=st.sampled_from([0.0, 0.0, 0.4, 1.0]),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_best_keys(count: int, k: int, q: int, z: int, values: int, infinite: float, strided: bool, seed: int) -> None:
    """Of whole numbers, whose products are exact; k up to all keys."""
    k = min(k, count)
    queries, keys = integers(values, q, z, seed=seed).float() + 1, integers(values, count, z, seed=seed + 1).float() - 1
    keys[torch.rand(count, generator=torch.Generator().manual_seed(seed)) < infinite, 0] = -torch.inf
    everything = queries @ keys.T
    if strided:
        queries, keys = torch.cat([queries, queries], 1)[:, z:], keys.T.contiguous().T
    scores, ids = key_kernels.best_keys(queries, keys, k)
    wanted = everything.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(scores, wanted.values[:, :k])
    assert torch.equal(ids, wanted.indices[:, :k])  # of equal ones the first


@pytest.mark.parametrize("k", [1, 4, 16])
def test_of_equal_scores_the_first_stay(k: int) -> None:
    """When a later block has better ones; and beside a query for which it has, when it has none."""
    keys = torch.ones(200, 2, device=DEVICE)
    keys[100:103, 0] = torch.tensor([2.0, 3.0, 2.0], device=DEVICE)
    scores, ids = key_kernels.best_keys(torch.eye(2, device=DEVICE), keys, k)
    assert ids.tolist() == [[101, 100, 102, *range(200)][:k], [*range(k)]]
    assert scores.tolist() == [[3, 2, 2, *[1] * 200][:k], [1] * k]


@settings(max_examples=10)
@given(k=st.integers(1, 12), q=st.integers(1, 20), seed=st.integers(0, 1000), all_keys=st.booleans())
def test_best_keys_and_their_gradients(k: int, q: int, seed: int, all_keys: bool) -> None:
    count = k if all_keys else k + 20
    results = []
    for on in (True, False):
        queries, keys = (draw(*shape, seed=seed).requires_grad_() for shape in ((q, 18), (count, 18)))
        with switched(on):
            scores, ids = best_keys(queries, keys, k)
            scores.backward(draw(q, k, seed=seed + 1))
        results.append([scores, ids, queries.grad, keys.grad])
    (scores, ids, *gradients), (wanted_scores, wanted_ids, *wanted) = results
    torch.testing.assert_close(scores, wanted_scores)
    # Scores of two keys that are as near as float32 rounds may change places.
    apart = torch.nn.functional.pad((wanted_scores[:, 1:] - wanted_scores[:, :-1]).abs() > 1e-4, (1, 1), value=True)
    distinct = apart[:, 1:] & apart[:, :-1]
    assert torch.equal(ids[distinct], wanted_ids[distinct])
    if bool((ids == wanted_ids).all()):
        torch.testing.assert_close(gradients, wanted)


def test_no_number_is_the_largest_score_and_ids_stay_those_of_keys() -> None:
    queries, keys = draw(5, 7), draw(23, 7, seed=1)
    queries[2], keys[9] = torch.nan, -torch.nan
    scores, ids = key_kernels.best_keys(queries, keys, 4)
    everything = queries @ keys.T
    assert torch.equal(ids[2], torch.arange(4, device=DEVICE))
    assert bool((ids[:, 0] == 9).sum() == 4)
    torch.testing.assert_close(scores, everything.gather(1, ids), equal_nan=True)
    both = key_kernels.best_sums(torch.full((2, 3), torch.nan, device=DEVICE), draw(2, 4), 5)
    assert bool(both[0].isnan().all())
    assert int(both[1].max()) < 3
    assert int(both[2].max()) < 4


def test_zeros_of_both_signs_are_equal() -> None:
    zeros = torch.tensor([[-0.0, 0.0, -0.0]], device=DEVICE)
    scores, i, j = key_kernels.best_sums(zeros, zeros[:, :1], 3)
    assert scores.tolist() == [[0, 0, 0]]
    assert (i.tolist(), j.tolist()) == ([[0, 1, 2]], [[0, 0, 0]])


@settings(max_examples=20)
@given(
    a=st.integers(1, 40),
    b=st.integers(1, 40),
    k=st.integers(1, 17),
    q=st.integers(0, 5),
    seed=st.integers(0, 1000),
    values=st.sampled_from([1, 3, 10**6]),
    infinite=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
)
def test_best_sums(a: int, b: int, k: int, q: int, seed: int, values: int, infinite: float) -> None:
    k = min(k, a * b)
    halves = []
    for size in (a, b):
        half = integers(values, q, size, seed=seed + size).float() - values // 2
        half[torch.rand(q, size, generator=torch.Generator().manual_seed(seed)) < infinite] = -torch.inf
        halves.append(half.sort(-1, descending=True).values[:, :k].requires_grad_())
    scores, i, j = key_kernels.best_sums(*halves, k)
    everything = (halves[0][:, :, None] + halves[1][:, None, :]).flatten(1)
    # Stable: of equal sums the smallest (i, j).
    wanted = everything.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(scores, wanted.values[:, :k])
    assert torch.equal(i * halves[1].shape[1] + j, wanted.indices[:, :k])
    weigh = draw(q, k, seed=seed)
    found = torch.autograd.grad((scores * weigh).sum(), halves, allow_unused=True) if q else ()
    kept = everything.gather(1, wanted.indices[:, :k])
    torch.testing.assert_close(found, torch.autograd.grad((kept * weigh).sum(), halves) if q else ())


# Whole layers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (PEER, {}), (PEER, {"scores": "sigmoid", "neurons_per_expert": 3, "query_norm": "layer"}),
        (PEER, {"gated": True, "query_norm": "none", "num_open": 4}), (ProductKeyMemory, {}),
    ],
    ids=["plain", "sigmoid", "gated", "memory"],
)  # fmt: skip
def test_a_layer_with_the_kernels_and_without(kind: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = kind(18, 6 * 7, 3, 5, dtype=dtype, **options).to(DEVICE)
    other, used = copy.deepcopy(layer), []
    results = []
    for module, on in ((layer, True), (other, False)):
        x = draw(2, 6, 18).requires_grad_()
        with switched(on), pytest.MonkeyPatch.context() as patch:
            for where, name in itertools.chain(
                ((row_kernels, n) for n in ("products", "weighted_sum", "gradient_of_rows")),
                ((key_kernels, n) for n in ("best_keys", "best_sums")),
            ):
                patch.setattr(where, name, _noting(used, getattr(where, name), on))
            out = module(x)
            out.backward(draw(*out.shape, seed=1))
        results.append([out, x.grad, *(p.grad for p in module.parameters())])
    assert {on for _, on in used} == {True}
    assert {name for name, _ in used} == {"products", "weighted_sum", "gradient_of_rows", "best_keys", "best_sums"}
    for found, wanted in zip(*results, strict=True):
        assert found.is_sparse == wanted.is_sparse
        assert found.dtype == wanted.dtype
        found, wanted = found.detach().to_dense(), wanted.detach().to_dense()
        apart = (found - wanted).abs().max() / wanted.abs().max()
        assert float(apart) < (3e-2 if dtype == torch.bfloat16 else 1e-5)


def _noting(used: list[tuple[str, bool]], function: Any, on: bool) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        used.append((function.__name__, on))
        return function(*arguments, **options)

    return call


# Updates


@settings(max_examples=20)
@given(
    count=st.integers(1, 12),
    w=st.sampled_from(WIDTHS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    second_moment=st.sampled_from(["row", "element"]),
    beta1=st.sampled_from([0.0, 0.3, 0.9]),
    decay=st.sampled_from([0.0, 0.1]),
    held=st.sampled_from([1, 40, 1 << 18]),  # rows that are rounded by the same draws: one, a few, all
    seed=st.integers(0, 1000),
)
def test_updates_are_those_of_the_optimiser(
    count: int, w: int, dtype: torch.dtype, second_moment: Any, beta1: float, decay: float, held: int, seed: int
) -> None:
    tables, states = [], []
    for on in (True, False):
        table = nn.Parameter(draw(count, w, seed=seed, dtype=dtype))
        optimizer = RowAdamW(
            [table], lr=0.02, betas=(beta1, 0.95), weight_decay=decay, second_moment=second_moment
        )  # fmt: skip
        torch.manual_seed(seed)
        with switched(on), pytest.MonkeyPatch.context() as patch:
            patch.setattr(optim, "_CACHED", held)
            for step in range(4):
                read = integers(2, count, seed=seed + step).nonzero()[:, 0]
                values = draw(len(read), w, seed=seed + step, dtype=dtype)
                table.grad = torch.sparse_coo_tensor(
                    read[None], values, table.shape, is_coalesced=True, check_invariants=False
                )
                optimizer.step()
        tables.append(table.detach())
        states.append(optimizer.state[table])
    assert states[0].keys() == states[1].keys()
    for name, found in states[0].items():
        assert found.dtype == states[1][name].dtype
        torch.testing.assert_close(found, states[1][name], rtol=1e-5, atol=1e-7)
    if dtype == torch.float32:
        torch.testing.assert_close(*tables, rtol=1e-5, atol=1e-6)
    else:  # as a number is rounded up or down by one draw, it hardly ever differs
        assert float((tables[0] != tables[1]).float().mean()) < 0.05
        torch.testing.assert_close(*tables, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("held", [40, 100, 1 << 18])
def test_rows_in_bfloat16_are_rounded_by_the_same_draws(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "_CACHED", held)
    tables = []
    for on in (True, False):
        table = nn.Parameter(draw(12, 18, dtype=torch.bfloat16))
        optimizer = RowAdamW([table], lr=0.003)
        torch.manual_seed(0)
        with switched(on):
            for step in range(3):
                values = draw(12, 18, seed=step, dtype=torch.bfloat16)
                table.grad = torch.sparse_coo_tensor(
                    torch.arange(12, device=DEVICE)[None], values, table.shape, is_coalesced=True,
                    check_invariants=False,
                )  # fmt: skip
                optimizer.step()
        tables.append(table.detach())
    assert float((tables[0] != tables[1]).float().mean()) < 0.02


def test_an_update_leaves_other_rows_their_bits() -> None:
    table = nn.Parameter(draw(50, 7, dtype=torch.bfloat16))
    before, read = table.detach().clone(), torch.tensor([3, 17, 49], device=DEVICE)
    table.grad = torch.sparse_coo_tensor(
        read[None], draw(3, 7, seed=1, dtype=torch.bfloat16), table.shape, is_coalesced=True, check_invariants=False
    )
    optimizer = RowAdamW([table], lr=0.1, weight_decay=0.5)
    with switched(True):
        optimizer.step()
    changed = (table != before).any(1).nonzero()[:, 0]
    assert torch.equal(changed, read)
    for state in optimizer.state[table].values():
        assert torch.equal(state.reshape(50, -1).any(1).nonzero()[:, 0], read)


def test_draws_are_those_of_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel rounds with the same numbers as the optimiser without it."""
    monkeypatch.setattr(optim, "_CACHED", 24)  # of 4 rows at a time
    table, x = draw(30, 6, dtype=torch.bfloat16), draw(11, 6, seed=1).cpu()
    torch.manual_seed(5)
    rounding = _Rounding(24)
    wanted = torch.cat([rounding(part) for part in x.split(4)])
    torch.manual_seed(5)
    noise, shifts = _draws(table, 11)
    drawn = noise.cpu().int().view(4, 6).repeat(3, 1)[:11] + shifts.cpu().repeat_interleave(4)[:11, None]
    bits = (x.view(torch.int32) + (drawn & 0xFFFF)) & -(1 << 16)
    assert torch.equal(bits.view(torch.float32).bfloat16(), wanted)


# Without a GPU


def process(code: str) -> str:
    """A new one, that knows of no interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    given = environment.get("PYTHONPATH", "").split(os.pathsep)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), *filter(None, given)])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_layers_need_no_triton() -> None:
    process("""
import sys
sys.modules["triton"] = None
import torch
from growlm.layers import PEER
from growlm.training.optim import RowAdamW
layer = PEER(8, 30, 2, 4)
layer(torch.randn(5, 8)).sum().backward()
RowAdamW(layer.parameters(), lr=0.1).step()
assert not [name for name in sys.modules if name.startswith("growlm.layers.kernels.")]
""")


COMPILE = """
import torch
from compiling import SHARED, compiled

with compiled() as launched:
    from growlm.layers.kernels import product_keys, row_update, rows

    for dtype, d, m, s in ((torch.bfloat16, 1024, 1, 128), (torch.float32, 1024, 2, 128), (torch.float16, 18, 3, 1),
                           (torch.bfloat16, 5120, 1, 128)):
        x, table, weights = (torch.zeros(shape, dtype=dtype) for shape in ((4, d), (64, m * d), (4, s, m)))
        ids = torch.zeros(4, s, dtype=torch.int64)
        rows.products(x, table, ids)
        rows.products(x, table, ids, schedule="expert")
        rows.weighted_sum(weights, table, ids)
        for starts in (torch.zeros(64, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)):
            rows.gradient_of_rows(weights, x, ids.flatten(), starts)
        for second in (torch.zeros(64), torch.zeros(64, m * d)):
            noise = torch.zeros(4 * m * d, dtype=torch.int16) if dtype == torch.bfloat16 else None
            shifts = None if noise is None else torch.zeros(1, dtype=torch.int32)
            row_update.update_rows(
                table, ids[:, 0], torch.zeros(4, m * d, dtype=dtype), torch.zeros(64, m * d), second,
                *torch.zeros(2, 4), betas=(0.9, 0.95), eps=1e-8, kept=1.0, noise=noise, shifts=shifts,
            )
    for k, width, stride in ((32, 256, 256), (1, 9, 1)):
        product_keys.best_keys(torch.zeros(64, width + stride)[:, stride:], torch.zeros(1024, width), k)
        half = torch.zeros(64, k, requires_grad=True)
        product_keys.best_sums(half, half, k)[0].sum().backward()

for name, kernels in launched.items():
    for kernel in kernels:
        assert len(kernel.asm["cubin"]) > 1000, name
        assert kernel.metadata.shared <= SHARED, (name, kernel.metadata.shared)
        print(name)
"""


def test_every_kernel_compiles_for_a_gpu() -> None:
    found = set(process(COMPILE).split())
    wanted = set()
    for module in (row_kernels, key_kernels, update_kernels):
        for name, value in vars(module).items():
            if getattr(getattr(value, "fn", None), "__module__", None) == module.__name__:
                wanted.add(name)
    assert wanted - found == {"_ordered", "_scores", "_best", "_worst", "_toward"}  # parts of others
