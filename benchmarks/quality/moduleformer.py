"""ModuleFormer's claims at CPU size: ablations, expert use by domain, insertion, pruning, length extrapolation.

Every experiment is repeated with several seeds; a cell is the mean with half of the 95 % interval (Student's t) behind
it. Results are kept as they come: a run that was stopped goes on.

ablation    table 4: stick-breaking against softmax with rotary positions; mutual information against none and ST-MoE
domains     figure 2: KL divergence between domains' use of experts, under mutual information and ST-MoE
insert      tables 5 and 6: new experts with four weights of routing regularisation, finetuning, LoRA at two ranks
prune       figures 3 and 4: quality against share kept, both orders, with and without concentration; layer dropping
longer      perplexity at lengths beyond the one trained at

python -m benchmarks.quality.moduleformer ablation domains longer --data DIR --out mf/
python -m benchmarks.quality.moduleformer insert prune --data DIR --out mf/ --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import growlm
from benchmarks.lib.baselines import Baseline
from benchmarks.lib.common import best_rate, kept, machine, print_table, same_settings
from growlm import data as text_data
from growlm.base import Base
from growlm.base.checkpoint import load_model
from growlm.disk.files import write_atomic
from growlm.model import GrowlmForCausalLM
from growlm.modules import ModuleSet
from growlm.modules.scoring import num_labels, passage_losses
from growlm.surgery.pruning import choose_experts, drop_layers, without_experts
from growlm.training.config import FinetuneConfig, LearnConfig, PretrainConfig, TrainConfig
from growlm.training.finetune import finetune
from growlm.units import parse_count
from growlm.usage.usage import Usage, count_usage

GENERAL, LANGUAGES, CODE = "general_novels_en", ("german_novels", "vietnamese_wiki"), "code_mbxp"
DOMAINS = (GENERAL, "german_novels", "vietnamese_wiki", "medical_qa", "law_dc_code", CODE)
LENGTH = 256
SHAPE = {
    "model_type": "growlm", "vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
    "head_dim": 64, "num_attention_experts": 4, "attention_experts_per_tok": 2, "intermediate_size": 128,
    "num_experts": 8, "num_experts_per_tok": 2, "router_size": 32, "tie_word_embeddings": True,
    "sequence_length": LENGTH,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "stick-breaking, mutual information": {},
    "softmax with RoPE, mutual information": {"attention": "softmax"},
    "stick-breaking, no balance loss": {"auxiliary_loss": "none"},
    "stick-breaking, ST-MoE": {"auxiliary_loss": "st_moe"},
}
WHOLE = "stick-breaking, mutual information"
REGULARISATION = (0.0, 1e-3, 1e-2, 1e-1)
LORA = {"LoRA, as many": 1.0, "LoRA, a sixth": 1 / 6}
SHARES = (0.9, 0.75, 0.6)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)


class Bench:
    """Checkpoints by variant and seed, kept results, held-out text."""

    def __init__(
        self, out: Path, data: Path, tokens: int, learn_tokens: int, test_tokens: int, seeds: list[int]
    ) -> None:
        self.out, self.data, self.tokens = out, data, tokens
        self.learn_tokens, self.test_tokens, self.seeds = learn_tokens, test_tokens, seeds
        self._loaded: dict[str, Any] = {}

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        return kept(self.out, name, make)

    def pretrained(self, variant: str, seed: int) -> Path:
        slug = variant.replace(",", "").replace(" ", "-")
        folder = self.out / "models" / f"{slug}-{seed}"
        if not folder.exists():
            config = self.out / "configs" / slug / "config.json"
            write_atomic(config, json.dumps(SHAPE | VARIANTS[variant]).encode())
            settings = PretrainConfig(
                config=str(config), tokens=self.tokens, sequence_length=LENGTH, batch_size=8, learning_rate=3e-3,
                separator="\n\n", seed=seed, vocab_size=SHAPE["vocab_size"],
            )  # fmt: skip
            growlm.pretrain(folder, [self.data / GENERAL / "train.txt"], settings)
        return folder

    def passages(self, folder: Path, name: str, length: int = LENGTH, split: str = "test") -> list[list[int]]:
        tokenizer = self.tokenizer(folder)
        documents = text_data.read([self.data / name / f"{split}.txt"], separator=None if split == "train" else "\n\n")
        found = text_data.passages(documents.documents, tokenizer, length, limit=max(self.test_tokens // length, 2))
        return [p.tokens for p in found]

    def tokenizer(self, folder: Path) -> Any:
        key = str(folder)
        if key not in self._loaded:
            self._loaded[key] = AutoTokenizer.from_pretrained(folder)
        return self._loaded[key]

    def loss(self, modules: ModuleSet, folder: Path, name: str, **options: Any) -> float:
        """Nats a token on a domain's test text."""
        passages = self.passages(folder, name, **options)
        return float(passage_losses(modules, passages).sum()) / num_labels(passages)

    def base(self, folder: Path) -> Base:
        return Base(load_model(folder, "float32"), str(folder))

    def usage(self, base: Base, folder: Path, names: Sequence[str]) -> Usage:
        data = {name: [self.data / name / "test.txt"] for name in names}
        return count_usage(
            ModuleSet(base),
            self.tokenizer(folder),
            data,
            sequence_length=LENGTH,
            tokens=self.test_tokens,
            separator="\n\n",
        )

    # Experiments: each returns rows of (label, {column: one number a seed})

    def ablation(self) -> list[tuple[str, dict[str, list[float]]]]:
        rows = []
        for variant in VARIANTS:
            cells: dict[str, list[float]] = {"perplexity": [], "share of experts used": []}
            for seed in self.seeds:

                def one(variant: str = variant, seed: int = seed) -> dict[str, float]:
                    folder = self.pretrained(variant, seed)
                    base = self.base(folder)
                    usage = self.usage(base, folder, [GENERAL])
                    used = [float((c >= 0.01 * c.sum()).float().mean()) for c in usage.counts[GENERAL]]
                    return {
                        "perplexity": math.exp(self.loss(ModuleSet(base), folder, GENERAL)),
                        "share of experts used": statistics.fmean(used),
                    }

                found = self.kept(f"ablation-{variant}-{seed}".replace(" ", "-").replace(",", ""), one)
                for key in cells:
                    cells[key].append(found[key])
            rows.append((variant, cells))
        return rows

    def domains(self) -> list[tuple[str, dict[str, list[float]]]]:
        rows = []
        for variant in (WHOLE, "stick-breaking, ST-MoE", "stick-breaking, no balance loss"):
            cells: dict[str, list[float]] = {"mean KL of all pairs, nats": [], "English from German": [],
                                             "English from code": []}  # fmt: skip
            for seed in self.seeds:

                def one(variant: str = variant, seed: int = seed) -> dict[str, float]:
                    folder = self.pretrained(variant, seed)
                    usage = self.usage(self.base(folder), folder, DOMAINS)
                    pairs = [usage.divergence(a, b) for a in DOMAINS for b in DOMAINS if a != b]
                    return {
                        "mean KL of all pairs, nats": statistics.fmean(pairs),
                        "English from German": usage.divergence(GENERAL, "german_novels"),
                        "English from code": usage.divergence(GENERAL, CODE),
                    }

                found = self.kept(f"domains-{variant}-{seed}".replace(" ", "-").replace(",", ""), one)
                for key in cells:
                    cells[key].append(found[key])
            rows.append((variant, cells))
        return rows

    def longer(self) -> list[tuple[str, dict[str, list[float]]]]:
        rows = []
        for variant in (WHOLE, "softmax with RoPE, mutual information"):
            cells: dict[str, list[float]] = {f"at {n}": [] for n in (256, 512, 1024, 2048)}
            for seed in self.seeds:

                def one(variant: str = variant, seed: int = seed) -> dict[str, float]:
                    folder = self.pretrained(variant, seed)
                    modules = ModuleSet(self.base(folder))
                    # The same stretch of one long text, cut at different lengths.
                    return {
                        f"at {n}": math.exp(self.loss(modules, folder, GENERAL, length=n, split="train"))
                        for n in (256, 512, 1024, 2048)
                    }

                found = self.kept(f"longer-{variant}-{seed}".replace(" ", "-").replace(",", ""), one)
                for key in cells:
                    cells[key].append(found[key])
            rows.append((variant, cells))
        return rows

    def insert(self) -> list[tuple[str, dict[str, list[float]]]]:
        """What a new language gains and English loses, in nats a token, for every way of learning it."""
        ways = [
            *(f"new experts, regularisation {w:g}" for w in REGULARISATION),
            "new experts, regularisation 0.01, English replayed",
            "full finetuning",
            *LORA,
        ]
        rows = []
        for way in ways:
            cells: dict[str, list[float]] = {
                f"{name.split('_')[0]} {what}": [] for name in LANGUAGES for what in ("gained", "English lost")
            }
            for seed in self.seeds:
                for name in LANGUAGES:
                    slug = f"insert-{name}-{way}-{seed}".replace(" ", "-").replace(",", "")
                    found = self.kept(slug, lambda way=way, name=name, seed=seed: self.learned(way, name, seed))
                    cells[f"{name.split('_')[0]} gained"].append(found["gained"])
                    cells[f"{name.split('_')[0]} English lost"].append(found["lost"])
            rows.append((way, cells))
        return rows

    def learned(self, way: str, name: str, seed: int) -> dict[str, float]:
        folder = self.pretrained(WHOLE, seed)
        base = self.base(folder)
        before = {n: self.loss(ModuleSet(base), folder, n) for n in (name, GENERAL)}
        text = self.data / name / "train.txt"
        size = 0
        if way.startswith("new experts"):
            size, after = self.with_experts(way, folder, name, text, seed)
        else:
            size = self.kept(f"size-{seed}", lambda: self.experts_size(folder))
            lora = None if way == "full finetuning" else round(LORA[way] * size)
            rate = best_rate(RATES, lambda r: self.kept(
                f"rate-{way}-{r}".replace(" ", "-").replace(",", ""),
                lambda: self.trained(folder, LANGUAGES[0], lora, r, 0, "valid", self.learn_tokens // 4)[LANGUAGES[0]],
            ))  # fmt: skip
            after = self.trained(folder, name, lora, rate, seed, "test", self.learn_tokens)
        return {"gained": before[name] - after[name], "lost": after[GENERAL] - before[GENERAL], "parameters": size}

    def experts_size(self, folder: Path) -> int:
        store = growlm.Store.create(self.out / "work-size", folder)
        base = store.load_base()
        from growlm.modules.experts import Experts, ExpertsConfig

        size = Experts.create(base, ExpertsConfig(vocabulary="none")).num_parameters()
        shutil.rmtree(self.out / "work-size")
        return size

    def with_experts(self, way: str, folder: Path, name: str, text: Path, seed: int) -> tuple[int, dict[str, float]]:
        work = self.out / "work"
        shutil.rmtree(work, ignore_errors=True)
        store = growlm.Store.create(work, folder)
        weight = float(way.split("regularisation ")[1].split(",")[0])
        config = LearnConfig(admit_anyway=True,
            kind="experts", vocabulary="none", tokens=self.learn_tokens, sequence_length=LENGTH, batch_size=8,
            learning_rate=3e-3, seed=seed, separator="\n\n", routing_regularisation=weight, router_samples=16,
            replay=str(self.data / GENERAL / "train.txt") if "replayed" in way else None,
        )  # fmt: skip
        growlm.learn(store, "language", [text], config)
        base = store.load_base()
        module = store.load("language", base)
        modules = ModuleSet(base, [module])
        after = {n: self.loss(modules, folder, n) for n in (name, GENERAL)}
        shutil.rmtree(work)
        return module.num_parameters(), after

    def trained(
        self, folder: Path, name: str, lora: int | None, rate: float, seed: int, split: str, tokens: int
    ) -> dict[str, float]:
        model = Baseline(load_model(folder, "float32"), self.tokenizer(folder), lora_parameters=lora, seed=seed)
        work = self.out / "work"
        shutil.rmtree(work, ignore_errors=True)
        documents = text_data.read([self.data / name / "train.txt"], separator="\n\n").documents
        settings = TrainConfig(tokens=tokens, sequence_length=LENGTH, batch_size=8, learning_rate=rate, seed=seed)
        model.learn(documents, settings, work, f"{name} {rate:g}")
        shutil.rmtree(work)
        return {n: model.loss(self.passages(folder, n, split=split)) for n in (name, GENERAL)}

    def prune(self) -> list[tuple[str, dict[str, list[float]]]]:
        """Perplexity on code by the share of parameters kept, over that of the same seed finetuned and not pruned."""
        ways = ["finetuned, then pruned", "finetuned with concentration, then pruned", "pruned, then finetuned",
                "top layers dropped, then finetuned", "layers dropped evenly, then finetuned"]  # fmt: skip

        def perplexity(way: str, share: float, seed: int) -> float:
            slug = f"prune-{way}-{share}-{seed}".replace(" ", "-").replace(",", "")
            return self.kept(slug, lambda: self.pruned(way, share, seed))["perplexity"]

        rows = []
        for way in ways:
            cells: dict[str, list[float]] = {f"{share:.0%} kept": [] for share in (1.0, *SHARES)}
            for seed in self.seeds:
                whole = perplexity(ways[0], 1.0, seed)
                for share in (1.0, *SHARES):
                    cells[f"{share:.0%} kept"].append(perplexity(way, share, seed) / whole)
            rows.append((way, cells))
        return rows

    def pruned(self, way: str, share: float, seed: int) -> dict[str, float]:
        folder = self.pretrained(WHOLE, seed)
        text = [self.data / CODE / "train.txt"]
        if way.startswith("finetuned"):
            weight = 0.1 if "concentration" in way else 0.0
            tuned = self.out / "models" / f"code-{weight}-{seed}"
            if not tuned.exists():
                finetune(folder, tuned, text, self.finetuning(seed, weight))
            model: Any = self.smaller(load_model(tuned, "float32"), folder, share)
        else:
            model = load_model(folder, "float32")
            if way.startswith("pruned"):
                model = self.smaller(model, folder, share)
            elif share < 1:
                model = drop_layers(model, self.layers_for(model, share), "top" if way.startswith("top") else "uniform")
            small, tuned = self.out / "work-small", self.out / "work-tuned"
            for path in (small, tuned):
                shutil.rmtree(path, ignore_errors=True)
            model.save_pretrained(small)
            self.tokenizer(folder).save_pretrained(small)
            finetune(small, tuned, text, self.finetuning(seed, 0.0))
            model = load_model(tuned, "float32")
        base = Base(model)
        return {"perplexity": math.exp(self.loss(ModuleSet(base), folder, CODE)), "parameters": base.num_parameters()}

    def finetuning(self, seed: int, weight: float) -> FinetuneConfig:
        return FinetuneConfig(
            tokens=self.learn_tokens, sequence_length=LENGTH, batch_size=8, learning_rate=1e-3, seed=seed,
            separator="\n\n", load_concentration=weight,
        )  # fmt: skip

    def smaller(self, model: GrowlmForCausalLM, folder: Path, share: float) -> GrowlmForCausalLM:
        if share >= 1:
            return model
        data = {"code": [self.data / CODE / "valid.txt"]}
        usage = count_usage(
            ModuleSet(Base(model)), self.tokenizer(folder), data, sequence_length=LENGTH, tokens=self.test_tokens,
            separator="\n\n",
        )  # fmt: skip
        return without_experts(model, usage.places, choose_experts(model, usage, "code", keep=share, normalise="max"))

    @staticmethod
    def layers_for(model: GrowlmForCausalLM, share: float) -> float:
        """The share of layers with which so many of all parameters stay, as near as whole layers come."""
        whole, depth = model.num_parameters(), model.config.num_hidden_layers
        layer = sum(p.numel() for p in model.model.layers[0].parameters())
        number = min(range(1, depth + 1), key=lambda n: abs((whole - (depth - n) * layer) / whole - share))
        return number / depth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["ablation", "domains", "longer", "insert", "prune"]
    parser.add_argument("experiments", nargs="+", choices=names)
    parser.add_argument("--data", type=Path, required=True, help="a folder a domain")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=parse_count, default=400_000, help="of pretraining")
    parser.add_argument("--learn-tokens", type=parse_count, default=60_000, help="of a new domain")
    parser.add_argument("--test-tokens", type=parse_count, default=12_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    a = parser.parse_args()
    same_settings(a.out, {"tokens": a.tokens, "learn_tokens": a.learn_tokens, "test_tokens": a.test_tokens})
    bench = Bench(a.out, a.data, a.tokens, a.learn_tokens, a.test_tokens, a.seeds)
    size = AutoModelForCausalLM.from_pretrained(bench.pretrained(WHOLE, a.seeds[0])).num_parameters()
    print(f"{machine()}; {size / 1e6:.1f} M parameters, {a.tokens:,} tokens, seeds {a.seeds}; mean ± 95 % interval\n")
    for name in a.experiments:
        print_table(name, getattr(bench, name)())


if __name__ == "__main__":
    main()
