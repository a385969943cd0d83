"""PEER's kernels on a GPU: each part by the kernel, by both schedules where it has two, and by torch's operators,
beside the bytes that it must move at the bandwidth of a copy that is measured in the same run.

`spread` draws experts uniformly over the table, as a pool does whose queries are normalised well; `few` from its first
1,024 rows. A median of `--rounds`, by the device's clock, after two that are not counted.

python -m benchmarks.speed.peer_kernels
python -m benchmarks.speed.peer_kernels --sub-keys 256 --tokens 2048 --dtype float32
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.lib.common import show
from growlm.layers import PEER, kernels
from growlm.layers.product_keys import best_keys, best_sums
from growlm.layers.rows import Choices, products, table_gradient, weighted_sum
from growlm.training.optim import make_optimizer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sub-keys", type=int, default=1024, help="square root of N")
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=11)
    return parser.parse_args()


@contextmanager
def operators() -> Iterator[None]:
    """Layers use torch's operators."""
    found = kernels.available
    kernels.available = lambda tensor: False
    try:
        yield
    finally:
        kernels.available = found


def timed(part: Callable[[], object], rounds: int) -> float:
    """Median seconds by the device's clock."""
    times = []
    for turn in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        part()
        end.record()
        torch.cuda.synchronize()
        if turn >= 2:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth(device: str, rounds: int) -> float:
    """Bytes a second, read and written."""
    to, source = torch.zeros(256 << 20, device=device), torch.ones(256 << 20, device=device)
    return 2 * to.nbytes / timed(lambda: to.copy_(source), rounds)


def main() -> None:
    a = arguments()
    if not kernels.available(torch.zeros(1, device=a.device)):
        raise SystemExit(f"Triton cannot compile for {a.device}; this needs a GPU of compute capability 8.0 or later")
    from growlm.layers.kernels import rows as row_kernels

    dtype = getattr(torch, a.dtype)
    torch.manual_seed(0)
    n, d, s, count = a.tokens, a.hidden_size, a.heads * a.top_k, a.sub_keys**2
    bandwidth = copy_bandwidth(a.device, a.rounds)
    layer = PEER(d, count, a.heads, a.top_k, device=a.device, dtype=dtype).to(dtype)
    x, weights = torch.randn(n, d, device=a.device, dtype=dtype), torch.randn(n, s, 1, device=a.device, dtype=dtype)
    optimizer = make_optimizer(layer, lr=1e-4)
    b = x.element_size()

    def tell(part: str, which: str, num_bytes: int, call: Callable[[], object]) -> None:
        seconds = timed(call, a.rounds)
        show("peer kernels", {
            "device": torch.cuda.get_device_name(a.device), "N": count, "d": d, "tokens": n, "choices": s,
            "dtype": a.dtype, "part": part, "by": which, "ms": seconds * 1e3, "MB": num_bytes / 1e6,
            "ms at copy bandwidth": num_bytes / bandwidth * 1e3, "times its bytes": seconds * bandwidth / num_bytes,
            "copy GB/s": bandwidth / 1e9,
        })  # fmt: skip

    def both(part: str, num_bytes: int, call: Callable[[], object]) -> None:
        tell(part, "kernel", num_bytes, call)
        with operators():
            tell(part, "torch", num_bytes, call)

    with torch.no_grad():
        for draw, most in (("spread", count), ("few", min(count, 1024))):
            ids = torch.randint(most, (n, s), device=a.device)
            choices = Choices(ids)
            by_expert, read = choices.ordered(), len(choices.by_row()[0])
            token, expert = n * s * (d * b + 8 + b) + n * d * b, read * d * b + n * s * (d * b + 24 + b)
            both(f"products, {draw}", token, lambda ids=ids: products(x, layer.up, ids))
            for name, options in (("expert, sorted before", {"by_expert": by_expert}), ("expert", {})):
                by = functools.partial(row_kernels.products, x, layer.up, ids, schedule="expert", **options)
                tell(f"products, {draw}", name, expert, by)
            both(f"weighted sum, {draw}", token, lambda ids=ids: weighted_sum(weights, layer.down, ids))
            both(f"gradient of a table, {draw}", n * s * (d * b + 16 + b) + read * d * b,
                 lambda choices=choices: table_gradient(weights, x, layer.up, choices, True))  # fmt: skip
        queries = layer.keys.queries(x)
        half: Tensor = queries.flatten(0, 1).chunk(2, -1)[0]
        keys = layer.keys.keys_a.float()
        found = best_keys(half, keys, a.top_k)[0]
        num_bytes = half.nbytes + keys.nbytes + found.nbytes * 3
        both("best keys of a half", num_bytes, lambda: best_keys(half, keys, a.top_k))
        both("best sums", found.nbytes * 7, lambda: best_sums(found, found, a.top_k))
        both("queries and search", queries.nbytes * 2, lambda: layer.keys.search(layer.keys.queries(x)))
        both("forward", 2 * token, lambda: layer(x))
    layer(x).float().square().mean().backward()
    read = len(layer.up.grad._indices()[0]) + len(layer.down.grad._indices()[0])
    both("update", read * d * (3 * b + 8), optimizer.step)


if __name__ == "__main__":
    main()
