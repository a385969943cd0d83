"""PEER's speed and memory against PEER-pytorch, two processes in turns; and how far each part of ours is from the bytes
that it must move, against a copy measured in the same run.

The other package keeps one expert a head unless it is told that scores compete; here it is, so that both sides use
`--top-k` experts a head. Its gradients are dense, and all its rows go through torch's AdamW: fused, or with `--unfused`
as torch gives it by default. `plain` is a plain script; in `kept`, freed pages are kept for the next step, as growlm's
training does, on both sides; `bfloat16` is `kept` with our rows in bfloat16. Memory is the peak of a process above what
it had with all imports done. Warming up reads every batch of tokens once, so that the optimiser's state, which takes
memory where rows are read, is there.

python -m benchmarks.speed.peer_speed
python -m benchmarks.speed.peer_speed --sub-keys 128 256 --tokens 256 --rounds 3
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.lib.common import show
from growlm.layers import PEER, retrievals
from growlm.layers.rows import Choices, products, table_gradient, weighted_sum
from growlm.training.memory import kept_pages
from growlm.training.optim import RowAdamW, clip_gradients, make_optimizer

BATCHES = 4  # of tokens, used in turns
SETTINGS = ["plain", "kept", "bfloat16"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sub-keys", type=int, nargs="+", default=[128, 1024], help="square roots of N")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--key-size", type=int, default=128, help="of a whole key: both halves")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--settings", nargs="+", default=SETTINGS, choices=SETTINGS)
    parser.add_argument("--unfused", action="store_true", help="the other side's AdamW")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser.parse_args()


def build(side: str, setting: str, n: int, a: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    if side == "peer":
        import PEER_pytorch

        layer: nn.Module = PEER_pytorch.PEER(
            a.hidden_size, heads=a.heads, num_experts=n * n, num_experts_per_head=a.top_k, dim_key=a.key_size // 2,
            non_competing_scores=False,
        )  # fmt: skip
        assert layer.num_experts_per_head_topk == a.top_k
        for table in (layer.weight_down_embed, layer.weight_up_embed):  # its N(0, 1) would give outputs of 37
            nn.init.normal_(table.weight, std=a.hidden_size**-0.5)
        return layer, torch.optim.AdamW(layer.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=not a.unfused)
    dtype = torch.bfloat16 if setting == "bfloat16" else torch.float32
    layer = PEER(a.hidden_size, n * n, a.heads, a.top_k, key_size=a.key_size, dtype=dtype)
    return layer, make_optimizer(layer, lr=1e-4)


def batches(a: argparse.Namespace) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(1, a.tokens, a.hidden_size, generator=random) for _ in range(BATCHES)]


def train_step(layer: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    layer(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# A process a side: told what to do by lines, answers with seconds.


def work(a: argparse.Namespace) -> None:
    if a.side == "peer":
        import PEER_pytorch  # noqa: F401, so that it counts as imported
    imports = memory("VmRSS")
    with nullcontext() if a.settings == ["plain"] else kept_pages():
        layer, optimizer = build(a.side, a.settings[0], a.sub_keys[0], a)
        xs = batches(a)
        print("ready", flush=True)
        for line in sys.stdin:
            what, turn = line.split()
            x = xs[int(turn) % BATCHES]
            start = time.perf_counter()
            if what == "step":
                train_step(layer, optimizer, x)
            elif what == "scores":
                with torch.no_grad():
                    queries = layer.keys.queries(x[0])
                    start = time.perf_counter()
                    layer.keys.search(queries)
            else:
                with torch.no_grad():
                    layer(x)
            print(time.perf_counter() - start, flush=True)
        print(memory("VmHWM") - imports, flush=True)


def memory(what: str) -> int:
    """Bytes. Not by getrusage: its maximum is inherited from the process that started this one."""
    return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0]) * 1024


class Worker:
    def __init__(self, a: argparse.Namespace, side: str, setting: str, n: int) -> None:
        options = ("hidden_size", "heads", "top_k", "key_size", "tokens", "threads")
        flags = [text for o in options for text in (f"--{o.replace('_', '-')}", str(getattr(a, o)))]
        flags += ["--unfused"] if a.unfused else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "--side", side, "--settings", setting, "--sub-keys", str(n), *flags],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.line()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def run(self, what: str, turn: int) -> float:
        assert self.process.stdin is not None
        print(what, turn, file=self.process.stdin, flush=True)
        return float(self.line())

    def peak(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        peak = int(self.line())
        self.process.wait()
        return peak


def compare(a: argparse.Namespace, setting: str, n: int) -> dict[str, float]:
    """Median seconds of forward, step and our scores at N = n^2, and peak memory without imports."""
    workers = {side: Worker(a, side, setting, n) for side in ("ours", "peer")}
    times: dict[str, list[float]] = {}
    for turn in range(BATCHES + a.rounds):
        for side, worker in workers.items():
            for what in ("forward", "step", "scores") if side == "ours" else ("forward", "step"):
                seconds = worker.run(what, turn)
                if turn >= BATCHES:
                    times.setdefault(f"{side} {what}", []).append(seconds)
    numbers = {what: statistics.median(values) for what, values in times.items()}
    return numbers | {f"{side} peak": worker.peak() for side, worker in workers.items()}


# Our parts, one by one


def parts(a: argparse.Namespace, setting: str, n: int) -> None:
    """Medians of the parts of a step and the bytes that each must move: rows as they are read and written, at the
    bandwidth of a copy."""
    with kept_pages():
        layer, optimizer = build("ours", setting, n, a)
        assert isinstance(layer, PEER)
        assert isinstance(optimizer, RowAdamW)
        big = torch.zeros(64 << 20), torch.ones(64 << 20)
        copy = timed(lambda: big[0].copy_(big[1]), a.rounds)
        bandwidth = 2 * big[0].nbytes / copy
        xs = batches(a)
        for x in xs[:3]:
            train_step(layer, optimizer, x)
        x, d, s = xs[3][0], a.hidden_size, a.heads * a.top_k
        with torch.no_grad(), retrievals() as found:
            queries = layer.keys.queries(x)
            layer(x)
        ids = found[0].experts.flatten(1)
        weights, tokens = torch.randn(a.tokens, s, 1).to(layer.up.dtype), x.to(layer.up.dtype)
        choices = Choices(ids)
        rows = len(choices.by_row()[0])
        size = layer.up.element_size()
        layer(x).square().mean().backward()
        every, read = a.tokens * s * d * size, rows * d * size
        moments = 2 * rows * d * 4
        # Two tables: what is done for both is timed for one and counted twice. The gradient is written, then read for
        # its norm and by the update.
        with torch.no_grad():
            measured: dict[str, tuple[Callable[[], object], float, int]] = {
                "queries": (lambda: layer.keys.queries(x), 0, 1),
                "scores and top-k": (lambda: layer.keys.search(queries), 0, 1),
                "products with rows": (lambda: products(tokens, layer.up, ids), every, 2),
                "weighted rows": (lambda: weighted_sum(weights, layer.down, ids), every, 2),
                "sort of the choices": (lambda: Choices(ids).by_row(), 0, 1),
                "gradient of a table": (lambda: table_gradient(weights, tokens, layer.up, choices, True), read, 2),
                "clip": (lambda: clip_gradients(layer.parameters(), 1e9), 2 * read, 1),
                "update of all": (lambda: optimizer.step(), 2 * (3 * read + moments), 1),
            }
            for name, (part, num_bytes, times) in measured.items():
                seconds = timed(part, a.rounds)
                show("peer part", {
                    "N": n * n, "rows": str(layer.up.dtype), "rows read": rows, "part": name, "times a step": times,
                    "ms": seconds * 1e3, "MB": num_bytes / 1e6, "ms at copy bandwidth": num_bytes / bandwidth * 1e3,
                    "share of copy bandwidth": num_bytes / bandwidth / seconds, "copy GB/s": bandwidth / 1e9,
                })  # fmt: skip


def timed(part: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        part()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    a = arguments()
    torch.set_num_threads(a.threads)
    if a.side:
        work(a)
        return
    for setting in a.settings:
        found = {}
        for n in a.sub_keys:
            found[n] = m = compare(a, setting, n)
            numbers: dict[str, object] = {"setting": setting, "N": n * n}
            numbers |= {f"{k} ms": v * 1e3 for k, v in m.items() if "peak" not in k}
            numbers |= {f"{k} GB": v / 1e9 for k, v in m.items() if "peak" in k}
            numbers |= {f"peer / ours {k}": m[f"peer {k}"] / m[f"ours {k}"] for k in ("forward", "step")}
            show("peer", numbers | {"ours / peer peak": m["ours peak"] / m["peer peak"]})
        low, high = found[min(found)], found[max(found)]
        rest = [m["ours step"] - m["ours scores"] for m in (low, high)]
        show("peer growth", {
            "setting": setting, "N": [min(found) ** 2, max(found) ** 2],
            "step ratio": high["ours step"] / low["ours step"], "step ratio without scores": rest[1] / rest[0],
            "scores ms": [m["ours scores"] * 1e3 for m in (low, high)],
        })  # fmt: skip
    for setting in ("kept", "bfloat16"):
        for n in a.sub_keys if setting in a.settings else ():
            parts(a, setting, n)


if __name__ == "__main__":
    main()
