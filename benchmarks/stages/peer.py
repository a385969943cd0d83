"""PEER: a layer's forward pass, its products by both schedules, forward and backward, and the optimiser's update of the
rows that were read, each against the bytes that it must move at the bandwidth of a copy; beside it two dense
feed-forwards, one of as many FLOPs and one of as many parameters, whose matrices are the pool's own tables."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.stages.bench import Bench, Side, ms, ratio
from growlm.layers import PEER, kernels, retrievals
from growlm.layers.rows import Choices
from growlm.training.optim import clip_gradients, make_optimizer

# n tokens, s choices of a token, d width, b bytes of a number

ASKED = 1.5
_TOKENS = 1024  # that the dense feed-forward of all tables takes at a time


def run(bench: Bench) -> None:
    sub_keys, d, n, heads, k = (16, 32, 64, 2, 4) if bench.tiny else (1024, 1024, 8192, 8, 16)
    dtype, count, s = torch.bfloat16, sub_keys**2, heads * k
    torch.manual_seed(0)
    layer = PEER(d, count, heads, k, device=bench.device, dtype=dtype).to(dtype)
    x = torch.randn(n, d, device=bench.device, dtype=dtype)
    b, key_size = x.element_size(), layer.keys.key_size
    rows = n * s * (d * b + 8 + b) + n * d * b  # of one table: rows, ids, results; tokens
    flops = n * (4.0 * s * d + 2 * d * heads * key_size + 2 * heads * sub_keys * key_size)
    bench.tell("layer", {
        "N": count, "d": d, "tokens": n, "heads": heads, "top k": k, "GB of tables": 2 * layer.up.nbytes / 1e9,
        "GFLOP": flops / 1e9, "kernels": "Triton" if kernels.available(bench.device) else "torch's operators",
    })  # fmt: skip
    _forward(bench, layer, x, rows, flops)
    if not bench.over("schedules"):
        _schedules(bench, layer, x, s, rows)
    if not bench.over("training"):
        _training(bench, layer, x, rows)


def _forward(bench: Bench, layer: PEER, x: Tensor, rows: int, flops: float) -> None:
    n, d = x.shape
    inner = max(round(flops / (4 * n * d) / 64), 1) * 64  # of as many FLOPs
    up, down = (torch.randn(inner, d, device=x.device, dtype=x.dtype) * d**-0.5 for _ in range(2))

    def dense(up: Tensor, down: Tensor, at_a_time: int) -> None:
        for part in x.split(at_a_time):
            F.gelu(part @ up.T) @ down

    sides: dict[str, Side] = {
        "forward": lambda: layer(x),
        "dense, equal FLOPs": lambda: dense(up, down, n),
        "dense, equal parameters": lambda: dense(layer.up, layer.down, _TOKENS),
    }
    layer.eval()
    with torch.no_grad():
        taken = bench.turns("forward", sides, seconds=bench.left() / 3, kernels=True)
    floors = {
        "forward": bench.moving(2 * rows),
        "dense, equal FLOPs": bench.multiplying(4.0 * n * d * inner),
        "dense, equal parameters": bench.multiplying(4.0 * n * d * len(layer.up)),
    }
    for name, took in taken.items():
        bench.tell(name, _numbers(took, floors[name]) | {"forward over it": ratio(taken.get("forward"), took)})
    over = ratio(taken.get("forward"), floors["forward"])
    bench.ask("peer: forward, over its bytes at the bandwidth of a copy", ASKED, over)


def _schedules(bench: Bench, layer: PEER, x: Tensor, s: int, rows: int) -> None:
    """Products of tokens and rows, with experts as the layer finds them."""
    n, d = x.shape
    with torch.no_grad(), retrievals() as found:
        layer(x)
    ids = found[0].experts.flatten(1)
    choices = Choices(ids)
    by_expert, read = choices.ordered(), len(choices.by_row()[0])
    bench.tell("rows", {"chosen": n * s, "read": read})
    if not kernels.available(bench.device):
        bench.tell("schedules", {"left out": "these are kernels, which do not run here"})
        return
    from growlm.layers.kernels import rows as row_kernels

    b = x.element_size()
    once = read * d * b + n * s * (d * b + 24 + b)
    ways: dict[str, tuple[dict[str, Any], int]] = {
        "token": ({"schedule": "token"}, rows),
        "expert, sorted before": ({"schedule": "expert", "by_expert": by_expert}, once),
        "expert": ({"schedule": "expert"}, once),
    }
    sides = {name: functools.partial(row_kernels.products, x, layer.up, ids, **way) for name, (way, _) in ways.items()}
    with torch.no_grad():
        taken = bench.turns("products", sides, seconds=bench.left() / 3, kernels=True)
    for name, took in taken.items():
        bench.tell(f"products by {name}", _numbers(took, bench.moving(ways[name][1])))


def _training(bench: Bench, layer: PEER, x: Tensor, rows: int) -> None:
    d, b = x.shape[1], x.element_size()
    layer.train()
    optimizer = make_optimizer(layer, lr=1e-4)

    def pass_both_ways() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x).float().square().mean().backward()

    pass_both_ways()
    assert layer.up.grad is not None
    assert layer.down.grad is not None
    read = layer.up.grad._indices().shape[1] + layer.down.grad._indices().shape[1]
    sides: dict[str, Side] = {
        "forward and backward": pass_both_ways,
        "clipping": lambda: clip_gradients(layer.parameters(), 1e9),
        "update of rows": optimizer.step,
    }
    taken = bench.turns("training", sides, seconds=bench.left(), kernels=True)
    gradients = read * d * b
    floors = {
        # Rows of both tables twice, forward and for the gradients of what they met; gradients of the tables once.
        "forward and backward": 4 * rows + gradients,
        "clipping": 2 * gradients,
        "update of rows": read * d * (3 * b + 8),
    }
    for name, took in taken.items():
        bench.tell(name, _numbers(took, bench.moving(floors[name])) | {"rows": read})


def _numbers(took: float, floor: float) -> dict[str, float]:
    return {"ms": ms(took), "floor ms": ms(floor), "times its floor": took / floor}
