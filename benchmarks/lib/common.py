"""What the benchmarks share: a base of a given size, interleaved timing, results that are kept, tables, the machine's
name."""

from __future__ import annotations

import json
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from growlm.base.checkpoint import save_model
from growlm.disk.files import write_atomic


def qwen2(vocab_size: int = 32_000, hidden_size: int = 512, num_hidden_layers: int = 8) -> Qwen2Config:
    """A Qwen2 of 42 million parameters at the defaults."""
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=1408,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )


def save_base(folder: Path, config: Qwen2Config) -> Path:
    """A checkpoint with random weights and a tokenizer of one token a byte or word."""
    torch.manual_seed(0)
    save_model(AutoModelForCausalLM.from_config(config), folder)
    save_tokenizer(folder, config.vocab_size)
    return folder


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """One token a word: w1, w2 and so on."""
    vocabulary = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


def interleaved(sides: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each side, measured in turns within one run."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def same_settings(out: Path, settings: dict[str, object]) -> None:
    """Results in `out` are of these settings only; they are recorded the first time.

    Raises:
        SystemExit: it holds results of other settings; says which differ.
    """
    path = out / "settings.json"
    plain = json.loads(json.dumps(settings, default=str))
    if path.exists():
        before = json.loads(path.read_text())
        differ = sorted(k for k in before.keys() | plain.keys() if before.get(k) != plain.get(k))
        if differ:
            raise SystemExit(f"{out}: holds results with another {', '.join(differ)}; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain, indent=1))


def slug(*parts: object) -> str:
    """A file's name for a way and its settings."""
    return "-".join(re.sub(r"[,\s]+", "-", str(part)) for part in parts)


def kept(out: Path, name: str, make: Callable[[], Any]) -> Any:
    """A result, as JSON has it: what an earlier run left in `out`, else made now and left there."""
    path = out / "results" / f"{name}.json"
    if not path.exists():
        print(f"{name} ...", flush=True)
        write_atomic(path, json.dumps(make()).encode())
    return json.loads(path.read_text())


def cell(values: Sequence[float]) -> str:
    """Mean and half of its 95 % interval (Student's t)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3g}"
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.3)
    return f"{mean:.3g} ± {t * statistics.stdev(values) / math.sqrt(len(values)):.2g}"


def print_table(title: str, rows: Sequence[tuple[str, dict[str, list[float]]]]) -> None:
    """Rows of (label, {column: one number a seed}); a column that a row lacks stays empty."""
    columns = list(dict.fromkeys(name for _, cells in rows for name in cells))
    print(f"\n| {title} | " + " | ".join(columns) + " |")
    print("|---|" + "---:|" * len(columns))
    for label, cells in rows:
        print(f"| {label} | " + " | ".join(cell(cells[c]) if c in cells else "" for c in columns) + " |", flush=True)


def best_rate(rates: Sequence[float], loss: Callable[[float], float]) -> float:
    """The rate of least loss, tried from the middle of `rates` on until the best is not at an end of those tried."""
    losses: dict[float, float] = {}
    low, high = max(len(rates) // 2 - 1, 0), min(len(rates) // 2 + 1, len(rates) - 1)
    while True:
        for rate in rates[low : high + 1]:
            if rate not in losses:
                losses[rate] = loss(rate)
        best = min(losses, key=lambda r: losses[r])
        at, tried = rates.index(best), (low, high)
        low, high = max(min(low, at - 1), 0), min(max(high, at + 1), len(rates) - 1)
        if (low, high) == tried:
            return best


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def show(name: str, numbers: dict[str, object]) -> None:
    print(json.dumps({"benchmark": name, **numbers, "machine": machine()}), flush=True)
