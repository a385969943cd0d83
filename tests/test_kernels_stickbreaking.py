"""Stick-breaking attention in Triton: against its definition, outputs and gradients; what it leaves out; what compiles.

Without a GPU under Triton's interpreter (`conftest.py`), which takes some milliseconds a block: blocks are small here,
so that few tokens are several blocks of queries and of keys. It cuts bfloat16 off where a GPU rounds, so that errors
are twice as large.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from growlm.layers import stickbreaking
from growlm.layers.kernels import stickbreaking as kernels
from growlm.layers.kernels.stickbreaking_kernels import INTERPRETED
from growlm.layers.stickbreaking import stickbreaking_reference

TESTS = Path(__file__).parent
DEVICE = "cpu" if INTERPRETED else "cuda"
CUT = kernels.Blocks(rows=16, keys=16, warps=4, stages=1, chunk=2)
SHARED_MEMORY = 227 << 10  # bytes that a program may have, of capability 9.0


@triton.jit
def count_kernel(out, number):
    for i in range(number + tl.program_id(0)):
        tl.store(out + i, i)


@pytest.fixture(scope="module")
def _somewhere_to_run():
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device, and Triton was imported without TRITON_INTERPRET=1")
    out = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    try:
        count_kernel[(1,)](out, 3)
    except Exception as error:
        # What Triton 3.6 does to count is deprecated in numpy, and refused from 2.4 on.
        if INTERPRETED and ("0-dimensional" in str(error) or "ndim > 0" in str(error)):
            pytest.skip(f"the interpreter of Triton {triton.__version__} does not run with this numpy")
        raise
    assert out.tolist() == [0, 1, 2]


pytestmark = pytest.mark.usefixtures("_somewhere_to_run")


def make(
    b: int = 1, h: int = 2, g: int = 1, t: int = 40, s: int | None = None, d: int = 7, e: int = 18, *,
    seed: int = 0, shift: float = 0.0, dtype: torch.dtype = torch.float32,
) -> list[Tensor]:  # fmt: skip
    """Queries, keys, values; a negative `shift` of all logits lets sticks last, a positive one uses them up."""
    random = torch.Generator().manual_seed(seed)
    s = t if s is None else s
    q, k, v = (torch.randn(shape, generator=random) for shape in ((b, h, t, d), (b, g, s, d), (b, g, s, e)))
    if shift:
        q[..., 0], k[..., 0] = d**0.5, shift
    return [x.to(DEVICE, dtype) for x in (q, k, v)]


def weighting(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)


def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, grad: Tensor | None = None, **rest: Any) -> Any:
    """The output, and the gradients of queries, keys and values."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = {"cut": CUT} | rest
    out, exact = kernels.forward(q, k, v, scale, **options)
    return [out, *kernels.backward(weighting(out) if grad is None else grad, exact, q, k, v, scale, **options)]


