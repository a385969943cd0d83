"""learn (`blocks`, top) against PEFT LoRA: the same base, batch, length and dtype, steps in turns within one run.

Each side is a process of its own, because `learn` changes how its process allocates memory. LoRA is measured twice: as
its users run it, and with that same change.

The floor of a side is what its matrix products would take at the rate of one large product that was measured with it.

python -m benchmarks.speed.learn_vs_lora [--rounds 9]
python -m benchmarks.speed.learn_vs_lora --base checkpoint/ --rank 16 --batch 1 --length 512 --precision float32
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.lib.common import interleaved, qwen2, show
from growlm.base import Base
from growlm.base.checkpoint import load_model
from growlm.data import PackedTokens
from growlm.modules.blocks import Blocks
from growlm.training.config import LearnConfig
from growlm.training.memory import kept_pages
from growlm.training.module_training import ModuleTraining


def tokens(rows: int, length: int) -> PackedTokens:
    # Zipf-like, as text is.
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(1.2, size=(rows, length + 1)), 31_999)
    return PackedTokens(ids.astype(np.int32))


def model_of(a: argparse.Namespace):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(qwen2()) if a.base is None else load_model(a.base, "float32")


def learner(a: argparse.Namespace, epochs: int, packed: PackedTokens):
    base = Base(model_of(a))
    config = LearnConfig(
        admit_anyway=True,
        epochs=epochs,
        sequence_length=a.length,
        batch_size=a.batch,
        precision=a.precision,
        max_rows=8192,
    )
    learning = ModuleTraining(base, Blocks, config, packed, Path(tempfile.mkdtemp()))
    optimizer = torch.optim.AdamW(learning.module.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        for loss in learning._losses(0):
            loss.backward()  # with features cached from the second time on, if there are two epochs
        torch.nn.utils.clip_grad_norm_(learning.module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return learning, step


def lora(a: argparse.Namespace, trainable: int, packed: PackedTokens):
    dtype = getattr(torch, a.precision)
    model = model_of(a).to(dtype)
    rank = a.rank or 8
    while a.rank is None:
        count = 8 * rank * (4 * 1024 + 3 * (512 + 1408))  # rank x (in + out) of every linear layer
        if count >= trainable:
            break
        rank += 8
    peft = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", lora_dropout=0.0))
    parameters = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    rows = np.arange(a.batch)

    def step() -> None:
        batch = packed[rows][:, :-1]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            peft(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return sum(p.numel() for p in parameters), step


def work(a: argparse.Namespace) -> None:
    """One side in a process of its own: a line in, one step, its seconds out. At the end its peak memory."""
    packed = tokens(512, a.length)  # enough text for the row budget to matter
    side: str = a.side
    if side.startswith("lora"):
        parameters, step = lora(a, int(side.split("-")[-1]), packed)
    else:
        learning, step = learner(a, 2 if side == "cached" else 1, packed)
        parameters = sum(p.numel() for p in learning.module.parameters())
        if side == "base_forward":
            step = partial(learning._features, np.arange(a.batch))  # type: ignore[assignment]
    step()  # of cached features, the one that makes them
    with FlopCounterMode(display=False) as counter:
        step()
    print(json.dumps([parameters, counter.get_total_flops()]), flush=True)
    with nullcontext() if side.startswith("lora-as-it-is") else kept_pages():
        for _ in sys.stdin:
            start = time.perf_counter()
            step()
            print(time.perf_counter() - start, flush=True)
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024, flush=True)


class Worker:
    def __init__(self, side: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--side", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.parameters, self.flops = json.loads(self.line())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def step(self) -> float:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return float(self.line())

    def peak(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return int(self.line())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--base", type=Path, help="a checkpoint's folder; by default random weights")
    parser.add_argument("--rank", type=int, help="of LoRA; by default that of as many parameters as the module has")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        work(arguments)
        return
    workers = {side: Worker(side) for side in ("learn", "cached", "base_forward")}
    half = workers["learn"].parameters // 2
    workers["lora"] = Worker(f"lora-as-it-is-{half}")
    workers["lora_kept_pages"] = Worker(f"lora-kept-pages-{half}")
    times: dict[str, list[float]] = {side: [] for side in workers}
    for turn in range(2 + arguments.rounds):
        for side, worker in workers.items():
            seconds = worker.step()
            if turn >= 2:
                times[side].append(seconds)
    square = torch.randn(2048, 2048, dtype=getattr(torch, arguments.precision))
    peak = 2 * 2048**3 / interleaved({"product": lambda: square @ square}, 9)["product"]
    median = {side: statistics.median(values) for side, values in times.items()}
    three = (median["learn"] + 2 * median["cached"]) / 3
    numbers: dict[str, object] = {
        "module_parameters": workers["learn"].parameters,
        "lora_parameters": workers["lora"].parameters,
        "tokens_per_second": {
            side: round(arguments.batch * arguments.length / seconds) for side, seconds in median.items()
        },
        "of_peak": {side: round(workers[side].flops / median[side] / peak, 2) for side in workers},
        "peak_gflops": round(peak / 1e9),
    }
    for side in ("lora", "lora_kept_pages"):
        numbers[f"against_{side}"] = {
            "one_epoch": round(median[side] / median["learn"], 2),
            "three_epochs": round(median[side] / three, 2),
        }
    numbers["peak_gb"] = {side: round(worker.peak() / 1e9, 2) for side, worker in workers.items()}
    show("learn_vs_lora", numbers)


if __name__ == "__main__":
    main()
