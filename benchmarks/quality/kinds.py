"""Which module for a published base: every kind and shape on the same rows of text, at its best rate.

Every way (a kind and its settings) trains on the first so many tokens of a domain, once, at each of its rates; the rate
is chosen on the domain's `valid.txt`, and the loss on its `test.txt` is told, in nats a token. What `lora` trains is
what PEFT trains. A cell is a file in OUT, so that a run that was stopped goes on; ways and tokens can be added.

python -m benchmarks.quality.kinds --data DIR --base CHECKPOINT --out kinds/ --domains medical_qa german_novels \
    --tokens 10k
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.lib.common import machine, slug
from growlm import data as text_data
from growlm.base import Base
from growlm.base.checkpoint import load_model, load_tokenizer
from growlm.base.placement import Placement
from growlm.disk.files import write_atomic
from growlm.errors import TrainingError
from growlm.modules import ModuleSet, kind_of
from growlm.modules.scoring import num_labels, passage_losses
from growlm.progress import reporting
from growlm.training.config import LearnConfig
from growlm.training.corpus import beginnings
from growlm.training.module_training import ModuleTraining, as_served
from growlm.units import format_count, parse_count

LENGTH, BATCH = 256, 4
WAYS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "lora r16": ({"kind": "lora"}, (5e-4, 1e-3, 2e-3, 4e-3)),
    "lora r16, layers 10 on": ({"kind": "lora", "layers": "10-29"}, (1e-3, 2e-3, 4e-3)),
    "lora r16, layers 20 on": ({"kind": "lora", "layers": "20-29"}, (1e-3, 2e-3, 4e-3)),
    "lora r64": ({"kind": "lora", "r": 64}, (5e-4, 1e-3, 2e-3)),
    "lora r64, rank-stabilised": ({"kind": "lora", "r": 64, "use_rslora": True}, (2e-4, 5e-4, 1e-3)),
    "lora r16, DoRA": ({"kind": "lora", "use_dora": True}, (1e-3, 2e-3, 4e-3)),
    "lora r32, attention": ({"kind": "lora", "r": 32, "target_modules": "q_proj,k_proj,v_proj,o_proj"}, (1e-3, 2e-3)),
    "lora r21, feed-forward": (
        {"kind": "lora", "r": 21, "target_modules": "gate_proj,up_proj,down_proj"}, (1e-3, 2e-3),
    ),
    "lora r16, own rows": ({"kind": "lora", "vocabulary": "both", "max_rows": 2048}, (1e-3, 2e-3)),
    "blocks, top": ({"vocabulary": "none"}, (2e-4, 5e-4, 1e-3)),
    "blocks, interleaved": ({"vocabulary": "none", "placement": "interleaved"}, (5e-4, 1e-3, 2e-3)),
    "blocks, interleaved, 8": (
        {"vocabulary": "none", "placement": "interleaved", "num_layers": 8}, (5e-4, 1e-3, 2e-3),
    ),
    "peer, layers 8, 15, 22": (
        {"kind": "peer", "vocabulary": "none", "layers": "8,15,22"}, (3e-3, 1e-2, 3e-2),
    ),
    "experts": ({"kind": "experts", "vocabulary": "none"}, (5e-4, 1e-3, 2e-3)),
}  # fmt: skip


class Kinds:
    """Cells of one base, computed or read."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        self.tokenizer = load_tokenizer(a.base)

    @cached_property
    def base(self) -> Base:
        return Base(load_model(self.a.base, "float32"), str(self.a.base))

    def documents(self, domain: str, split: str) -> list[text_data.Document]:
        return text_data.read([self.a.data / domain / f"{split}.txt"], separator="\n\n").documents

    def passages(self, domain: str, split: str, tokens: int) -> list[text_data.Passage]:
        found = text_data.passages(self.documents(domain, split), self.tokenizer, LENGTH)
        return beginnings(found, tokens, 0)

    def cell(self, domain: str, way: str, rate: float, seed: int, tokens: int) -> dict[str, Any]:
        path = self.a.out / "cells" / f"{slug(domain, way, rate, seed, tokens)}.json"
        if not path.exists():
            print(f"{domain}, {way}, {rate:g}, seed {seed}, {tokens:,} tokens ...", flush=True)
            found = self.trained(domain, way, rate, seed, tokens)
            write_atomic(path, json.dumps({"domain": domain, "way": way, "rate": rate, "seed": seed, **found}).encode())
        found = json.loads(path.read_text())
        return found if found["valid"] is not None else {**found, "valid": math.inf, "test": math.inf}

    def trained(self, domain: str, way: str, rate: float, seed: int, tokens: int) -> dict[str, Any]:
        config = LearnConfig(
            **WAYS[way][0],
            tokens=tokens,
            sequence_length=LENGTH,
            batch_size=BATCH,
            learning_rate=rate,
            seed=seed,
            precision="float32",
            device="cpu",
        ).on(0)
        # The first rows are the text; which of them are in one step is drawn.
        packed = text_data.pack(self.documents(domain, "train"), self.tokenizer, LENGTH, max_tokens=tokens)
        work = self.a.out / "runs" / slug(domain, way, rate, seed, tokens)
        start = time.monotonic()
        with reporting(way):
            training = ModuleTraining(self.base, kind_of(config.kind), config, packed, work)
            try:
                seconds = training.run()
            except TrainingError:
                shutil.rmtree(work, ignore_errors=True)
                return {"tokens": tokens, "valid": None, "test": None}
            module = as_served(self.base, training.module, way)
            num_tokens, fork = training.num_tokens, training.fork
            del training
            losses = {
                split: self.loss(ModuleSet(self.base, [module]), self.passages(domain, split, self.a.test_tokens))
                for split in ("valid", "test")
            }
        shutil.rmtree(work, ignore_errors=True)
        return {
            "tokens": num_tokens,
            **losses,
            "parameters": module.num_parameters(),
            "fork": fork,
            "seconds": seconds,
            "wall": time.monotonic() - start,
        }

    def untouched(self, domain: str) -> dict[str, float]:
        path = self.a.out / "cells" / f"{slug(domain, 'base')}.json"
        if not path.exists():
            found = {
                split: self.loss(ModuleSet(self.base), self.passages(domain, split, self.a.test_tokens))
                for split in ("valid", "test")
            }
            write_atomic(path, json.dumps(found).encode())
        return json.loads(path.read_text())

    def loss(self, modules: ModuleSet, passages: list[text_data.Passage]) -> float:
        texts = [p.tokens for p in passages]
        return float(passage_losses(modules, texts).sum()) / num_labels(texts)

    def best(self, domain: str, way: str, seed: int, tokens: int, rates: tuple[float, ...]) -> dict[str, Any]:
        found = [self.cell(domain, way, rate, seed, tokens) for rate in rates]
        return min(found, key=lambda cell: cell["valid"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder a domain, with train, valid and test.txt")
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint, as growlm convert makes one")
    parser.add_argument("--out", type=Path, required=True, help="where results are kept")
    parser.add_argument("--domains", nargs="+", required=True)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--tokens", type=parse_count, default=10_000)
    parser.add_argument("--test-tokens", type=parse_count, default=8_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rate", type=float, help="this one alone")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    kinds, threads = Kinds(a), Placement.of("cpu").record()
    print(f"{machine()}; {threads}; {a.tokens:,} tokens\n")
    print("| domain | way | trained | fork | rate | valid | test | steps, s |\n|---|---|---:|---:|---:|---:|---:|---:|")
    for domain in a.domains:
        alone = kinds.untouched(domain)
        print(f"| {domain} | base | | | | {alone['valid']:.3f} | {alone['test']:.3f} | |", flush=True)
        for way in a.ways:
            for seed in a.seeds:
                cell = kinds.best(domain, way, seed, a.tokens, (a.rate,) if a.rate else WAYS[way][1])
                if math.isinf(cell["valid"]):
                    print(f"| {domain} | {way} | | | | diverged | | |", flush=True)
                    continue
                print(
                    f"| {domain} | {way} | {format_count(cell['parameters'])} | {cell['fork']} | {cell['rate']:g} | "
                    f"{cell['valid']:.3f} | {cell['test']:.3f} | {cell['seconds']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