def wanted(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> list[Tensor]:
    exact = [x.double().requires_grad_(True) for x in (q, k, v)]
    out, _ = stickbreaking_reference(*exact, **options)
    weigh = weighting(torch.empty_like(out, dtype=q.dtype)).double()
    return [out.detach(), *torch.autograd.grad((out * weigh).sum(), exact)]


def apart(found: Tensor, want: Tensor) -> float:
    """Of the largest magnitude that is wanted."""
    assert found.shape == want.shape
    return float((found.double() - want).abs().max() / (want.abs().max() + 1e-6))


@settings(max_examples=8)
@given(
    b=st.integers(1, 2),
    g=st.integers(1, 2),
    shared=st.integers(1, 2),
    t=st.integers(1, 40),
    past=st.integers(0, 40),
    widths=st.sampled_from([(1, 5), (7, 18), (16, 16), (33, 8)]),
    masked=st.sampled_from(["nothing", "padding", "whole"]),
    packed=st.sampled_from(["nothing", "in order", "in no order"]),
    shift=st.sampled_from([0.0, -6.0, 4.0]),
    banded=st.booleans(),
    seed=st.integers(0, 99),
)
@example(1, 1, 2, 40, 17, (7, 18), "whole", "in order", -6.0, False, 0)
@example(2, 1, 1, 35, 30, (16, 16), "padding", "in order", -6.0, True, 1)
@example(1, 2, 1, 33, 0, (7, 18), "nothing", "in no order", -6.0, False, 2)
@example(1, 1, 1, 40, 40, (1, 5), "nothing", "nothing", 4.0, False, 3)
def test_kernels_equal_the_reference(
    b: int, g: int, shared: int, t: int, past: int, widths: tuple[int, int], masked: str, packed: str, shift: float,
    banded: bool, seed: int,
) -> None:  # fmt: skip
    q, k, v = make(b, g * shared, g, t, t + past, *widths, seed=seed, shift=shift)
    random = torch.Generator().manual_seed(seed)
    mask = documents = None
    if masked != "nothing":
        mask = torch.rand(b, 1, t if masked == "whole" else 1, t + past, generator=random).to(DEVICE) < 0.8
    if packed != "nothing":
        documents = torch.randint(0, 2, (b, t + past), generator=random).to(DEVICE)
        documents = documents.cumsum(-1) // 7 if packed == "in order" else documents
    with pytest.MonkeyPatch.context() as patch:
        if banded:  # two blocks of queries
            patch.setattr(kernels, "STATE_BYTES", 8 * b * g * shared * math.ceil((t + past) / 16) * 33)
        found = run(q, k, v, mask=mask, documents=documents)
    for got, want in zip(found, wanted(q, k, v, mask=mask, documents=documents), strict=True):
        assert apart(got, want) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shift", [0.0, -6.0])
def test_16_bits_lose_no_more_than_their_inputs_do(dtype: torch.dtype, shift: float) -> None:
    q, k, v = make(t=50, s=60, d=16, e=16, shift=shift, dtype=dtype)
    found = run(q, k, v, cut=CUT._replace(rows=32))
    assert {x.dtype for x in found} == {dtype}
    digit = torch.finfo(dtype).eps * (2 if INTERPRETED and dtype == torch.bfloat16 else 1)
    for got, want, limit in zip(found, wanted(q, k, v), (digit / 2, digit, digit, digit), strict=True):
        assert apart(got, want) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("s", "splits", "shift"), [(100, 1, -3.0), (100, 3, -3.0), (540, 40, -6.0)])
def test_decode_equals_the_whole_pass(dtype: torch.dtype, s: int, splits: int, shift: float) -> None:
    """The last queries of all. Splits end where much or little of the sticks is left; forty are combined in three
    rounds."""
    q, k, v = make(1, 4, 2, 3, s, shift=shift, dtype=dtype)
    scale = q.shape[-1] ** -0.5
    mask = torch.ones(1, 1, 3, s, dtype=torch.bool, device=DEVICE)
    mask[..., :40] = mask[:, :, 1, s - 20 : s - 10] = False
    documents = (torch.arange(s, device=DEVICE) > 29).long()[None]
    for options in ({}, {"mask": mask, "documents": documents}):
        out, exact = kernels.decode(q, k, v, scale, cut=CUT, splits=splits, **options)
        whole, _ = stickbreaking_reference(q.double(), k.double(), v.double(), **options)
        assert out.dtype == dtype
        assert exact.dtype == torch.float32
        assert apart(exact, whole) < (1e-5 if dtype == torch.float32 else 2**-7)
        assert torch.equal(out, exact.to(dtype)) or (INTERPRETED and apart(out, whole) < 2**-6)


def test_a_split_of_which_nothing_is_seen_takes_nothing() -> None:
    q, k, v = make(1, 2, 1, 1, 200, shift=-3.0)
    documents = (torch.arange(200, device=DEVICE) >= 150)[None].long()
    k[:, :, :140], v[:, :, :140] = math.nan, math.nan  # whole blocks of the other document
    out, _ = kernels.decode(q, k, v, 0.4, documents=documents, cut=CUT, splits=6)
    alone, _ = stickbreaking_reference(q, k[:, :, 150:], v[:, :, 150:], scale=0.4)
    assert apart(out, alone.double()) < 1e-5


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # what the other documents' own queries compute
def test_blocks_of_other_documents_are_not_read() -> None:
    """Five documents, of which the third ends where blocks do, or nearly. Not to be read by its queries, nor for its
    keys: all others; or, where a block is shared with a neighbour, all but the neighbours. That is no number here."""
    q, k, v = make(1, 2, 1, 112, shift=-6.0)
    grad = weighting(v.new_empty(1, 2, 112, 18))
    for first, last in ((32, 64), (31, 65), (33, 63)):
        bounds = torch.tensor([16, first, last, 96], device=DEVICE)
        documents = torch.bucketize(torch.arange(112, device=DEVICE), bounds, right=True)[None]
        part = slice(first, last)
        alone = run(q[:, :, part], k[:, :, part], v[:, :, part], grad=grad[:, :, part])
        poisoned = [x.clone() for x in (q, k, v, grad)]
        for x in poisoned:
            x[:, :, : 16 if first % 16 else first] = x[:, :, 96 if last % 16 else last :] = math.nan
        found = run(*poisoned[:3], grad=poisoned[3], documents=documents)
        for got, want in zip(found, alone, strict=True):
            assert apart(got[:, :, part], want.double()) < 1e-5


