"""Stick-breaking attention and routed experts against other formulations and dense products, in turns within one run.

Attention: the published formulation (cumulative sums by a t x t product, O(t^3)), this blocked one, and softmax by
torch's scaled_dot_product_attention, on two kinds of logits: `short`, drawn at random, whose sticks are used up after
some tens of keys so that the walk ends early, and `lasting`, shifted so that every key is reached. Experts: against one
dense feed-forward with the same FLOPs.

python -m benchmarks.speed.stickbreaking
python -m benchmarks.speed.stickbreaking --lengths 2048 4096 --cubic-up-to 4096
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.lib.common import interleaved, show
from benchmarks.lib.formulation import attend
from growlm.layers.experts import SparseFeedForward
from growlm.layers.stickbreaking import stickbreaking_attention
from growlm.training.memory import kept_pages

HEADS, WIDTH = 8, 64


def cubic(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The published formulation, on tensors (b, h, t, d)."""
    t = query.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    mask, cumulative = torch.ones(t, t).triu(1).bool(), torch.ones(t, t).tril(-1)
    return attend(query[:, :, None], key, value, mask, cumulative)[:, :, 0].transpose(1, 2)


def inputs(t: int, kind: str) -> list[Tensor]:
    random = torch.Generator().manual_seed(t)
    q, k, v = (torch.randn(1, HEADS, t, WIDTH, generator=random) for _ in range(3))
    if kind == "lasting":
        q[..., 0], k[..., 0] = 8.0, -8.0  # logits about -8: a key takes a three-thousandth of the stick
    return [x.requires_grad_(True) for x in (q, k, v)]


def step(attend: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(attend(*tensors), tensors, grad)


def attention(lengths: list[int], cubic_up_to: int, rounds: int) -> None:
    softmax = partial(F.scaled_dot_product_attention, is_causal=True)
    for t in lengths:
        for kind in ("short", "lasting"):
            tensors = inputs(t, kind)
            grad = torch.randn(1, HEADS, t, WIDTH)
            forms: dict[str, Callable[..., Tensor]] = {"blocked": stickbreaking_attention, "softmax": softmax}
            if t <= cubic_up_to:
                forms["cubic"] = cubic
                worst = float((cubic(*tensors) - stickbreaking_attention(*tensors)).detach().abs().max())
                assert worst < 1e-3, worst
            sides = {f: partial(step, attend, tensors, grad) for f, attend in forms.items()}
            times = interleaved(sides, rounds=rounds, warmup=1)
            ratios = {f"{f} / blocked": times[f] / times["blocked"] for f in times if f != "blocked"}
            milliseconds = {f"{f} ms": times[f] * 1e3 for f in times}
            show("attention, forward and backward", {"t": t, "logits": kind, **milliseconds, **ratios})


def memory(t: int) -> None:
    """Peak memory of a forward and backward pass above that of its inputs, against the t x t matrices'."""
    tensors, grad = inputs(t, "lasting"), torch.randn(1, HEADS, t, WIDTH)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    step(stickbreaking_attention, tensors, grad)
    extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    matrix = HEADS * t * t * 4
    show("attention, extra memory", {"t": t, "extra MB": extra / 1e6, "a t x t matrix MB": matrix / 1e6,
                                     "ratio": extra / matrix})  # fmt: skip


def experts(rounds: int) -> None:
    d, f, e, k, n = 512, 1024, 32, 2, 4096
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer = SparseFeedForward(d, f, e, k, size=64).to(dtype)
        up, down = (torch.randn(*s, dtype=dtype) * 0.02 for s in ((d, k * f), (k * f, d)))
        up, down = up.requires_grad_(True), down.requires_grad_(True)
        x, grad = torch.randn(n, d, dtype=dtype, requires_grad=True), torch.randn(n, d, dtype=dtype)

        def sparse(layer=layer, x=x, grad=grad) -> None:
            torch.autograd.grad(layer(x)[0], [x, *layer.parameters()], grad)

        def dense(up=up, down=down, x=x, grad=grad) -> None:
            torch.autograd.grad(F.gelu(x @ up) @ down, [x, up, down], grad)

        times = interleaved({"experts": sparse, "dense": dense}, rounds=rounds)
        show("experts, forward and backward", {
            "dtype": str(dtype), **{f"{s} ms": v * 1e3 for s, v in times.items()},
            "dense / experts": times["dense"] / times["experts"],
        })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--cubic-up-to", type=int, default=4096, help="longest t at which the cubic form runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, help="measure the extra memory at this t, and nothing else")
    a = parser.parse_args()
    if a.memory:
        memory(a.memory)
        return
    with kept_pages():  # as training has it, for all sides alike
        attention(a.lengths, a.cubic_up_to, a.rounds)
        experts(a.rounds)


if __name__ == "__main__":
    main()
