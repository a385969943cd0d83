"""learn (`blocks`, top) against PEFT LoRA: the same base, batch, length and dtype, steps in turns within one run.

python benchmarks/learn_vs_lora.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from common import interleaved, qwen2, show
from growlm.data import PackedTokens
from growlm.modules.base import Base
from growlm.modules.blocks import Blocks
from growlm.training.config import LearnConfig
from growlm.training.learn import _Learning

BATCH, LENGTH = 8, 256


def tokens(rows: int) -> PackedTokens:
    # Zipf-like, as text is.
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(1.2, size=(rows, LENGTH + 1)), 31_999)
    return PackedTokens(ids.astype(np.int32))


def learner(folder: Path, epochs: int, packed: PackedTokens):
    torch.manual_seed(0)
    base = Base(AutoModelForCausalLM.from_config(qwen2()))
    config = LearnConfig(epochs=epochs, sequence_length=LENGTH, batch_size=BATCH, precision="bfloat16", max_rows=8192)
    learning = _Learning(base, Blocks, config, packed, folder)
    optimizer = torch.optim.AdamW(learning.module.parameters(), lr=1e-3, fused=True)

    def step(number: int) -> None:
        learning._loss(number).backward()
        torch.nn.utils.clip_grad_norm_(learning.module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return learning, step


def lora(trainable: int, packed: PackedTokens):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(qwen2()).to(torch.bfloat16)
    rank = 8
    while True:
        count = 8 * rank * (4 * 1024 + 3 * (512 + 1408))  # rank x (in + out) of every linear layer
        if count >= trainable:
            break
        rank += 8
    peft = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", lora_dropout=0.0))
    parameters = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    rows = np.arange(BATCH)

    def step() -> None:
        batch = packed[rows][:, :-1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            peft(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return rank, sum(p.numel() for p in parameters), step, peft


def peak(side: str) -> float:
    """Peak resident bytes of three steps of one side, in a process of its own."""
    packed = tokens(512)
    if side == "learn":
        _, step = learner(Path(tempfile.mkdtemp()), 1, packed)
        for _ in range(3):
            step(0)
    else:
        _, _, step, _ = lora(int(side), packed)
        for _ in range(3):
            step()
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(arguments.peak))
        return
    packed = tokens(512)  # enough text for the row budget to matter
    once, first = learner(Path(tempfile.mkdtemp()), 1, packed)
    again, cached = learner(Path(tempfile.mkdtemp()), 2, packed)
    cached(0)  # fills the cache; from here on step 0 reads it
    module = sum(p.numel() for p in once.module.parameters())
    rank, trainable, lora_step, _ = lora(module // 2, packed)
    seconds = interleaved(
        {
            "learn": lambda: first(0),
            "cached": lambda: cached(0),
            "lora": lora_step,
            "base_forward": lambda: once._features(np.arange(BATCH)),
        },
        arguments.rounds,
    )
    count = BATCH * LENGTH
    three = 3 / (1 / (count / seconds["learn"]) + 2 / (count / seconds["cached"]))
    memory = {
        side: float(subprocess.check_output([sys.executable, __file__, "--peak", argument]))
        for side, argument in (("learn", "learn"), ("lora", str(module // 2)))
    }
    show(
        "learn_vs_lora",
        {
            "module_parameters": module,
            "lora_parameters": trainable,
            "lora_rank": rank,
            "tokens_per_second": {k: round(count / v) for k, v in seconds.items()},
            "ratio_one_epoch": round(seconds["lora"] / seconds["learn"], 2),
            "ratio_three_epochs": round(three / (count / seconds["lora"]), 2),
            "peak_gb": {k: round(v / 1e9, 2) for k, v in memory.items()},
        },
    )
    again._cache.close()


if __name__ == "__main__":
    main()
