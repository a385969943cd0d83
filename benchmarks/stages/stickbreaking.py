"""Stick-breaking attention, forward, forward and backward, and one query of a cache, against torch's flash attention,
which is pinned, and flash-linear-attention's stick-breaking where `fla` can be imported.

Logits are `short` (drawn at random: sticks are used up after some tens of keys, and the walk ends there) or `lasting`
(shifted to about -8, so that every key is read). The floor of a pass is the FLOPs of causal attention at the rate of a
large product, as if every key were read; of a query of a cache, its bytes at the bandwidth of a copy.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.stages.bench import Bench, Side, ms, one_line, ratio
from growlm.layers import kernels
from growlm.layers.stickbreaking import stickbreaking_attention, stickbreaking_reference

# t queries, s keys, d head width

HEADS = 16
BACKEND = SDPBackend.FLASH_ATTENTION
OURS, FLASH, FLA = "ours", "flash", "fla"
ASKED, AT = 3.0, 4096
_FARTHEST = 3e-2  # from the definition in float32, as a share of the largest number
_LOGIT = -8.0


def run(bench: Bench) -> None:
    lengths, widths, heads = ((32, 64), (16,), 2) if bench.tiny else ((1024, 4096, 16_384), (64, 128), HEADS)
    fla, why = _fla(bench.device) if bench.cuda else (None, "its kernels want a GPU")
    bench.tell("sides", {
        "flash": f"torch {torch.__version__}, scaled_dot_product_attention by {BACKEND.name}", "fla": why or "there",
        "ours": "Triton" if kernels.available(bench.device) else "torch's operators",
    })  # fmt: skip
    for d in widths:
        _check(bench, heads, min(lengths), d)
    first = sorted(lengths, key=lambda t: (t != AT, t))  # what is asked for, before the time is over
    cases = list(itertools.product(first, widths, ("lasting", "short")))
    for number, (t, d, logits) in enumerate(cases):
        if bench.over(f"t {t}, d {d}, {logits}"):
            break
        _passes(bench, heads, t, d, logits, fla, bench.left() / (len(cases) - number + 4))
    for s in (64,) if bench.tiny else (4096, 32_768):
        for d in widths:
            if not bench.over(f"1 query of {s}, d {d}"):
                _decode(bench, heads, s, d)


def inputs(device: torch.device, heads: int, t: int, s: int, d: int, logits: str) -> list[Tensor]:
    """Queries (1, h, t, d), keys and values (1, h, s, d)."""
    random = torch.Generator(device).manual_seed(t + d)
    q, k, v = (torch.randn(1, heads, n, d, generator=random, device=device, dtype=torch.bfloat16) for n in (t, s, s))
    if logits == "lasting":
        size = (-_LOGIT * d**0.5) ** 0.5  # their product, scaled, is the logit's mean
        q[..., 0], k[..., 0] = size, -size
    return [q, k, v]


def _check(bench: Bench, heads: int, t: int, d: int) -> None:
    """
    Raises:
        ArithmeticError: what is measured does not compute stick-breaking attention.
    """
    for logits in ("lasting", "short"):
        tensors = inputs(bench.device, heads, t, t, d, logits)
        wanted = stickbreaking_reference(*(x.float() for x in tensors))[0]
        apart = float((stickbreaking_attention(*tensors).float() - wanted).abs().max() / wanted.abs().max())
        if not apart <= _FARTHEST:
            raise ArithmeticError(f"d {d}, {logits}: {apart:.2g} from the definition, at most {_FARTHEST} is allowed")
        bench.tell(f"check, d {d}, {logits}", {"from the definition": apart, "allowed": _FARTHEST})


def _passes(bench: Bench, heads: int, t: int, d: int, logits: str, fla: Any, seconds: float) -> None:
    tensors = inputs(bench.device, heads, t, t, d, logits)
    forms: dict[str, Callable[..., Tensor]] = {
        OURS: stickbreaking_attention,
        FLASH: functools.partial(F.scaled_dot_product_attention, is_causal=True),
    }
    if fla is not None:
        forms[FLA] = fla
    # What flash-linear-attention takes is (b, t, h, d).
    given = {form: [x.transpose(1, 2).contiguous() if form == FLA else x for x in tensors] for form in forms}
    for part, share in (("forward", 2.0), ("forward and backward", 7.0)):
        what = f"t {t}, d {d}, {logits}, {part}"
        sides = {form: _side(form, run, given[form], part) for form, run in forms.items()}
        taken = bench.turns(what, sides, seconds=seconds / 2, kernels=True)
        floor = bench.multiplying(share * heads * t * t * d)  # two products forward, five backward, of half a square
        for form, took in taken.items():
            bench.tell(f"{what}, {form}", {
                "ms": ms(took), "floor ms": ms(floor), "times its floor": took / floor,
                "times flash": ratio(took, taken.get(FLASH)),
            })  # fmt: skip
        if (t == AT or bench.tiny) and part != "forward":
            bench.ask(f"stickbreaking: {what}, over flash", ASKED, ratio(taken.get(OURS), taken.get(FLASH)))


def _side(form: str, run: Callable[..., Tensor], tensors: list[Tensor], part: str) -> Side:
    if part == "forward":

        def side() -> None:
            with torch.no_grad(), sdpa_kernel(BACKEND):
                run(*tensors)

        return side
    leaves = [x.detach().requires_grad_(True) for x in tensors]
    grad = torch.randn_like(tensors[2])

    def both() -> None:
        with sdpa_kernel(BACKEND):
            torch.autograd.grad(run(*leaves), leaves, grad)

    return both


def _decode(bench: Bench, heads: int, s: int, d: int) -> None:
    q, k, v = inputs(bench.device, heads, 1, s, d, "lasting")
    sides: dict[str, Side] = {
        OURS: lambda: stickbreaking_attention(q, k, v),
        FLASH: lambda: F.scaled_dot_product_attention(q, k, v),
    }
    with torch.no_grad(), sdpa_kernel(BACKEND):
        taken = bench.turns(f"1 query of {s}", sides, seconds=2, kernels=True)
    with torch.no_grad():  # among all that it has
        taken |= bench.turns(f"1 query of {s}", {"torch's choice": sides[FLASH]}, seconds=1, kernels=True)
    num_bytes = k.nbytes + v.nbytes
    floor = bench.moving(num_bytes)
    for form, took in taken.items():
        bench.tell(f"1 query of {s} keys, d {d}, {form}", {
            "ms": ms(took), "MB": num_bytes / 1e6, "floor ms": ms(floor), "times its bytes": took / floor,
            "times flash": ratio(took, taken.get(FLASH)),
        })  # fmt: skip


def _fla(device: torch.device) -> tuple[Callable[..., Tensor] | None, str]:
    """Its stick-breaking attention, current token included as here; or why there is none."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = parallel_stickbreaking_attn(q=query, k=key, v=value, attend_current=True)[0]
        return out

    try:  # releases differ: some have no backward pass
        from fla.ops.stickbreaking_attn import parallel_stickbreaking_attn

        leaf = torch.zeros(1, 128, 2, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        attend(leaf, leaf, leaf).sum().backward()
    except Exception as error:
        return None, f"does not run here ({one_line(error)})"
    return attend, ""
