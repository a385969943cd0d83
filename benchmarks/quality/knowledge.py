"""Adding knowledge to a frozen base: PEER pools, blocks and LoRA, at equal bytes and at equal active parameters.

All read the same tokens once, none has vocabulary rows, and each takes the learning rate, of those tried, that does
best on held-out text of the first domain with the first seed. What they gain is measured on other text. A cell is the
mean over seeds with half of its 95 % interval; results are kept as they come.

python -m benchmarks.quality.knowledge --data DIR --out out/ --base checkpoint/ --domains medical_qa vietnamese_wiki
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import growlm
from benchmarks.lib.baselines import Baseline
from benchmarks.lib.common import best_rate, kept, machine, print_table, same_settings, slug
from growlm import data as text_data
from growlm.base.checkpoint import fingerprint, load_model, load_tokenizer
from growlm.modules import ModuleSet
from growlm.modules.scoring import num_labels, passage_losses
from growlm.training.config import LearnConfig, TrainConfig
from growlm.units import parse_count

LENGTH = 256
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# Settings of `learn`, or how many times the parameters of a way a LoRA has.
MODULES: dict[str, dict[str, Any]] = {
    "4 blocks at the top": {"num_layers": 4},
    "4 blocks, interleaved": {"num_layers": 4, "placement": "interleaved"},
    "PEER of as many bytes": {"kind": "peer"},
    "PEER of as many bytes, in place": {"kind": "peer", "replace_feed_forward": True},
    "PEER of ten times the bytes": {"kind": "peer"},
}
SIZES = {"PEER of as many bytes": 1, "PEER of as many bytes, in place": 1, "PEER of ten times the bytes": 10}
LORA = {"LoRA of as many bytes": "4 blocks at the top", "LoRA of PEER's active parameters": "PEER of as many bytes"}


class Bench:
    """Ways to add knowledge, on one base."""

    def __init__(
        self, out: Path, data: Path, base: Path, domains: Sequence[str], tokens: int, test_tokens: int, seeds: list[int]
    ) -> None:
        self.out, self.data, self.base, self.domains = out, data, base, domains
        self.tokens, self.test_tokens, self.seeds = tokens, test_tokens, seeds
        self.model, self.tokenizer = load_model(base, "float32"), load_tokenizer(base)

    def passages(self, domain: str, split: str) -> list[list[int]]:
        documents = text_data.read([self.data / domain / f"{split}.txt"], separator="\n\n").documents
        found = text_data.passages(documents, self.tokenizer, LENGTH, limit=max(self.test_tokens // LENGTH, 2))
        return [p.tokens for p in found]

    def settings(self, way: str) -> dict[str, Any]:
        if way not in SIZES:
            return MODULES[way]
        size = self.facts("4 blocks at the top")["parameters"] * SIZES[way]
        side = round(math.sqrt(size / (2 * self.model.config.hidden_size)))
        return MODULES[way] | {"num_experts": side * side}

    def run(self, way: str, domain: str, rate: float, seed: int, split: str) -> dict[str, float]:
        """Nats a token, parameters, and of these how many work for a token."""
        if way in LORA:
            return self.lora(way, domain, rate, seed, split)
        work = self.out / "work"
        shutil.rmtree(work, ignore_errors=True)
        store = growlm.Store.create(work, base=self.base)
        config = LearnConfig(admit_anyway=True,
            tokens=self.tokens, sequence_length=LENGTH, batch_size=8, learning_rate=rate, seed=seed, separator="\n\n",
            router_samples=16, vocabulary="none", **self.settings(way),
        )  # fmt: skip
        learned = growlm.learn(store, "domain", [self.data / domain / "train.txt"], config)
        base = store.load_base()
        module = store.load("domain", base)
        passages = self.passages(domain, split)
        loss = float(passage_losses(ModuleSet(base, [module]), passages).sum()) / num_labels(passages)
        active = total = module.num_parameters()
        if config.kind == "peer":
            rows = module.config.num_heads * module.config.top_k * len(module.config.layers)
            active = total - (module.config.num_experts * len(module.config.layers) - rows) * 2 * base.hidden_size
        shutil.rmtree(work)
        return {"loss": loss, "parameters": total, "active": active, "seconds": learned.seconds}

    def lora(self, way: str, domain: str, rate: float, seed: int, split: str) -> dict[str, float]:
        facts = self.facts(LORA[way])
        size = facts["active" if "active" in way else "parameters"]
        model = Baseline(self.model, self.tokenizer, lora_parameters=round(size), seed=seed)
        work = self.out / "work"
        shutil.rmtree(work, ignore_errors=True)
        documents = text_data.read([self.data / domain / "train.txt"], separator="\n\n").documents
        settings = TrainConfig(tokens=self.tokens, sequence_length=LENGTH, batch_size=8, learning_rate=rate, seed=seed)
        seconds = model.learn(documents, settings, work, f"{way} {domain} {rate:g}")
        shutil.rmtree(work)
        number = sum(p.numel() for p in model.parameters.values())
        loss = model.loss(self.passages(domain, split))
        return {"loss": loss, "parameters": number, "active": number, "seconds": seconds}

    def facts(self, way: str) -> dict[str, float]:
        return self.kept(way, self.domains[0], 3e-3, self.seeds[0], "valid")

    def kept(self, way: str, domain: str, rate: float, seed: int, split: str) -> dict[str, float]:
        name = slug(way, domain, f"{rate:g}", seed, split)
        return kept(self.out, name, lambda: self.run(way, domain, rate, seed, split))

    def table(self) -> None:
        untouched = Baseline(self.model, self.tokenizer)
        base = {d: kept(self.out, slug("base", d), lambda d=d: untouched.loss(self.passages(d, "test")))
                for d in self.domains}  # fmt: skip
        rows = []
        for way in (*MODULES, *LORA):
            first = self.domains[0], self.seeds[0]
            rate = best_rate(RATES, lambda r, way=way, f=first: self.kept(way, f[0], r, f[1], "valid")["loss"])
            cells: dict[str, list[float]] = {"parameters, M": [], "active, M": [], "rate": [rate], "seconds": []}
            for domain in self.domains:
                found = [self.kept(way, domain, rate, seed, "test") for seed in self.seeds]
                cells[f"{domain}, nats gained"] = [base[domain] - f["loss"] for f in found]
                cells["seconds"] += [f["seconds"] for f in found]
            cells["parameters, M"], cells["active, M"] = [found[0]["parameters"] / 1e6], [found[0]["active"] / 1e6]
            rows.append((way, cells))
        size = self.model.num_parameters() / 1e6
        print(f"\n{machine()}; base {size:.1f} M parameters, {self.tokens:,} tokens a domain, seeds {self.seeds}")
        print_table("adding knowledge", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder a domain")
    parser.add_argument("--out", type=Path, required=True, help="where results are kept")
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint")
    parser.add_argument("--domains", nargs="+", required=True)
    parser.add_argument("--tokens", type=parse_count, default=60_000)
    parser.add_argument("--test-tokens", type=parse_count, default=12_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    a = parser.parse_args()
    same_settings(a.out, {"base": fingerprint(a.base), "tokens": a.tokens, "test_tokens": a.test_tokens})
    Bench(a.out, a.data, a.base.resolve(), a.domains, a.tokens, a.test_tokens, a.seeds).table()


if __name__ == "__main__":
    main()
