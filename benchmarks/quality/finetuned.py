"""All of a published base trained on a domain, beside the adapter and its memory: what it learns and what it forgets.

Of every domain a copy of the base trains on the rows that its adapter was trained on (`benchmarks.quality.recall`),
once, at each rate; the rate is chosen on the domain's valid text. Told are the loss on the test text, where the
adapter's and that of the adapter with its memory stand beside it as ratios of perplexity, and the loss on text of
another kind, which the base itself still has wherever growlm is asked about it. With `--joint` one copy trains on the
rows of all these domains, mixed: what needs all data in one place, and all of it again for the next domain;
`--joint-tokens` takes so many of each. A cell is a file in OUT, so that a run that was stopped goes on.

python -m benchmarks.quality.finetuned --data DIR --base CHECKPOINT --adapters recall/ --out finetuned/
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.baselines import Baseline
from benchmarks.lib.common import kept, machine, slug
from benchmarks.lib.domains import DOMAINS, GENERAL
from benchmarks.lib.published import BATCH, LENGTH
from benchmarks.quality.recall import Adapters
from growlm import data as text_data
from growlm.base.checkpoint import save_model
from growlm.training.config import AUTO, TrainConfig
from growlm.units import parse_count

BESIDE = ("lora", "lora+recall, rows", "lora+recall, whole")


class Finetuned:
    """Cells of one base, computed or read."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        self.adapters = Adapters(a)

    def untouched(self) -> float:
        """Loss of the base on the text of another kind."""

        def loss() -> float:
            return Baseline(self.adapters.base.model, self.adapters.tokenizer).loss(self.general())

        return kept(self.a.out, slug("base", self.a.general), loss)

    def cell(self, domain: str, rate: float) -> dict[str, Any]:
        found = kept(self.a.out, slug(domain, self.a.seed, rate), lambda: self._trained(domain, rate))
        shutil.rmtree(self._work(domain, rate), ignore_errors=True)
        return found

    def beside(self, domain: str) -> dict[str, Any]:
        """What the adapter of the same rows was measured at."""
        path = self.a.adapters / "cells" / f"{slug(domain, self.a.seed, self.a.adapter_rate)}.json"
        if not path.exists():
            raise SystemExit(f"{path}: is not there; measure the adapter with benchmarks.quality.recall first")
        return json.loads(path.read_text())

    def joint(self, domains: Sequence[str], rate: float) -> dict[str, Any]:
        """One model of all the domains' rows: its losses by domain."""

        def trained() -> dict[str, Any]:
            each = None if self.a.joint_tokens is None else self.a.joint_tokens // LENGTH
            rows = text_data.PackedTokens(np.concatenate([self.rows(domain)[:each] for domain in domains]))
            model, seconds = self._learned("joint", rows, rate)
            losses = {d: {split: self.loss(model, d, split) for split in ("valid", "test")} for d in domains}
            general = model.loss(self.general())
            return {"rate": rate, "rows": len(rows), "domains": losses, "general": general, "seconds": seconds}

        found = kept(self.a.out, slug("joint", self.a.seed, rate), trained)
        shutil.rmtree(self._work("joint", rate), ignore_errors=True)
        return found

    def _trained(self, domain: str, rate: float) -> dict[str, Any]:
        model, seconds = self._learned(domain, text_data.PackedTokens(self.rows(domain)), rate)
        found = {split: self.loss(model, domain, split) for split in ("valid", "test")}
        return {"rate": rate, **found, "general": model.loss(self.general()), "seconds": seconds}

    def settings(self, rows: text_data.PackedTokens, rate: float) -> TrainConfig:
        """Every row once."""
        return TrainConfig(
            tokens=len(rows.tokens) * LENGTH,
            sequence_length=LENGTH,
            batch_size=BATCH,
            learning_rate=rate,
            seed=self.a.seed,
            precision="float32",
            device="cpu",
            checkpoint_seconds=300,  # of 1.6 gigabytes
        )

    def _learned(self, name: str, rows: text_data.PackedTokens, rate: float) -> tuple[Baseline, float]:
        model = Baseline(self.adapters.base.model, self.adapters.tokenizer)
        seconds = model.learn(rows, self.settings(rows, rate), self._work(name, rate), f"{name}, {rate:g}")
        if self.a.keep:
            save_model(model.model, self.a.out / "models" / slug(name, self.a.seed, rate))
        return model, seconds

    def _work(self, name: str, rate: float) -> Path:
        return self.a.out / "runs" / slug(name, self.a.seed, rate)

    def rows(self, domain: str) -> np.ndarray:
        """The rows (n, LENGTH + 1) that the domain's adapter is trained on."""
        return self.adapters.rows(domain, self.a.seed)[1].tokens

    def loss(self, model: Baseline, domain: str, split: str) -> float:
        tokens = getattr(self.a, f"{split}_tokens")
        return model.loss([p.tokens for p in self.adapters.passages(domain, split, tokens)])

    def general(self) -> list[Any]:
        return [p.tokens for p in self.adapters.passages(self.a.general, "test", self.a.general_tokens)]


