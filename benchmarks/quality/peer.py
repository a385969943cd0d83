"""PEER's claims at CPU size, from scratch, at equal FLOPs: one feed-forward in the middle of the model is replaced.

All models of a budget have the same width, depth, attention, text and tokens, and cost the same FLOPs a token in a
forward pass (within 2 %): those of the dense model. What the replaced layer costs more or less than a dense one, such
as the sub-keys of a larger pool, the dense layers around it pay for with their width, which is solved for. FLOPs are
counted by `flops.py` while a model of the same shapes runs; training costs about three times as much in all of them.

kinds      dense, coarse mixture of experts, product-key memory and PEER of 256^2
experts    PEER of 128^2, 256^2, 512^2 and 1024^2 experts
active     PEER of 256^2, by heads x experts of a head
norm       PEER of 256^2, by normalisation of the queries

`kinds` and `experts` run at both budgets, the others at the smaller one. Every kind trains at the best of four learning
rates, found on other text with a quarter of the tokens; or at the one of `--rates`. A cell is the mean over seeds and
half of its 95 % interval (Student's t); used and KL are of the test text: the share of experts that it retrieves, and
the KL divergence of their accumulated gates from uniform, in nats. Results are kept as they come: a run that was
stopped goes on. Both budgets may run at once, each in a process of its own, into the same folder.

python -m benchmarks.quality.peer quality --data DIR --out peer/ --tokens 1M
python -m benchmarks.quality.peer quality --data DIR --out peer/ --tokens 1M --tables kinds --budgets small --seeds 0
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import growlm
from benchmarks.lib.common import best_rate, kept, machine, print_table, same_settings, slug
from benchmarks.lib.flops import config_flops
from growlm import data as text_data
from growlm.base import Base
from growlm.base.checkpoint import load_model
from growlm.model import GrowlmConfig
from growlm.modules import ModuleSet
from growlm.modules.scoring import num_labels, passage_losses
from growlm.training.config import PretrainConfig
from growlm.units import parse_count
from growlm.usage.pools import count_pools

LENGTH, VOCABULARY = 256, 4096
NEAR = 0.02  # how far a model may be from its budget
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
# A dense model of these sizes and four times its width in the feed-forward is the budget.
BUDGETS: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2},
    "large": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4},
}
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY, "attention": "softmax", "norm": "rmsnorm", "key_value_bias": False,
    "sequence_length": LENGTH, "num_experts": 16, "num_experts_per_tok": 2, "router": "linear",
    "router_gates": "renormalised", "peer_num_heads": 8, "peer_top_k": 16, "peer_num_experts": 256**2,
    "tie_word_embeddings": True,
}  # fmt: skip
# What stands in the middle, and its settings.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "mixture of 16 experts, 2 active": ("experts", {"auxiliary_loss": "st_moe"}),
    "product-key memory, 256^2": ("memory", {}),
    "PEER, 256^2": ("peer", {}),
}
TABLES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "kinds": KINDS,
    "experts": {f"PEER, {n}^2": ("peer", {"peer_num_experts": n**2}) for n in (128, 256, 512, 1024)},
    "active": {
        f"{h} heads x {k} = {h * k}": ("peer", {"peer_num_heads": h, "peer_top_k": k})
        for h, k in ((8, 4), (4, 16), (8, 8), (8, 16), (8, 32), (16, 16))
    },
    "norm": {norm: ("peer", {"peer_query_norm": norm}) for norm in ("batch", "layer", "none")},
}
BOTH = ("kinds", "experts")


def shape(budget: str, kind: str, changes: Mapping[str, Any], width: int) -> GrowlmConfig:
    sizes = BUDGETS[budget]
    layers = ["dense"] * sizes["num_hidden_layers"]
    layers[len(layers) // 2] = kind
    key_size = sizes["hidden_size"] // 4
    settings = {"auxiliary_loss": "none", "peer_key_size": key_size, **SHARED, **sizes, **changes}
    return GrowlmConfig(**settings, feed_forward=layers, intermediate_size=width)


@cache
def budget_flops(budget: str) -> float:
    return config_flops(shape(budget, "dense", {}, 4 * BUDGETS[budget]["hidden_size"]), LENGTH)


def at_budget(budget: str, kind: str, changes: Mapping[str, Any]) -> tuple[GrowlmConfig, float]:
    """The model of that budget, and its FLOPs a token: they grow linearly with the dense layers' width.

    Raises:
        SystemExit: nothing is left for the dense layers.
    """
    wanted = budget_flops(budget)
    one, two = (config_flops(shape(budget, kind, changes, width), LENGTH) for width in (8, 16))
    width = 8 + 8 * round((wanted - one) / (two - one))
    if width < 8:
        raise SystemExit(f"{kind} {changes}: costs more than the budget of {wanted / 1e6:.2f} MFLOP a token by itself")
    config = shape(budget, kind, changes, width)
    found = config_flops(config, LENGTH)
    assert abs(found / wanted - 1) <= NEAR, (kind, changes, found, wanted)
    return config, found


class Quality:
    """Runs that are kept, and their tables."""

    def __init__(
        self, out: Path, data: Path, tokens: int, test_tokens: int, seeds: list[int], rates: list[float]
    ) -> None:
        self.out, self.data, self.tokens, self.test_tokens, self.seeds = out, data, tokens, test_tokens, seeds
        self.rates = sorted(rates)

    def table(self, name: str, budget: str) -> list[tuple[str, dict[str, list[float]]]]:
        rows = []
        for label, (kind, changes) in TABLES[name].items():
            found = [self.run(budget, kind, changes, seed) for seed in self.seeds]
            columns = [c for c in found[0] if c != "seconds"]
            rows.append((label, {c: [f[c] for f in found] for c in columns}))
        return rows

    def run(self, budget: str, kind: str, changes: Mapping[str, Any], seed: int) -> dict[str, float]:
        config, flops = at_budget(budget, kind, changes)
        name = slug(budget, kind, *(f"{k.removeprefix('peer_')}-{v}" for k, v in self._told(changes).items()), seed)
        return kept(self.out, name, lambda: {
            **self.trained(budget, config, self.rate(budget, kind), seed, "test", self.tokens), "MFLOP": flops / 1e6,
            "dense width": config.intermediate_size,
        })  # fmt: skip

    @staticmethod
    def _told(changes: Mapping[str, Any]) -> dict[str, Any]:
        """Without what is so anyway, so that tables share a run."""
        return {k: v for k, v in changes.items() if {"peer_query_norm": "batch", **SHARED}.get(k) != v}

    def rate(self, budget: str, kind: str) -> float:
        if len(self.rates) == 1:
            return self.rates[0]
        changes = next(c for k, c in KINDS.values() if k == kind)
        config, _ = at_budget(budget, kind, changes)

        def loss(rate: float) -> float:
            name = slug("rate", budget, kind, rate)
            tokens = max(self.tokens // 4, LENGTH)
            return kept(self.out, name, lambda: self.trained(budget, config, rate, 0, "valid", tokens))["perplexity"]

        return best_rate(self.rates, loss)

    def trained(
        self, budget: str, config: GrowlmConfig, rate: float, seed: int, split: str, tokens: int
    ) -> dict[str, float]:
        """A model is trained, measured and forgotten: those with a million experts take gigabytes."""
        work = self.out / f"work-{budget}"
        shutil.rmtree(work, ignore_errors=True)
        config.save_pretrained(work / "config")
        settings = PretrainConfig(
            config=str(work / "config"), tokens=tokens, sequence_length=LENGTH, batch_size=8, learning_rate=rate,
            separator="\n\n", seed=seed, checkpoint_seconds=1e9,
        )  # fmt: skip
        started = time.monotonic()
        growlm.pretrain(work / "model", [self.data / "train.txt"], settings)
        seconds = time.monotonic() - started
        model = load_model(work / "model", "float32")
        modules = ModuleSet(Base(model))
        corpus = text_data.read([self.data / f"{split}.txt"], separator="\n\n")
        tokenizer = AutoTokenizer.from_pretrained(work / "model")
        limit = max(self.test_tokens // LENGTH, 1)
        passages = [p.tokens for p in text_data.passages(corpus.documents, tokenizer, LENGTH, limit=limit)]
        loss = float(passage_losses(modules, passages).sum()) / num_labels(passages)
        found = {
            "perplexity": math.exp(loss),
            "M parameters": model.num_parameters() / 1e6,
            "M active": model.num_active_parameters() / 1e6,
        }
        for pool in count_pools(modules, passages):
            found |= {"used": pool.share_used, "KL": pool.unevenness}
        shutil.rmtree(work)
        return {**found, "seconds": seconds}


def quality(a: argparse.Namespace) -> None:
    same_settings(a.out, {"tokens": a.tokens, "test_tokens": a.test_tokens, "rates": sorted(a.rates)})
    runs = Quality(a.out, a.data, a.tokens, a.test_tokens, a.seeds, a.rates)
    print(f"{machine()}; {a.tokens:,} tokens, seeds {a.seeds}; mean ± 95 % interval", flush=True)
    for name in a.tables:
        for budget in a.budgets if name in BOTH else a.budgets[:1]:
            rows = runs.table(name, budget)
            print_table(f"{name}, {budget}: {budget_flops(budget) / 1e6:.2f} MFLOP a token", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["quality"])
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.txt, valid.txt and test.txt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=parse_count, default=1_000_000, help="of training")
    parser.add_argument("--test-tokens", type=parse_count, default=50_000)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--budgets", nargs="+", choices=list(BUDGETS), default=list(BUDGETS))
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates to choose from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    quality(parser.parse_args())


if __name__ == "__main__":
    main()
