"""Cross-entropy of a linear head in chunks: losses and gradients against torch's own, on whole logits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from growlm.layers import cross_entropy
from growlm.layers.cross_entropy import linear_cross_entropy, token_losses
from growlm.modules.vocabulary import HeadRows, VocabularyRows
from tiny import make_base

# n tokens, d hidden size, v vocabulary, r own rows


class Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    rows: Tensor | None
    ids: Tensor | None


def problem(n: int, d: int, v: int, r: int | None, *, seed: int = 0, scale: float = 1.0) -> Problem:
    """`r` rows of the head, None for a head without rows of its own."""
    g = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(n, d, generator=g)
    weight = torch.randn(v, d, generator=g)
    labels = torch.randint(0, v, (n,), generator=g)
    if r is None:
        return Problem(hidden, weight, labels, None, None)
    ids = torch.randperm(v, generator=g)[:r].sort().values
    return Problem(hidden, weight, labels, torch.randn(r, d, generator=g), ids)


def reference_losses(p: Problem, softcap: float | None) -> Tensor:
    head = p.weight if p.rows is None else p.weight.index_add(0, p.ids, p.rows)
    logits = p.hidden @ head.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, p.labels, reduction="none")


def in_float64(p: Problem) -> Problem:
    return Problem(*(t.double() if t is not None and t.is_floating_point() else t for t in p))


def trained(p: Problem, names: list[str]) -> tuple[Problem, list[Tensor]]:
    """A copy whose named tensors want gradients, and those."""
    p = Problem(*(None if t is None else t.detach().clone() for t in p))
    return p, [getattr(p, name).requires_grad_() for name in names]


def compare(
    p: Problem, softcap: float | None, names: list[str], *, upstream: float = 1.0, tolerance: float = 1e-5
) -> None:
    ours, wanting = trained(p, names)
    theirs, wanted = trained(in_float64(p), names)
    loss = linear_cross_entropy(ours.hidden, ours.weight, ours.labels, rows=ours.rows, ids=ours.ids, softcap=softcap)
    reference = reference_losses(theirs, softcap).mean()
    assert loss.dtype == torch.float32
    assert loss.ndim == 0
    torch.testing.assert_close(loss.detach().double(), reference.detach(), atol=tolerance, rtol=tolerance)
    (loss * upstream).backward()
    (reference * upstream).backward()
    for name, mine, other in zip(names, wanting, wanted, strict=True):
        assert mine.grad is not None, name
        assert mine.grad.dtype == mine.dtype
        torch.testing.assert_close(
            mine.grad.double(), other.grad, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that is made; a view of another is not."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and not func.is_view:
                self.elements = max(self.elements, t.numel())
        return out


NAMES = ["hidden", "weight", "rows"]
ROWS = [None, 1, 7, 40]  # of 40


@pytest.fixture(params=["one chunk", "many chunks"])
def _chunks(request, monkeypatch):
    """Sixteen tokens at a time is the least that a chunk holds."""
    if request.param == "many chunks":
        monkeypatch.setattr(cross_entropy, "_CHUNK", 1)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("softcap", [None, 3.0, 30.0])
@pytest.mark.parametrize("r", ROWS)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 32, 50])
def test_loss_and_gradients_match_torch(n, r, softcap):
    compare(problem(n, 12, 40, r), softcap, [name for name in NAMES if r is not None or name != "rows"])


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("r", ROWS)
def test_token_losses_match_torch(r, softcap):
    p = problem(50, 12, 40, r)
    losses = token_losses(p.hidden, p.weight, p.labels, rows=p.rows, ids=p.ids, softcap=softcap)
    assert losses.shape == (50,)
    assert losses.dtype == torch.float32
    assert not losses.requires_grad
    torch.testing.assert_close(losses.double(), reference_losses(in_float64(p), softcap), atol=1e-5, rtol=1e-5)
    loss = linear_cross_entropy(p.hidden, p.weight, p.labels, rows=p.rows, ids=p.ids, softcap=softcap)
    torch.testing.assert_close(losses.mean(), loss)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 60),
    d=st.integers(1, 20),
    v=st.integers(1, 90),
    share=st.none() | st.floats(0, 1),
    softcap=st.none() | st.floats(1, 50),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    chunk=st.sampled_from([1, 1_000, 2_000, 1 << 23]),
    wanting=st.sets(st.sampled_from(NAMES), min_size=1),
    seed=st.integers(0, 1000),
)
def test_any_shape_matches_torch(n, d, v, share, softcap, scale, chunk, wanting, seed):
    r = None if share is None else round(share * v)
    names = sorted(wanting - ({"rows"} if r is None else set())) or ["hidden"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_CHUNK", chunk)
        compare(problem(n, d, v, r, seed=seed, scale=scale), softcap, names, tolerance=5e-5)


@pytest.mark.parametrize("names", [["hidden"], ["weight"], ["rows"], ["hidden", "rows"]], ids="+".join)
def test_gradients_reach_only_what_wants_them(names):
    p = problem(40, 12, 40, 7)
    compare(p, None, names)
    ours, _ = trained(p, names)
    linear_cross_entropy(ours.hidden, ours.weight, ours.labels, rows=ours.rows, ids=ours.ids).backward()
    for name in NAMES:
        assert (getattr(ours, name).grad is not None) == (name in names), name


@pytest.mark.parametrize("upstream", [0.25, -3.0])
def test_gradients_scale_with_what_follows_the_loss(upstream):
    compare(problem(20, 12, 40, 7), 5.0, NAMES, upstream=upstream)


def test_gradients_of_a_row_are_those_of_its_token():
    """And no other token's."""
    p, _ = trained(problem(40, 12, 40, 7), ["weight", "rows"])
    linear_cross_entropy(p.hidden, p.weight, p.labels, rows=p.rows, ids=p.ids).backward()
    torch.testing.assert_close(p.rows.grad, p.weight.grad[p.ids])


