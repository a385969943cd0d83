"""A ModuleFormer as a whole, measured: training against the published formulation, decoding by length of text, and
sparse against dense of equal quality (ModuleFormer, table 2).

train   tokens a second of molm-tiny, this package against `formulation.py`, in turns within one run; and of the same
        model with torch's softmax attention, to see what the rest of a step takes
decode  milliseconds for one more token after texts of growing length, with a line fitted through them
dense   molm-tiny and a ladder of dense models (softmax, rotary positions) trained on the same text: held-out
        perplexity, and of each latency, throughput and memory, in turns within one run

python -m benchmarks.speed.molm train decode
python -m benchmarks.speed.molm dense --data TEXT.txt --out molm/ --tokens 1M
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import growlm
from benchmarks.lib import formulation
from benchmarks.lib.common import interleaved, machine, same_settings, show
from growlm.base import Base
from growlm.base.cache import cache_of
from growlm.base.checkpoint import load_model
from growlm.disk.files import write_atomic
from growlm.layers.cross_entropy import linear_cross_entropy
from growlm.model import GrowlmConfig, GrowlmForCausalLM
from growlm.training.config import PretrainConfig
from growlm.training.memory import kept_pages
from growlm.training.segments import final_states
from growlm.units import parse_count

PRESET = Path(growlm.__file__).parent / "model" / "presets" / "molm-tiny.json"
TOKENS = 4096  # of a training step
DENSE = {"feed_forward": "dense", "attention": "softmax", "num_attention_experts": 0, "auxiliary_loss": "none"}
LADDER = {"dense 256 x 4": (256, 4), "dense 320 x 5": (320, 5), "dense 384 x 6": (384, 6)}
SPARSE = "molm-tiny"


def preset(**changes: Any) -> dict[str, Any]:
    return json.loads(PRESET.read_text()) | changes


def new_model(**changes: Any) -> GrowlmForCausalLM:
    torch.manual_seed(0)
    return GrowlmForCausalLM(GrowlmConfig(**preset(**changes)))


# Training


def train(rounds: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for length in (256, 512, 1024):
            sides = {name: trainer(name, dtype, length) for name in ("growlm", "published", "softmax")}
            times = interleaved(sides, rounds=rounds, warmup=1)
            show("training of molm-tiny", {
                "precision": str(dtype), "sequence length": length,
                **{f"{s} tokens/s": TOKENS / t for s, t in times.items()},
                "growlm / published": times["published"] / times["growlm"],
                "softmax / published": times["published"] / times["softmax"],
            })  # fmt: skip


def trainer(side: str, dtype: torch.dtype, length: int) -> Any:
    """A whole optimiser step on tokens at random; `softmax`: of the same model with torch's softmax attention."""
    model = new_model(**({"attention": "softmax"} if side == "softmax" else {})).train()
    base = Base(model, freeze=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    random = torch.Generator().manual_seed(0)
    batch = torch.randint(model.config.vocab_size, (TOKENS // length, length + 1), generator=random)
    inputs, labels = batch[:, :-1], batch[:, 1:].flatten()

    def loss_of_ours() -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            hidden, auxiliary = final_states(base, inputs)
        assert auxiliary is not None
        return linear_cross_entropy(hidden.to(dtype).flatten(0, 1), model.lm_head.weight, labels) + auxiliary

    def loss_of_theirs() -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            hidden, auxiliary = formulation.states(model, inputs)
            logits = model.lm_head(hidden)
        return F.cross_entropy(logits.float().flatten(0, 1), labels) + auxiliary

    loss = loss_of_theirs if side == "published" else loss_of_ours

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# Decoding


@torch.no_grad()
def decode(rounds: int) -> None:
    model = new_model().eval()
    for kind in ("as initialised", "lasting"):
        if kind == "lasting":  # every stick reaches the oldest key: the most work there can be
            for layer in model.model.layers:
                layer.self_attn.k_proj.weight.zero_()
                layer.self_attn.k_proj.bias.zero_()
                layer.self_attn.k_proj.bias.view(-1, 64)[:, 0] = -8.0
                layer.self_attn.experts.query.weight.mul_(0.02)
        lengths = [256, 512, 1024, 2048, 4096, 8192]
        sides = {str(n): one_more(model, n) for n in lengths}
        with kept_pages():
            times = interleaved(sides, rounds=rounds)
        milliseconds = [times[str(n)] * 1e3 for n in lengths]
        slope, start = statistics.linear_regression(lengths, milliseconds)
        worst = max(abs(m - start - slope * n) / m for n, m in zip(lengths, milliseconds, strict=True))
        show("one more token of molm-tiny", {
            "sticks": kind, **{f"at {n}, ms": m for n, m in zip(lengths, milliseconds, strict=True)},
            "ms": start, "ms for a thousand tokens more": slope * 1000, "farthest from the line": worst,
        })  # fmt: skip


def one_more(model: GrowlmForCausalLM, length: int) -> Any:
    ids = torch.randint(model.config.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(length))
    cache = cache_of(model(ids[:, :-1], use_cache=True))

    @torch.no_grad()
    def step() -> None:
        model(ids[:, -1:], cache=cache, use_cache=True)
        cache.crop(-1)

    return step


# Sparse against dense


def dense(data: Path, out: Path, tokens: int, seeds: list[int], rounds: int) -> None:
    """Every model is trained with the default rate of its width; the vocabulary is trained once a seed, the same for
    all, so that perplexities are of the same tokens."""
    same_settings(out, {"tokens": tokens, "data": data.name})
    shapes: dict[str, dict[str, Any]] = {SPARSE: {}}
    for name, (width, depth) in LADDER.items():
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": 4 * width}
        shapes[name] = DENSE | sizes | {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    rows = []
    for name, changes in shapes.items():
        slug = name.replace(" ", "")
        config = out / slug / "config.json"
        write_atomic(config, json.dumps(preset(**changes)).encode())
        perplexities = []
        for seed in seeds:
            folder = out / f"{slug}-{seed}"
            if not folder.exists():
                growlm.pretrain(folder, [data], PretrainConfig(config=str(config), tokens=tokens, seed=seed))
            perplexities.append(math.exp(json.loads((folder / "pretrain.json").read_text())["loss_after"]))
        rows.append((name, out / f"{slug}-{seeds[0]}", perplexities))
    models = {name: load_model(folder, "float32") for name, folder, _ in rows}
    ids = torch.randint(8192, (16, 256), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), kept_pages():
        latency = interleaved({n: one_more(m, 256) for n, m in models.items()}, rounds=3 * rounds)
        first = interleaved({n: partial(m, ids[:1], use_cache=False) for n, m in models.items()}, rounds=rounds)
        many = interleaved({n: partial(m, ids, use_cache=False) for n, m in models.items()}, rounds=rounds, warmup=1)
    print(f"\n{machine()}; {tokens:,} tokens, seeds {seeds}, batch of the throughput {tuple(ids.shape)}, float32\n")
    print("| model | parameters, M | active, M | held-out perplexity | one more token, ms | 256 tokens, ms | tokens/s "
          "| weights, MB | peak above weights, MB |")  # fmt: skip
    print("|---|" + "---:|" * 8)
    for name, folder, perplexities in rows:
        model = models[name]
        numbers = (
            model.num_parameters() / 1e6, model.num_active_parameters() / 1e6, statistics.fmean(perplexities),
            latency[name] * 1e3, first[name] * 1e3, ids.numel() / many[name], 4 * model.num_parameters() / 1e6,
            peak(folder),
        )  # fmt: skip
        print(f"| {name} | " + " | ".join(f"{x:.3g}" if x < 1000 else f"{x:,.0f}" for x in numbers) + " |")


def peak(folder: Path) -> float:
    """MB that a forward pass of 16 x 256 tokens takes above the weights, in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-m", __spec__.name, "peak", "--out", str(folder)], check=True, capture_output=True, text=True
    )
    return float(found.stdout.split()[-1])


def print_peak(folder: Path) -> None:
    model = load_model(folder, "float32")
    ids = torch.randint(8192, (16, 256), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids[:1, :8], use_cache=False)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        model(ids, use_cache=False)
    print((_status("VmHWM") - before) / 1e6)


def _status(field: str) -> int:
    """Bytes of this process, from what Linux says of it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["train", "decode", "dense", "peak"])
    parser.add_argument("--data", type=Path, help="text to train on, for dense")
    parser.add_argument("--out", type=Path, help="folder for the models of dense")
    parser.add_argument("--tokens", type=parse_count, default=1_000_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    if a.what == ["peak"]:
        print_peak(a.out)
        return
    if "dense" in a.what and (a.data is None or a.out is None):
        parser.error("dense needs --data and --out")
    for what in a.what:
        if what == "train":
            with kept_pages():
                train(a.rounds)
        elif what == "decode":
            decode(3 * a.rounds)
        elif what == "dense":
            dense(a.data, a.out, a.tokens, a.seeds, a.rounds)


if __name__ == "__main__":
    main()
