"""Which module for a published base: every kind and shape on the same rows of text, at its best rate.

Every way (a kind or a shape of `benchmarks.lib.shapes`, and its settings) trains on the first so many tokens of a
domain, once, at each of its rates, and while the best is the first or the last, at half or twice that as well; the rate
is chosen on the domain's `valid.txt`, and the loss on its `test.txt` is told, in nats a token. What `lora` trains is
what PEFT trains. A cell is a file in OUT, so that a run that was stopped goes on; ways and tokens can be added.

Sizes of shapes are those at which they have the 4.9 million parameters of LoRA of rank 16 on SmolLM2-135M.

python -m benchmarks.quality.kinds --data DIR --base CHECKPOINT --out kinds/ --domains medical_qa german_novels \
    --tokens 10k
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.lib.common import machine, slug
from benchmarks.lib.published import BATCH, LENGTH, OnPublished
from benchmarks.lib.shapes import Delta, GradientLora, Narrow, Shaped, SharedPeer, joined, shaped
from growlm import data as text_data
from growlm.base.placement import Placement
from growlm.disk.files import write_atomic
from growlm.errors import TrainingError
from growlm.modules import ModuleSet, kind_of
from growlm.modules.lora import Lora
from growlm.modules.peer import Peer
from growlm.modules.scoring import num_labels, passage_losses
from growlm.progress import reporting
from growlm.training.config import LearnConfig
from growlm.training.module_training import ModuleTraining, as_served
from growlm.units import format_count, parse_count

_WIDER = 3  # rates beyond those of a way, at most
_HALF = {"num_layers": 7, "num_heads": 2, "num_key_value_heads": 1, "intermediate_size": 73}  # the bytes of rank 8
_POOL = {"num_heads": 4, "top_k": 8, "key_size": 64}
_THREE = {**_POOL, "layers": "8,15,22"}


def _narrow(num_layers: int, num_heads: int, intermediate_size: int, **settings: Any) -> dict[str, Any]:
    sizes = {"num_layers": num_layers, "num_heads": num_heads, "num_key_value_heads": 1}
    return {"module": shaped(Narrow, **sizes, intermediate_size=intermediate_size, **settings)}


# An alpha of k times rank 16's is a rate of k times for `lora_B`, which begins at zero, under Adam (LoRA+); so is
# rank-stabilised scaling of rank 16, at k = 4.
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
    "narrow, 7 of 3 heads": (_narrow(7, 3, 232), (2e-3, 4e-3)),
    "narrow, 10 of 3 heads": (_narrow(10, 3, 111), (2e-3, 4e-3)),
    "narrow, 15 of 2 heads": (_narrow(15, 2, 60), (2e-3, 4e-3)),
    "narrow, 10 without attention": (_narrow(10, 0, 282), (2e-3, 4e-3)),
    "narrow, 30 without attention": (_narrow(30, 0, 94), (2e-3, 4e-3)),
    "narrow, 7 from a third on": (_narrow(7, 3, 232, placement="interleaved"), (2e-3, 4e-3)),
    "narrow, 7 by gradient": (_narrow(7, 3, 232, placement="gradient"), (2e-3, 4e-3)),
    "narrow, 7 by singular values": (_narrow(7, 3, 232, init="svd"), (2e-3, 4e-3)),
    "narrow, 7 at random": (_narrow(7, 3, 232, init="random"), (2e-3, 4e-3)),
    "blocks, all depths": ({"module": shaped(Narrow, num_layers=4)}, (1e-3, 2e-3)),
    "blocks, by gradient": ({"module": shaped(Narrow, num_layers=4, placement="gradient")}, (1e-3, 2e-3)),
    "lora r16, B at 4 times the rate": ({"kind": "lora", "lora_alpha": 128}, (1e-3, 2e-3)),
    "lora r16, B at 16 times the rate": ({"kind": "lora", "lora_alpha": 512}, (5e-4, 1e-3)),
    "lora r16, A by gradient": ({"module": shaped(GradientLora)}, (2e-3, 4e-3)),
    "lora r16, batch 1": ({"kind": "lora", "batch_size": 1}, (1e-3, 2e-3)),
    "lora r8 + narrow": ({"module": joined(shaped(Lora, r=8), shaped(Narrow, **_HALF))}, (2e-3, 4e-3)),
    "lora r16 below, narrow above": (
        {"module": joined(shaped(Lora, layers="0-14"), shaped(Narrow, **_HALF, after=(15, 18, 20, 22, 25, 27, 30)))},
        (2e-3, 4e-3),
    ),
    "lora r8 + peer": ({"module": joined(shaped(Lora, r=8), shaped(Peer, **_THREE, num_experts=576))}, (4e-3, 8e-3)),
    "delta": ({"module": shaped(Delta, num_values=4_884_480)}, (2e-4, 5e-4)),
    "delta, half": ({"module": shaped(Delta, num_values=2_442_240)}, (2e-4, 5e-4)),  # places take bytes too
    "delta, evenly": ({"module": shaped(Delta, num_values=4_884_480, choice="evenly")}, (2e-4, 5e-4)),
    "delta, whole matrices": ({"module": shaped(Delta, num_values=4_884_480, choice="matrices")}, (2e-4, 5e-4)),
    "peer, small, layers 8, 15, 22": ({"module": shaped(Peer, num_experts=1280, **_THREE)}, (1e-2, 3e-2)),
    "peer, small, all layers": (
        {"module": shaped(Peer, num_experts=108, layers="0-29", num_heads=2, top_k=8, key_size=32)}, (5e-3, 1e-2),
    ),
    "peer, all layers, shared keys": (
        {"module": shaped(SharedPeer, num_experts=136, layers="0-29", query_norm="layer", **_POOL)}, (5e-3, 1e-2),
    ),
}  # fmt: skip


class Kinds(OnPublished):
    """Cells of one base, computed or read."""

    def cell(self, domain: str, way: str, rate: float, seed: int, tokens: int) -> dict[str, Any]:
        path = self.a.out / "cells" / f"{slug(domain, way, rate, seed, tokens)}.json"
        if not path.exists():
            print(f"{domain}, {way}, {rate:g}, seed {seed}, {tokens:,} tokens ...", flush=True)
            found = self.trained(domain, way, rate, seed, tokens)
            write_atomic(path, json.dumps({"domain": domain, "way": way, "rate": rate, "seed": seed, **found}).encode())
        found = json.loads(path.read_text())
        return found if found["valid"] is not None else {**found, "valid": math.inf, "test": math.inf}

    def trained(self, domain: str, way: str, rate: float, seed: int, tokens: int) -> dict[str, Any]:
        settings = {"batch_size": BATCH, **WAYS[way][0]}
        shape: Shaped | None = settings.pop("module", None)
        config = LearnConfig(
            **({"kind": "lora"} if shape else {}),  # whose rows of its own are none
            **settings,
            tokens=tokens,
            sequence_length=LENGTH,
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
            made: Any = kind_of(config.kind) if shape is None else shape.on(packed[:])
            training = ModuleTraining(self.base, made, config, packed, work)
            try:
                seconds = training.run()
            except TrainingError:
                shutil.rmtree(work, ignore_errors=True)
                return {"tokens": tokens, "valid": None, "test": None}
            # A shape cannot be saved and read again.
            module = as_served(self.base, training.module, way) if shape is None else training.module.eval()
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
        """The cell of the best of these rates and of those beyond them, as long as the best is the last of them."""
        found = {rate: self.cell(domain, way, rate, seed, tokens) for rate in sorted(rates)}
        for _ in range(_WIDER if len(rates) > 1 else 0):
            best = min(found, key=lambda rate: found[rate]["valid"])
            if best not in (min(found), max(found)):
                break
            next_one = float(f"{best * 2 if best == max(found) else best / 2:g}")
            found[next_one] = self.cell(domain, way, next_one, seed, tokens)
        return min(found.values(), key=lambda cell: cell["valid"])


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
