"""Bases of random weights in llama's shape, made on the device; and one checkpoint of them with its store, which the
stages that need files share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.lib.common import save_tokenizer
from benchmarks.stages.bench import Bench
from growlm.base import Base
from growlm.base.checkpoint import save_model
from growlm.modules import kind_of
from growlm.router import files_of, gather_evidence, write_general
from growlm.store import Store

# By name: width, that of the feed-forward, layers, heads. Parameters: 1.52 and 6.74 billion.
SIZES = {"1.5B": (2048, 5632, 27, 16), "7B": (4096, 11008, 32, 32), "tiny": (64, 128, 3, 2)}
VOCABULARY = {"1.5B": 32_000, "7B": 32_000, "tiny": 256}


def make_model(size: str, device: torch.device) -> Any:
    """In bfloat16."""
    width, inner, layers, heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY[size],
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def store_of(bench: Bench) -> Store:
    """A store of the 1.5 B base, without modules, which an earlier stage may have made."""
    folder, size = bench.out / "store", "tiny" if bench.tiny else "1.5B"
    if (folder / "router").exists():
        return Store.open(folder)
    checkpoint = bench.out / "base"
    if not (checkpoint / "tokenizer.json").exists():
        save_model(make_model(size, bench.device), checkpoint)
        save_tokenizer(checkpoint, VOCABULARY[size])
        bench.tidy()
    store = Store.open(folder) if (folder / "store.json").exists() else Store.create(folder, checkpoint)
    write_general(store, store.load_base(device=bench.device), [_texts(VOCABULARY[size])])
    bench.tidy()
    return store


def add_modules(store: Store, base: Base, kind: str, names: list[str], settings: dict[str, Any]) -> None:
    """Those that it does not have yet, of random numbers so small that they change little."""
    missing = [name for name in names if store.find(name) is None]
    if not missing:
        return
    texts = _texts(base.vocab_size)
    known = files_of(gather_evidence(base, *texts, layer=store.manifest.routing_layer))
    module = kind_of(kind).create(base, kind_of(kind).Config(**settings, vocabulary="none"))
    for number, name in enumerate(missing):
        torch.manual_seed(number)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p), alpha=0.002)
        store.commit(name, module, {}, known)


def prompts_of(vocabulary: int, count: int, tokens: int) -> list[list[int]]:
    return np.random.default_rng(tokens).integers(1, vocabulary, size=(count, tokens)).tolist()


def _texts(vocabulary: int) -> tuple[list[list[int]], list[list[int]]]:
    texts = np.random.default_rng(0).integers(1, vocabulary, size=(16, 64)).tolist()
    return texts[:8], texts[8:]
