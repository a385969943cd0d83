"""Which module: what closes the gap between a module and full finetuning, at which cost in bytes and time.

A module of every shape (placement, depth, rows of the vocabulary, learning rate, epochs) is learned on the same tokens
of one domain, beside LoRA and full finetuning; what is compared is held-out text that the ten-domain benchmark does not
measure on. Results are kept as they come.

python -m benchmarks.quality.choices --data DIR --out choices/ --base checkpoint/ --domains medical_qa vietnamese_wiki
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import growlm
from benchmarks.lib.baselines import Baseline
from benchmarks.lib.common import machine, same_settings
from benchmarks.lib.domains import GENERAL, LENGTH, Bench, cut
from growlm import data as text_data
from growlm.base.checkpoint import fingerprint
from growlm.disk.files import write_atomic
from growlm.errors import TrainingError
from growlm.modules import ModuleSet
from growlm.modules.scoring import num_labels, passage_losses
from growlm.training.config import LearnConfig
from growlm.units import parse_count

SHAPES: dict[str, dict[str, Any]] = {
    "top": {},
    "top, 2 layers": {"num_layers": 2},
    "top, 8 layers": {"num_layers": 8},
    "top, own embeddings too": {"vocabulary": "both"},
    "top, no own rows": {"vocabulary": "none"},
    "top, 1,024 rows": {"max_rows": 1024},
    "top, 2,048 rows": {"max_rows": 2048},
    "interleaved": {"placement": "interleaved"},
    "interleaved, 2 layers": {"placement": "interleaved", "num_layers": 2},
    "interleaved, 8 layers": {"placement": "interleaved", "num_layers": 8},
    "interleaved, own embeddings too": {"placement": "interleaved", "vocabulary": "both"},
    "interleaved, no own rows": {"placement": "interleaved", "vocabulary": "none"},
}
# Shapes at other rates and read more than once: (shape, learning rate, epochs).
GRID = [
    *((shape, 3e-3, 1) for shape in SHAPES),
    *((shape, rate, 1) for rate in (1e-3, 6e-3, 1e-2) for shape in ("top", "interleaved")),
    *((shape, 3e-3, epochs) for epochs in (2, 4) for shape in ("top", "interleaved")),
]
BASELINES = [
    *(("lora", rate, 1) for rate in (1e-3, 3e-3, 1e-2)),
    *(("lora and embeddings", rate, 1) for rate in (3e-4, 1e-3, 3e-3)),
    *(("finetune", rate, 1) for rate in (3e-4, 1e-3, 3e-3)),
    ("lora", 3e-3, 4),
    ("finetune", 1e-3, 4),
]


class Choices(Bench):
    """Modules and baselines trained on one domain each."""

    def text(self, domain: str) -> Path:
        """Exactly the tokens that one epoch reads."""
        path = self.out / "text" / f"{domain}-{self.tokens}.jsonl"
        if not path.exists():
            documents = cut(self.documents(domain, "train"), self.tokenizer, self.tokens)
            lines = [json.dumps({"text": d.text}, ensure_ascii=False) for d in documents]
            write_atomic(path, ("\n".join(lines) + "\n").encode())
        return path

    def module(self, domain: str, shape: str, rate: float, epochs: int) -> dict[str, Any]:
        folder = self.out / "trials" / domain
        shutil.rmtree(folder, ignore_errors=True)
        store = growlm.Store.create(folder, base=self.base)
        config = LearnConfig(admit_anyway=True,
            tokens=epochs * self.tokens, sequence_length=LENGTH, batch_size=8, learning_rate=rate, seed=self.seed,
            router_samples=32, **SHAPES[shape],
        )  # fmt: skip
        try:
            learned = growlm.learn(store, domain, [self.text(domain)], config)
        except TrainingError:
            return {"loss": None}
        manifest = store.module(domain).manifest
        passages = self.valid(domain)
        base = store.load_base()
        losses = passage_losses(ModuleSet(base, [store.load(domain, base)]), passages)
        shutil.rmtree(folder)
        return {
            "loss": float(losses.sum()) / num_labels(passages),
            "seconds": learned.seconds,
            "parameters": manifest.parameters,
            "fork": manifest.fork,
        }

    def baseline(self, domain: str, kind: str, rate: float, epochs: int, lora: int) -> dict[str, Any]:
        model = Baseline(
            self.model,
            self.tokenizer,
            lora_parameters=lora if "lora" in kind else None,
            vocabulary="embeddings" in kind,
            seed=self.seed,
        )
        folder = self.out / "trials" / f"{kind}-{domain}"
        documents = text_data.read([self.text(domain)]).documents
        try:
            seconds = model.learn(documents, self.settings(rate, epochs * self.tokens), folder, f"{kind} {domain}")
        except TrainingError:
            return {"loss": None}
        shutil.rmtree(folder)
        return {
            "loss": model.loss(self.valid(domain)),
            "seconds": seconds,
            "parameters": sum(p.numel() for p in model.parameters.values()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder a domain")
    parser.add_argument("--out", type=Path, required=True, help="where results are kept")
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint")
    parser.add_argument("--domains", nargs="+", required=True)
    parser.add_argument("--general", default=GENERAL)
    parser.add_argument("--tokens", type=parse_count, default=120_000)
    parser.add_argument("--test-tokens", type=parse_count, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    settings = {"base": fingerprint(a.base), "tokens": a.tokens, "test_tokens": a.test_tokens, "seed": a.seed}
    same_settings(a.out, settings)
    bench = Choices(a.out, a.general, a.domains, a.data, a.tokens, a.test_tokens, a.base.resolve(), a.seed)
    untouched = Baseline(bench.model, bench.tokenizer)
    base = {d: bench.kept(f"base-{d}", lambda d=d: untouched.loss(bench.valid(d))) for d in a.domains}
    rows: dict[tuple[str, float, int], dict[str, dict[str, Any]]] = {}
    for shape, rate, epochs in GRID:
        for d in a.domains:
            label = f"{d}-{shape}-{rate}-{epochs}".replace(" ", "-").replace(",", "")
            made = bench.kept(label, partial(bench.module, d, shape, rate, epochs))
            rows.setdefault((shape, rate, epochs), {})[d] = made
    lora = round(sum(rows[("top", 3e-3, 1)][d]["parameters"] for d in a.domains) / len(a.domains))
    for kind, rate, epochs in BASELINES:
        for d in a.domains:
            label = f"{d}-{kind}-{rate}-{epochs}".replace(" ", "-")
            made = bench.kept(label, partial(bench.baseline, d, kind, rate, epochs, lora))
            rows.setdefault((kind, rate, epochs), {})[d] = made
    print(f"{machine()}; {a.tokens:,} tokens a domain, seed {a.seed}\n")
    print("| what | rate | epochs | parameters | fork | seconds | " + " | ".join(a.domains) + " |")
    print("|---|---:|---:|---:|---:|---:|" + "---:|" * len(a.domains))
    print("| base | | | | | | " + " | ".join(f"{math.exp(base[d]):,.0f}" for d in a.domains) + " |")
    for (what, rate, epochs), found in rows.items():
        cells = ["diverged" if r["loss"] is None else f"{math.exp(r['loss']):.1f}" for r in found.values()]
        done = [r for r in found.values() if r["loss"] is not None]
        mean = {k: sum(r[k] for r in done) / len(done) for k in ("parameters", "seconds")} if done else {}
        facts = [f"{mean['parameters'] / 1e6:.1f} M", str(done[0].get("fork", "")), f"{mean['seconds']:.0f}"]
        print(f"| {what} | {rate:g} | {epochs} | {' | '.join(facts if done else ['', '', ''])} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