def table(rows: dict[str, tuple[dict[str, Any], dict[str, Any]]], general: float) -> list[str]:
    """Of each domain the best cell and what stands beside it; ratios are of perplexity, over the finetuned model's."""
    ratios: dict[str, list[float]] = {name: [] for name in BESIDE}
    lines = [
        "| domain | base | finetuned (rate) | " + " | ".join(f"{name}, over finetuned" for name in BESIDE)
        + f" | finetuned, other text (base {general:.3f}) | s |",
        "|---|---:|---:|" + "---:|" * (len(BESIDE) + 2),
    ]  # fmt: skip
    for domain, (best, beside) in rows.items():
        labels = sum(beside["labels"])
        parts = []
        for name in BESIDE:
            ratios[name].append(math.exp(sum(beside[name]) / labels - best["test"]))
            parts.append(f"{sum(beside[name]) / labels:.3f}, {ratios[name][-1]:.3f}")
        lines.append(
            f"| {domain} | {sum(beside['base']) / labels:.3f} | {best['test']:.3f} ({best['rate']:g}) | "
            + " | ".join(parts)
            + f" | {best['general']:.3f} ({best['general'] - general:+.3f}) | {best['seconds']:.0f} |"
        )
    means = [f"{math.exp(sum(map(math.log, values)) / len(values)):.3f}" for values in ratios.values()]
    return [*lines, "| geometric mean | | | " + " | ".join(means) + " | | |"]


def joint_table(cell: dict[str, Any], rows: dict[str, dict[str, Any]], general: float) -> list[str]:
    """The joint model's losses, and the adapter's perplexity with its memory over them."""
    lines = [
        f"joint training on {cell['rows']} rows, rate {cell['rate']:g}: {cell['seconds']:.0f} s, "
        f"other text {cell['general']:.3f} ({cell['general'] - general:+.3f})",
        "| domain | joint | " + " | ".join(f"{name}, over joint" for name in BESIDE) + " |",
        "|---|---:|" + "---:|" * len(BESIDE),
    ]
    for domain, beside in rows.items():
        test = cell["domains"][domain]["test"]
        labels = sum(beside["labels"])
        ratios = [f"{math.exp(sum(beside[name]) / labels - test):.3f}" for name in BESIDE]
        lines.append(f"| {domain} | {test:.3f} | {' | '.join(ratios)} |")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `Finetuned` reads: the text, the base, and how many rows of it."""
    parser.add_argument("--data", type=Path, required=True, help="a folder a domain, with train, valid and test.txt")
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint, as growlm convert makes one")
    parser.add_argument("--out", type=Path, required=True, help="where results are kept")
    parser.add_argument("--domains", nargs="+", default=DOMAINS, help="in the order of learning")
    parser.add_argument("--keep", action="store_true", help="the models too, for other benchmarks")
    parser.add_argument("--general", default=GENERAL, help="folder of text of another kind")
    parser.add_argument("--general-tokens", type=parse_count, default=5_000)
    parser.add_argument("--text", type=parse_count, default=400_000, help="that rows are drawn from, as the adapters'")
    parser.add_argument("--tokens", type=parse_count, default=40_000, help="of the rows, as the adapters'")
    parser.add_argument("--seed", type=int, default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument(
        "--adapters", type=Path, required=True, help="what benchmarks.quality.recall left, to stand beside"
    )
    parser.add_argument("--adapter-rate", default=AUTO, help="of the adapters, as they were trained")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 2e-4, 4e-4])
    parser.add_argument("--joint", action="store_true", help="one model of all these domains instead")
    parser.add_argument("--joint-tokens", type=parse_count, help="of each domain, at most; by default all its rows")
    parser.add_argument("--valid-tokens", type=parse_count, default=4_000)
    parser.add_argument("--test-tokens", type=parse_count, default=8_000)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    bench = Finetuned(a)
    print(machine())
    general, rows = bench.untouched(), {}
    if a.joint:
        cells = [bench.joint(a.domains, rate) for rate in a.rates]
        best = min(cells, key=lambda cell: sum(losses["valid"] for losses in cell["domains"].values()))
        print("\n".join(joint_table(best, {domain: bench.beside(domain) for domain in a.domains}, general)))
        return
    for domain in a.domains:
        beside = bench.beside(domain)
        best = min((bench.cell(domain, rate) for rate in a.rates), key=lambda cell: cell["valid"])
        rows[domain] = (best, beside)
    print("\n".join(table(rows, general)))


if __name__ == "__main__":
    main()