@pytest.mark.parametrize("r", ROWS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bfloat16_is_close(r, softcap, monkeypatch):
    """Hidden states in bfloat16, head and rows in float32, as a module is trained."""
    monkeypatch.setattr(cross_entropy, "_CHUNK", 1)
    p = problem(50, 16, 40, r, scale=0.5)
    names = [name for name in NAMES if r is not None or name != "rows"]
    ours, wanting = trained(p._replace(hidden=p.hidden.bfloat16()), names)
    theirs, wanted = trained(in_float64(p), names)
    loss = linear_cross_entropy(ours.hidden, ours.weight, ours.labels, rows=ours.rows, ids=ours.ids, softcap=softcap)
    reference = reference_losses(theirs, softcap).mean()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach().double(), reference.detach(), atol=0.02, rtol=0.01)
    loss.backward()
    reference.backward()
    for name, mine, other in zip(names, wanting, wanted, strict=True):
        assert mine.grad.dtype == mine.dtype, name
        error = (mine.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < 0.02, name
        # Summed in float32, and not rounded on the way to a tensor in float32.
        assert mine.dtype != torch.float32 or not torch.equal(mine.grad, mine.grad.bfloat16().float()), name


def test_bfloat16_head_gets_a_bfloat16_gradient():
    p = problem(40, 16, 40, None)
    ours, _ = trained(p._replace(hidden=p.hidden.bfloat16(), weight=p.weight.bfloat16()), ["hidden", "weight"])
    linear_cross_entropy(ours.hidden, ours.weight, ours.labels).backward()
    assert ours.hidden.grad.dtype == ours.weight.grad.dtype == torch.bfloat16


def test_autocast_changes_nothing():
    """The dtype of the products is that of the hidden states, whoever calls."""
    p = problem(40, 12, 40, 7)
    plain = token_losses(p.hidden, p.weight, p.labels, rows=p.rows, ids=p.ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_losses(p.hidden, p.weight, p.labels, rows=p.rows, ids=p.ids), plain)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("r", [1, 7, 40])
def test_scoring_adds_up_logits_as_serving_does(r, softcap):
    """In bfloat16 a difference that is rounded together with the head's row is another one."""
    base = make_base(vocab_size=40)
    base.model.bfloat16()
    base.softcap = softcap
    p = problem(50, 32, 40, r, scale=0.5)
    hidden, rows = p.hidden.bfloat16(), (p.rows * 0.01).bfloat16()
    served = VocabularyRows(HeadRows(p.ids, rows)).logits(base, hidden[None])[0].detach()
    expected = torch.nn.functional.cross_entropy(served.float(), p.labels, reduction="none")
    losses = token_losses(hidden, base.head_weight, p.labels, rows=rows, ids=p.ids, softcap=softcap)
    assert torch.equal(losses, expected)
    with torch.no_grad():
        mean = linear_cross_entropy(hidden, base.head_weight, p.labels, rows=rows, ids=p.ids, softcap=softcap)
    assert torch.equal(mean, expected.mean())


def test_scoring_does_not_copy_the_head():
    p = problem(2, 12, 4000, 7)
    with Largest() as made:
        token_losses(p.hidden, p.weight, p.labels, rows=p.rows, ids=p.ids)
    assert made.elements <= 2 * 4000


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_large_logits_stay_finite(softcap):
    p, wanting = trained(problem(20, 12, 40, 7, scale=1e4), NAMES)
    loss = linear_cross_entropy(p.hidden, p.weight, p.labels, rows=p.rows, ids=p.ids, softcap=softcap)
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(t.grad.isfinite().all() for t in wanting)


def test_arguments_are_left_alone():
    p = problem(40, 12, 40, 7)
    before: list[Any] = [None if t is None else t.clone() for t in p]
    ours = Problem(*(t.requires_grad_() if t.is_floating_point() else t for t in p))
    linear_cross_entropy(ours.hidden, ours.weight, ours.labels, rows=ours.rows, ids=ours.ids, softcap=4.0).backward()
    assert all(torch.equal(t, b) for t, b in zip(ours, before, strict=True))


def test_hidden_states_need_not_be_contiguous():
    p = problem(50, 12, 40, 7)
    strided = torch.stack([p.hidden, p.hidden], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    compare(p._replace(hidden=strided), None, NAMES)
    turned, _ = trained(p, [])
    turned = turned._replace(hidden=p.hidden.T.contiguous().T.requires_grad_())
    linear_cross_entropy(turned.hidden, turned.weight, turned.labels, rows=turned.rows, ids=turned.ids).backward()
    plain, _ = trained(p, ["hidden"])
    linear_cross_entropy(plain.hidden, plain.weight, plain.labels, rows=plain.rows, ids=plain.ids).backward()
    torch.testing.assert_close(turned.hidden.grad, plain.hidden.grad)


@pytest.mark.parametrize("grad", [False, True])
def test_only_a_chunk_of_logits_exists_at_a_time(grad, monkeypatch):
    """What the whole file is for."""
    n, v = 4096, 512
    monkeypatch.setattr(cross_entropy, "_CHUNK", 16 * v)
    p = problem(n, 4, v, 9)
    if grad:
        p, _ = trained(p, ["hidden", "rows"])
    with Largest() as made:
        loss = linear_cross_entropy(p.hidden, p.weight, p.labels, rows=p.rows, ids=p.ids)
        if grad:
            loss.backward()
    assert made.elements <= n * 4


@pytest.mark.parametrize("r", [None, 5])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 0.97])
def test_labels_below_zero_are_not_counted(r, ignored):
    p = problem(40, 8, 30, r, seed=3)
    labels = p.labels.masked_fill(torch.rand(40, generator=torch.Generator().manual_seed(1)) < ignored, -1)
    names = ["hidden", "weight"] if r is None else ["hidden", "rows"]
    ours, wanting = trained(p, names)
    theirs, wanted = trained(in_float64(p), names)
    loss = linear_cross_entropy(ours.hidden, ours.weight, labels, rows=ours.rows, ids=ours.ids)
    head = theirs.weight if theirs.rows is None else theirs.weight.index_add(0, theirs.ids, theirs.rows)
    reference = torch.nn.functional.cross_entropy(theirs.hidden @ head.T, labels, ignore_index=-1)
    torch.testing.assert_close(loss.detach().double(), reference.detach(), atol=1e-5, rtol=1e-5)
    loss.backward()
    reference.backward()
    for mine, other in zip(wanting, wanted, strict=True):
        torch.testing.assert_close(mine.grad.double(), other.grad, atol=1e-5, rtol=1e-5)


def test_nothing_that_counts_is_a_loss_of_zero():
    p, wanting = trained(problem(6, 8, 30, 5), ["hidden", "weight", "rows"])
    loss = linear_cross_entropy(p.hidden, p.weight, torch.full((6,), -1), rows=p.rows, ids=p.ids)
    assert (loss.dtype, loss.ndim, float(loss.detach())) == (torch.float32, 0, 0.0)
    loss.backward()
    assert all(t.grad is not None and not t.grad.any() for t in wanting)
