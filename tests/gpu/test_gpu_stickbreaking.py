"""Stick-breaking attention on a GPU: outputs, gradients and cached decode."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from growlm.layers import stickbreaking
from growlm.layers.stickbreaking import stickbreaking_attention

pytestmark = pytest.mark.gpu

# b batch, h heads of queries, g heads of keys, t queries, s keys, d head width
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "several panels and blocks": {"t": 600, "s": 600},
    "shared heads": {"h": 6, "g": 2},
    "queries of a long past": {"t": 5, "s": 300},
    "one query": {"t": 1, "s": 300},
    "one token": {"t": 1, "s": 1},
    "odd width": {"d": 7},
    "padding": {"padded": True},
    "whole mask": {"masked": True},
    "documents": {"documents": True},
    "many documents": {"documents": True, "t": 600, "s": 600},
    "documents in no order": {"documents": True, "ordered": False},
    "one query of a very long past": {"t": 1, "s": 5000, "last": True},
    "decode, shared heads and documents": {"h": 6, "g": 2, "t": 4, "s": 2100, "documents": True},
    "wide heads": {"d": 126},
    "widest heads": {"d": 254, "t": 90, "s": 90},
    "heads wider than kernels take": {"d": 260, "t": 90, "s": 90},
    "large logits": {"large": 30.0},
}


def arguments(
    dtype: torch.dtype, b: int = 2, h: int = 3, g: int = 3, t: int = 140, s: int = 140, d: int = 16,
    padded: bool = False, masked: bool = False, documents: bool = False, ordered: bool = True, large: float = 1.0,
    last: bool = False,
) -> tuple[list[Tensor], dict[str, Tensor]]:  # fmt: skip
    """`last`: sticks that last, so that old keys count."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((b, h, t, d), (b, g, s, d), (b, g, s, d + 2))
    )
    options: dict[str, Tensor] = {}
    if padded:
        options["mask"] = (torch.arange(s) >= torch.arange(b)[:, None] * 50)[:, None, None]
    if masked:
        options["mask"] = torch.rand(b, 1, t, s, generator=generator) < 0.8
    if documents:
        options["documents"] = torch.arange(s).expand(b, s) // 37 if ordered else torch.arange(s).expand(b, s) % 3
    if last:
        query[..., 0], key[..., 0] = d**0.5, -7.0
    return [query * large, key, value], options


def run(inputs: list[Tensor], options: dict[str, Tensor]) -> list[Tensor]:
    """The output, and the gradients of all inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = stickbreaking_attention(*leaves, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients(device, near, shape, dtype):
    inputs, options = arguments(dtype, **SHAPES[shape])
    found = run([x.to(device) for x in inputs], {k: v.to(device) for k, v in options.items()})
    wanted = run([x.float() for x in inputs], options)
    assert {x.dtype for x in found} == {dtype}
    assert {x.device.type for x in found} == {device}
    for name, one, other in zip(("output", "query", "key", "value"), found, wanted, strict=True):
        near(f"stick-breaking: {name}", one, other, dtype)


def test_decoding_with_a_cache_equals_the_whole_pass(device, near):
    (query, key, value), _ = arguments(torch.float32, t=300, s=300)
    query, key, value = (x.to(device) for x in (query, key, value))
    whole = stickbreaking_attention(query, key, value)
    parts = [
        stickbreaking_attention(query[:, :, at:stop], key[:, :, :stop], value[:, :, :stop])
        for at, stop in ((0, 200), (200, 201), (201, 202), (202, 300))
    ]
    near("stick-breaking: with a cache", torch.cat(parts, 2), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("t", [600, 3])
def test_the_same_input_gives_the_same_bits(device, dtype, t):
    inputs, options = arguments(dtype, t=t, s=600)
    inputs = [x.to(device) for x in inputs]
    assert all(torch.equal(a, b) for a, b in zip(run(inputs, options), run(inputs, options), strict=True))


def test_gradients_by_bands_of_queries(device, near, monkeypatch):
    """As of contexts whose states do not fit at once."""
    kernels = pytest.importorskip("growlm.layers.kernels.stickbreaking", reason="Triton is not installed")
    inputs, _ = arguments(torch.float32, t=300, s=300)
    whole = run([x.to(device) for x in inputs], {})
    monkeypatch.setattr(kernels, "STATE_BYTES", 1)
    for one, other in zip(run([x.to(device) for x in inputs], {}), whole, strict=True):
        near("stick-breaking: by bands", one, other)


def test_kernels_compute_it_where_they_can(device):
    if os.environ.get("GROWLM_TEST_DEVICE", "cuda") != "cuda":
        return  # the processor does
    inputs, _ = arguments(torch.bfloat16)
    can = importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability() >= (8, 0)
    assert (stickbreaking._kernels(*(x.to(device) for x in inputs)) is not None) == can


def test_under_autocast(device, near):
    inputs, _ = arguments(torch.float32)
    with torch.autocast(device, torch.bfloat16):
        found = stickbreaking_attention(*(x.to(device) for x in inputs))
    assert found.dtype == torch.float32
    near("stick-breaking: under autocast", found, stickbreaking_attention(*inputs))
