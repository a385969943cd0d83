"""LoRA alone and with a memory of the domain's text: the same adapter, trained once, measured both ways.

Of every domain a LoRA adapter trains on rows drawn from its first `--text` tokens, at the rate that trials find or at
`--rates`, and is kept. Cells are files in OUT, so that a run that was stopped goes on.

python -m benchmarks.quality.recall --data DIR --base CHECKPOINT --out recall/
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.common import machine, slug
from benchmarks.lib.domains import DOMAINS
from growlm import data as text_data
from growlm.base import Base
from growlm.base.checkpoint import load_model, load_tokenizer
from growlm.disk.files import write_atomic
from growlm.disk.tensors import write_tensors
from growlm.modules import kind_of
from growlm.progress import reporting
from growlm.training.config import AUTO, LearnConfig
from growlm.training.corpus import beginnings
from growlm.training.module_training import ModuleTraining, as_served
from growlm.units import parse_count

LENGTH, BATCH = 256, 4


class Adapters:
    """One base and the adapters that were trained on it."""

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

    def adapter(self, domain: str, seed: int, rate: float | str) -> Path:
        """The folder of a trained adapter: its tensors, and how it was trained."""
        folder = self.a.out / "adapters" / slug(domain, seed, rate)
        if not (folder / "training.json").exists():
            print(f"{domain}, seed {seed}, rate {rate} ...", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            found, tensors = self._trained(domain, seed, rate)
            write_tensors(folder / "module.safetensors", tensors)
            write_atomic(folder / "training.json", json.dumps(found).encode())
            print(f"    rate {found['learning_rate']:g}, {found['seconds']:.0f} s", flush=True)
        return folder

    def _trained(self, domain: str, seed: int, rate: float | str) -> tuple[dict[str, Any], dict[str, Any]]:
        config = LearnConfig(
            kind="lora",
            tokens=self.a.tokens,
            sequence_length=LENGTH,
            batch_size=BATCH,
            learning_rate=rate,
            seed=seed,
            precision="float32",
            device="cpu",
        )
        packed = text_data.pack(self.documents(domain, "train"), self.tokenizer, LENGTH, max_tokens=self.a.text)
        drawn = np.random.default_rng(seed).permutation(len(packed))[: self.a.tokens // LENGTH]
        rows = text_data.PackedTokens(packed.tokens[drawn])
        work = self.a.out / "runs" / slug(domain, seed, rate)
        start = time.monotonic()
        with reporting(domain):
            validation = self.passages(domain, "valid", self.a.valid_tokens)
            training = ModuleTraining(self.base, kind_of("lora"), config, rows, work, validation=validation)
            seconds = training.run()
            module = as_served(self.base, training.module, domain)
        shutil.rmtree(work, ignore_errors=True)
        found = {
            **training.record(),
            "domain": domain,
            "seed": seed,
            "rows": drawn.tolist(),
            "tokens": training.num_tokens,
            "config": module.config.model_dump(mode="json"),
            "parameters": module.num_parameters(),
            "seconds": seconds,
            "wall": time.monotonic() - start,
        }
        return found, dict(module.state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder a domain, with train, valid and test.txt")
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint, as growlm convert makes one")
    parser.add_argument("--out", type=Path, required=True, help="where results are kept")
    parser.add_argument("--domains", nargs="+", default=DOMAINS)
    parser.add_argument("--tokens", type=parse_count, default=40_000, help="that an adapter is trained on")
    parser.add_argument("--text", type=parse_count, default=400_000, help="that the whole text has, at most")
    parser.add_argument("--valid-tokens", type=parse_count, default=4_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rates", nargs="+", default=[AUTO], help="of the adapter; auto finds it by trials")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    adapters = Adapters(a)
    print(machine())
    for seed in a.seeds:
        for domain in a.domains:
            for rate in a.rates:
                adapters.adapter(domain, seed, rate if rate == AUTO else float(rate))


if __name__ == "__main__":
    main()
