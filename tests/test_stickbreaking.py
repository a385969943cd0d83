"""Stick-breaking attention: the blocked form against its definition, outputs and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from growlm.layers import stickbreaking
from growlm.layers.stickbreaking import stickbreaking_attention, stickbreaking_reference


def make(
    b: int = 2, h: int = 4, g: int = 2, t: int = 40, s: int | None = None, d: int = 8, e: int = 8, *,
    seed: int = 0, shift: float = 0.0, dtype: torch.dtype = torch.float32,
) -> list[Tensor]:  # fmt: skip
    """Queries, keys, values; a negative `shift` of all logits lets sticks last."""
    random = torch.Generator().manual_seed(seed)
    s = t if s is None else s
    shapes = ((b, h, t, d), (b, g, s, d), (b, g, s, e))
    q, k, v = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
    if shift:
        q[..., 0], k[..., 0] = d**0.5, shift
    return [x.requires_grad_(True) for x in (q, k, v)]


def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Equations 3 to 5, one weight at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    shared, past = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                left = 1.0
                for i in range(past + t, -1, -1):
                    beta = 1 / (1 + math.exp(-float(q[b, h, t] @ k[b, h // shared, i]) / math.sqrt(q.shape[-1])))
                    out[b, h, t] += left * beta * v[b, h // shared, i].double()
                    left *= 1 - beta
    return out


def test_reference_is_the_papers_equations() -> None:
    q, k, v = (x.detach() for x in make(1, 2, 1, 6, 9, 4, 3))
    out, weights = stickbreaking_reference(q, k, v)
    torch.testing.assert_close(out.double(), loop(q, k, v), rtol=1e-5, atol=1e-6)
    assert (weights.sum(-1) <= 1 + 1e-6).all()


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 2),
    g=st.integers(1, 2),
    shared=st.integers(1, 3),
    t=st.integers(1, 300),
    past=st.integers(0, 300),
    width=st.sampled_from([1, 4, 8]),
    masked=st.sampled_from(["nothing", "padding", "whole"]),
    packed=st.booleans(),
    shift=st.sampled_from([0.0, -6.0, 4.0]),
    seed=st.integers(0, 99),
)
def test_blocked_equals_reference(
    b: int, g: int, shared: int, t: int, past: int, width: int, masked: str, packed: bool, shift: float, seed: int
) -> None:
    q, k, v = make(b, g * shared, g, t, t + past, width, 5, seed=seed, shift=shift)
    random = torch.Generator().manual_seed(seed)
    mask = None
    if masked != "nothing":
        mask = torch.rand(b, 1, t if masked == "whole" else 1, t + past, generator=random) < 0.8
    documents = torch.randint(0, 2, (b, t + past), generator=random).cumsum(-1) // 7 if packed else None
    out = stickbreaking_attention(q, k, v, mask=mask, documents=documents)
    weigh = torch.randn(out.shape, generator=random)
    grads = torch.autograd.grad((out * weigh).sum(), (q, k, v))
    exact = [x.detach().double().requires_grad_(True) for x in (q, k, v)]
    wanted, _ = stickbreaking_reference(*exact, mask=mask, documents=documents)
    wanted_grads = torch.autograd.grad((wanted * weigh.double()).sum(), exact)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)
    for got, want in zip(grads, wanted_grads, strict=True):
        scale = float(want.detach().abs().max()) + 1e-6
        assert float((got - want).detach().abs().max()) < 1e-4 * scale + 1e-5


@pytest.mark.parametrize("nats", [9.0, 14.0, 30.0, 60.0])
def test_a_stick_that_is_short_still_counts_where_values_are_large(nats: float) -> None:
    """At the end of the first block of keys so much of the stick is gone, and what lies behind it outweighs the rest:
    outputs, and gradients (of logits as far as float32 tells what is left of a stick from none)."""
    q, k, v = (x.detach() for x in make(1, 2, 1, 3, 700, e=4))
    each = math.log(math.expm1(nats / stickbreaking._BLOCK))  # softplus of which is its part of all that
    q[:], k[:] = 1.0, each / q.shape[-1] ** 0.5
    v[:, :, : 700 - stickbreaking._BLOCK - 3] *= math.exp(nats)
    leaves = [x.requires_grad_(True) for x in (q, k, v)]
    out = stickbreaking_attention(*leaves)
    exact = [x.detach().double().requires_grad_(True) for x in leaves]
    wanted, weights = stickbreaking_reference(*exact)
    behind = weights[..., : 700 - stickbreaking._BLOCK - 3]
    assert math.exp(-nats - 1) < float(behind.sum(-1).detach().max()) < math.exp(-nats + 1)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-3, atol=1e-3)
    grads, wanted_grads = (torch.autograd.grad(o.sum(), x) for o, x in ((out, leaves), (wanted, exact)))
    torch.testing.assert_close(grads[2].double(), wanted_grads[2], rtol=2e-3, atol=math.exp(-75))
    if nats < stickbreaking._BROKEN:
        for got, want in zip(grads[:2], wanted_grads[:2], strict=True):
            assert float((got - want).abs().max()) < 1e-2 * float(want.abs().max())


def test_no_queries_are_an_empty_result() -> None:
    q, k, v = make(t=0, s=5, e=3)
    out = stickbreaking_attention(q, k, v)
    assert out.shape == (2, 4, 0, 3)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    assert not any(g.any() for g in grads)
    assert stickbreaking_attention(*make(t=0, s=0, dtype=torch.bfloat16)).shape == (2, 4, 0, 8)


def test_decoding_one_token_at_a_time_equals_the_whole_pass() -> None:
    q, k, v = (x.detach() for x in make(t=600, shift=-4.0))
    whole = stickbreaking_attention(q, k, v)
    for t in (0, 1, 255, 256, 257, 599):
        step = stickbreaking_attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
        torch.testing.assert_close(step[:, :, 0], whole[:, :, t], rtol=1e-5, atol=1e-6)


def test_a_later_token_changes_nothing_before_it() -> None:
    q, k, v = (x.detach() for x in make(t=300))
    before = stickbreaking_attention(q, k, v)
    k[:, :, 200:], v[:, :, 200:] = 9.0, -9.0
    assert torch.equal(stickbreaking_attention(q, k, v)[:, :, :200], before[:, :, :200])


def test_nothing_passes_between_documents() -> None:
    q, k, v = (x.detach() for x in make(b=1, t=300))
    documents = (torch.arange(300) >= 130).long()[None]
    packed = stickbreaking_attention(q, k, v, documents=documents)
    alone = stickbreaking_attention(q[:, :, 130:], k[:, :, 130:], v[:, :, 130:])
    torch.testing.assert_close(packed[:, :, 130:], alone, rtol=1e-5, atol=1e-6)
    k[:, :, :130], v[:, :, :130] = 5.0, math.nan
    v[:, :, :130] = 7.0
    assert torch.equal(stickbreaking_attention(q, k, v, documents=documents)[:, :, 130:], packed[:, :, 130:])


def test_padding_is_as_if_it_were_not_there() -> None:
    q, k, v = (x.detach() for x in make(b=1, t=50))
    alone = stickbreaking_attention(q[:, :, 20:], k[:, :, 20:], v[:, :, 20:])
    mask = (torch.arange(50) >= 20)[None, None, None]
    padded = stickbreaking_attention(q, k, v, mask=mask)
    torch.testing.assert_close(padded[:, :, 20:], alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(padded[:, :, :20], torch.zeros_like(padded[:, :, :20]))


@pytest.mark.parametrize("shift", [0.0, -6.0])
def test_bfloat16_loses_no_more_than_its_inputs_do(shift: float) -> None:
    q, k, v = make(t=700, shift=shift, dtype=torch.bfloat16)
    out = stickbreaking_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    exact = [x.detach().double().requires_grad_(True) for x in (q, k, v)]
    wanted, _ = stickbreaking_reference(*exact)
    assert float((out.double() - wanted).detach().abs().max()) < 2**-8 * float(wanted.detach().abs().max())
    for got, want in zip(
        torch.autograd.grad(out.float().sum(), (q, k, v)), torch.autograd.grad(wanted.sum(), exact), strict=True
    ):
        assert float((got.double() - want).abs().max()) < 2**-6 * float(want.detach().abs().max())


def test_extreme_logits_stay_finite() -> None:
    q, k, v = make(t=300)
    out = stickbreaking_attention(q, k, v, scale=1e4)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.isfinite(x).all() for x in (out, *grads))


def test_autocast_does_not_round_the_logits() -> None:
    q, k, v = (x.detach() for x in make(t=300))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = stickbreaking_attention(q, k, v)
    assert torch.equal(inside, stickbreaking_attention(q, k, v))


def test_extra_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made inside is a block's, not t x t."""
    largest = 0
    real = torch.Tensor.new_empty

    def watched(self: Tensor, *size: int, **kwargs: object) -> Tensor:
        nonlocal largest
        made = real(self, *size, **kwargs)
        largest = max(largest, made.numel())
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", watched)
    q, k, v = make(b=1, h=2, g=2, t=2048, shift=-6.0)
    stickbreaking_attention(q, k, v).sum().backward()
    assert largest == 2 * stickbreaking._PANEL * stickbreaking._BLOCK  # heads x queries x keys of one block
    assert largest < 2 * 2048 * 2048 / 50


@pytest.mark.parametrize(
    ("shapes", "word"),
    [
        (((1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3, 4)), "fit"),
        (((1, 3, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), "heads"),
        (((1, 2, 5, 4), (1, 2, 3, 4), (1, 2, 3, 4)), "keys"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        stickbreaking_attention(*(torch.zeros(s) for s in shapes))


def test_a_mask_that_does_not_fit_is_refused() -> None:
    q, k, v = make(1, 2, 1, 3, 5)
    with pytest.raises(ValueError, match="mask of shape"):
        stickbreaking_attention(q, k, v, mask=torch.ones(1, 1, 3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="documents of shape"):
        stickbreaking_attention(q, k, v, documents=torch.zeros(1, 3))
