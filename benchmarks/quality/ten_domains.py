"""Ten domains learned one after another: growlm against what a user would do instead.

A base is pretrained on general text; then every domain is learned in turn, by growlm and by each baseline, at the same
number of tokens. Every method's learning rate is chosen on held-out text of the first domain. What is measured: the
forgetting matrix, every domain's perplexity at the end, routing, resident memory, seconds.

DIR holds a folder a domain with train.txt, valid.txt and test.txt (documents between blank lines), or .jsonl of those
names. Results are kept as they come: a run that was stopped goes on where it was.

python -m benchmarks.quality.ten_domains --data DIR --out ten/
python -m benchmarks.quality.ten_domains --data DIR --out mine/ --base checkpoint/ --general news --domains law tax
python -m benchmarks.quality.ten_domains --data DIR --out ten/ --methods blocks-top lora-oracle
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import growlm
from benchmarks.lib.baselines import Baseline
from benchmarks.lib.common import machine, same_settings
from benchmarks.lib.domains import DOMAINS, GENERAL, GROWLM, LENGTH, Bench
from growlm.base.checkpoint import fingerprint
from growlm.training.config import PretrainConfig
from growlm.units import parse_count

METHODS = [*GROWLM, "finetune-sequence", "lora-sequence", "lora-oracle", "lora-vocabulary-oracle",
           "finetune-oracle", "joint", "dense-joint"]  # fmt: skip


def table(results: dict[str, dict[str, Any]], base: dict[str, float], domains: list[str]) -> list[str]:
    """Perplexity of every domain at the end, a column a method."""
    names = list(results)
    lines = ["| domain | base | " + " | ".join(names) + " |", "|---|---:|" + "---:|" * len(names)]
    for domain in domains:
        cells = [f"{math.exp(results[n]['final'][domain]):.1f}" for n in names]
        lines.append(f"| {domain} | {math.exp(base[domain]):.1f} | " + " | ".join(cells) + " |")

    def mean(values: dict[str, float]) -> float:
        return math.exp(sum(values[d] for d in domains) / len(domains))

    lines.append(
        f"| geometric mean | {mean(base):.1f} | " + " | ".join(f"{mean(results[n]['final']):.1f}" for n in names) + " |"
    )
    general = [f"{math.exp(r['general']):.1f}" if "general" in r else "–" for r in results.values()]
    lines.append(f"| general text | {math.exp(base['general']):.1f} | " + " | ".join(general) + " |")
    # Of growlm the answers as routed, module by module in the order of learning; below, of modules asked by name.
    measured = [r.get("matrix") or r.get("evaluation", {}).get("matrix") for r in results.values()]
    lines.append(_row("average forgetting, nats", [m and m["average_forgetting"] for m in measured], "{:.3f}"))
    own = [r["evaluation"]["forgetting"] if "evaluation" in r else None for r in results.values()]
    lines.append(_row("forgetting of base and modules themselves", own, "{:g}"))
    facts = {
        "seconds": ("seconds of optimiser steps", "{:,.0f}"),
        "wall": ("seconds from text to stored result", "{:,.0f}"),
        "size": ("trained parameters a domain", "{:,.0f}"),
        "parameters": ("trained parameters in all", "{:,.0f}"),
        "rate": ("learning rate", "{:g}"),
    }
    for key, (label, form) in facts.items():
        lines.append(_row(label, [r.get(key) for r in results.values()], form))
    return lines


def _row(label: str, values: Sequence[float | None], form: str) -> str:
    return f"| {label} | – | " + " | ".join("–" if v is None else form.format(v) for v in values) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder a domain")
    parser.add_argument("--out", type=Path, required=True, help="results, stores and checkpoints")
    parser.add_argument("--base", type=Path, help="a checkpoint; by default one is pretrained on --general")
    parser.add_argument("--general", default=GENERAL, help="folder of general text")
    parser.add_argument("--domains", nargs="+", default=DOMAINS, help="folders, in the order of learning")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--tokens", type=parse_count, default=300_000, help="of each domain")
    parser.add_argument("--base-tokens", type=parse_count, default=2_000_000)
    parser.add_argument("--test-tokens", type=parse_count, default=12_000, help="of each domain")
    parser.add_argument("--lora-parameters", type=parse_count, help="by default as many as the first growlm method's")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    base = a.base or a.out / "base"
    if not base.exists():
        config = PretrainConfig(
            preset="small", tokens=a.base_tokens, sequence_length=LENGTH, separator="\n\n", seed=a.seed
        )
        growlm.pretrain(base, [a.data / a.general / "train.txt"], config)
    same_settings(
        a.out,
        {
            "base": fingerprint(base),
            "general": a.general,
            "domains": a.domains,
            "tokens": a.tokens,
            "test_tokens": a.test_tokens,
            "seed": a.seed,
        },
    )
    bench = Bench(a.out, a.general, a.domains, a.data, a.tokens, a.test_tokens, base.resolve(), a.seed)
    untouched = Baseline(bench.model, bench.tokenizer)
    before = bench.kept("base", lambda: {n: untouched.loss(p) for n, p in bench.test.items()})
    before["general"] = before[a.general]
    results: dict[str, dict[str, Any]] = {}
    size = a.lora_parameters or 0
    for method in METHODS:
        if method in GROWLM and method in a.methods:
            results[method] = bench.kept(method, lambda m=method: bench.growlm(m))
            size = size or int(results[method]["size"])
        elif method in a.methods:
            if not size and "lora" in method:
                raise SystemExit("give --lora-parameters, or a growlm method whose size LoRA can take")
            make = bench.joint if "joint" in method else partial(bench.baseline, lora_parameters=size)
            results[method] = bench.kept(method, lambda m=method, make=make: make(m))
    print(f"{machine()}; {a.tokens:,} tokens a domain, seed {a.seed}\n")
    print("\n".join(table(results, before, a.domains)))
    for method in results:
        if routing := results[method].get("evaluation", {}).get("routing"):
            resident = results[method]["resident"]
            print(
                f"\n{method}: router accuracy {routing['accuracy']:.1%}, retained gain {routing['retained_gain']:.1%}, "
                f"none {routing['none']}, resident {resident[0] / 1e6:.2f} to {resident[-1] / 1e6:.2f} MB"
            )


if __name__ == "__main__":
    main()
