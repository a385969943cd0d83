"""What the benchmarks share: a base of a given size, interleaved timing, the machine's name."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from growlm.modules.checkpoint import save_model


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
    vocabulary = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def interleaved(sides: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each side, measured in turns within one run."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


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