def test_the_walk_ends_where_all_is_used_up() -> None:
    """And changes nothing: what lies behind is no number, and has no gradient."""
    q, k, v = make(t=33, s=160, shift=90.0)
    plain = run(q, k, v)
    k[:, :, :48], v[:, :, :48] = math.nan, math.nan
    found = run(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert not found[2][:, :, :48].any()
    assert not found[3][:, :, :48].any()
    out, _ = kernels.decode(q, k, v, q.shape[-1] ** -0.5, cut=CUT, splits=1)
    assert apart(out, plain[0].double()) < 1e-6


@pytest.mark.parametrize("nats", [9.0, 14.0, 30.0, 60.0])
def test_a_stick_that_is_short_still_counts_where_values_are_large(nats: float) -> None:
    """As in `test_stickbreaking.py`: what lies behind the first blocks of keys outweighs the rest."""
    near = 32  # keys that take it all
    q, k, v = make(1, 2, 1, 3, 67, 8, 4)
    each = math.log(math.expm1(nats / near))
    q[:], k[:] = 1.0, each / q.shape[-1] ** 0.5
    v[:, :, : 64 - near] *= math.exp(nats)
    found, want = run(q, k, v, grad=torch.ones(1, 2, 3, 4, device=DEVICE)), [x.double() for x in (q, k, v)]
    leaves = [x.requires_grad_(True) for x in want]
    out, _ = stickbreaking_reference(*leaves)
    grads = torch.autograd.grad(out.sum(), leaves)
    torch.testing.assert_close(found[0].double(), out.detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[3].double(), grads[2], rtol=2e-3, atol=math.exp(-75))
    if nats < stickbreaking._BROKEN:
        limit = max(1e-2, math.exp(nats - stickbreaking._BROKEN))  # what is left where gradients count it for nothing
        assert apart(found[1], grads[0]) < limit
        assert apart(found[2], grads[1]) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_behind_a_broken_stick_get_no_rounding_errors(dtype: torch.dtype) -> None:
    """Of 30 nats; what a gradient there consists of is smaller than the error of what is taken from it."""
    q, k, v = make(1, 2, 1, 3, 67, 8, 4, dtype=dtype)
    q[:], k[:] = 1.0, math.log(math.expm1(30 / 32)) / q.shape[-1] ** 0.5
    found = run(q, k, v)
    assert 0 < float(found[2][:, :, : 64 - 32].abs().max()) < math.exp(-25)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # it is looked for
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    q, k, v = make(t=40, dtype=dtype)
    for scale in (1e4, 1e38):
        found = run(q, k, v, scale)
        assert all(torch.isfinite(x).all() for x in found)
        assert apart(found[0], stickbreaking_reference(q.double(), k.double(), v.double(), scale=scale)[0]) < 2**-6
        assert torch.isfinite(kernels.decode(q[:, :, -1:], k, v, scale, cut=CUT, splits=2)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_input_gives_the_same_bits(dtype: torch.dtype) -> None:
    inputs = make(t=40, s=50, shift=-6.0, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(run(*inputs), run(*inputs), strict=True))
    first, second = (kernels.decode(inputs[0][:, :, :2], *inputs[1:], 0.4, cut=CUT, splits=3)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_tensors_may_lie_as_they_like() -> None:
    """Heads beside one another, as projections make them; a view in the middle; an expanded mask and gradient."""
    q, k, v = make(2, 2, 2, 20, 30, 8, 8, shift=-6.0)
    mask = torch.ones(1, 1, 1, 30, dtype=torch.bool, device=DEVICE)
    mask[..., :3] = False
    grad = torch.ones((), device=DEVICE).expand(2, 2, 20, 8)
    plain = run(q, k, v, grad=grad.contiguous(), mask=mask.repeat(2, 1, 20, 1))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.cat([k, k], 2)[:, :, 30:]
    v = v.transpose(2, 3).contiguous().transpose(2, 3)
    found = run(q, k, v, grad=grad, mask=mask.expand(2, 1, 1, 30))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_no_queries_are_an_empty_result() -> None:
    found = run(*make(2, 4, 2, 0, 5, 8, 3))
    assert [tuple(x.shape) for x in found] == [(2, 4, 0, 3), (2, 4, 0, 8), (2, 2, 5, 8), (2, 2, 5, 3)]
    assert not any(x.any() for x in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("t", [1, 20])
def test_operators_return_what_the_blocked_form_does(dtype: torch.dtype, t: int, monkeypatch) -> None:
    """What is registered for CUDA, called as autograd calls it; long pasts of few queries are split."""
    monkeypatch.setattr("growlm.layers.kernels.available", lambda _: True)
    called = []
    real = kernels.decode
    monkeypatch.setattr(kernels, "decode", lambda *a: called.append(1) or real(*a))
    q, k, v = make(1, 2, 1, t, 600, 8, 4, shift=-6.0, dtype=dtype)
    documents = (torch.arange(600, device=DEVICE) // 200)[None]
    mask = (torch.arange(600, device=DEVICE) != 590)[None, None, None]
    arguments = (q, k, v, 0.4, mask, documents)
    found, expected = stickbreaking._triton(*arguments), stickbreaking._blocked(*arguments)
    assert bool(called) == (t * 2 <= 16 or (dtype == torch.bfloat16 and t * 2 <= 64))
    assert [(x.shape, x.dtype, x.device) for x in found] == [(x.shape, x.dtype, x.device) for x in expected]
    limit = 1e-5 if dtype == torch.float32 else 2**-5
    grad, exact = weighting(found[0]), found[1] if len(found[1]) else found[0]
    for got, want in zip(
        (found[0], *stickbreaking._triton_backward(grad, exact, found[2], *arguments)),
        (expected[0], *stickbreaking._blocked_backward(grad, exact, expected[2], *arguments)),
        strict=True,
    ):
        assert got.dtype == dtype
        assert apart(got, want.double()) < limit


def test_what_the_kernels_do_not_take_is_left_to_the_blocked_form(monkeypatch) -> None:
    q, k, v = make()
    assert stickbreaking._kernels(q.cpu(), k.cpu(), v.cpu()) is None
    monkeypatch.setattr("growlm.layers.kernels.available", lambda _: True)
    assert stickbreaking._kernels(q, k, v) is kernels
    assert stickbreaking._kernels(q.double(), k.double(), v.double()) is None
    assert stickbreaking._kernels(q, k.bfloat16(), v) is None
    assert stickbreaking._kernels(*make(d=257)) is None


def test_triton_is_not_needed() -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "from growlm.layers.stickbreaking import stickbreaking_attention as attention\n"
        "assert attention(*torch.ones(3, 1, 1, 4, 4)).shape == (1, 1, 4, 4)\n"
        "assert 'growlm.layers.kernels.stickbreaking' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


WIDTHS = [
    ("float32", 64),
    ("bfloat16", 64),
    *[pytest.param(*x, marks=pytest.mark.slow) for x in (("float32", 128), ("bfloat16", 128), ("float16", 128))],
    *[pytest.param(*x, marks=pytest.mark.slow) for x in (("float32", 256), ("bfloat16", 256))],
]
# Bytes of a kernel's registers that are kept in memory: what Triton 3.6 and 3.9 made of it, and some more.
SPILLED = {
    ("float32", 64): 100, ("bfloat16", 64): 100,
    ("float32", 128): 200, ("bfloat16", 128): 400, ("float16", 128): 400,
    ("float32", 256): 1200, ("bfloat16", 256): 100,
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "width"), WIDTHS)
def test_kernels_compile_ahead_of_time(dtype: str, width: int, tmp_path) -> None:
    """For capability 9.0, with blocks as they are launched: programs that fit a multiprocessor, and hardly a register
    that is kept in memory."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, TESTS / "ahead_of_time.py", dtype, str(width)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["kernel"] for one in made} == {
        "forward_kernel", "query_gradient_kernel", "key_value_gradients_kernel", "decode_kernel", "combine_kernel"
    }  # fmt: skip
    for one in made:
        assert one["cubin"] > 1000, one
        assert one["shared"] <= SHARED_MEMORY, one
        if one["spilled"] is not None:
            assert one["spilled"] <= SPILLED[dtype, width], one
