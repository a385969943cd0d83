"""LoRA alone and with a memory of the domain's text: the same adapter, trained once, measured both ways.

Of every domain a LoRA adapter trains on rows drawn from its first `--text` tokens, at the rate that trials find or at
`--rates`, and is kept. Base and adapter are then measured on the test text alone and with a memory, once of the rows
that were trained on and once of the whole text; gates are fitted on the valid text. Losses are in nats a token. Cells
are files in OUT, so that a run that was stopped goes on.

python -m benchmarks.quality.recall --data DIR --base CHECKPOINT --out recall/
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lib.common import machine, slug
from benchmarks.lib.domains import DOMAINS
from benchmarks.lib.published import BATCH, LENGTH, OnPublished
from growlm import data as text_data
from growlm.disk.files import write_atomic
from growlm.disk.tensors import read_tensors, write_tensors
from growlm.layers.recall import FEATURES, LEVELS
from growlm.modules import KnowledgeModule, ModuleSet, kind_of
from growlm.modules.scoring import label_losses
from growlm.modules.shapes import RecallConfig
from growlm.progress import reporting
from growlm.recall.text import RecalledText
from growlm.training.config import AUTO, FITTED, LearnConfig
from growlm.training.module_training import ModuleTraining, as_served
from growlm.training.recalling import remember, token_documents
from growlm.units import parse_count


class Adapters(OnPublished):
    """One base and the adapters that were trained on it."""

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
        drawn, rows = self.rows(domain, seed)
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

    def row(self, domain: str, seed: int, rate: float | str) -> dict[str, Any]:
        """Losses on the test text by what was measured, with what it took."""
        folder = self.adapter(domain, seed, rate)
        path = self.a.out / "cells" / f"{slug(domain, seed, rate)}.json"
        if not path.exists():
            write_atomic(path, json.dumps(self._measured(domain, folder), indent=1).encode())
        return json.loads(path.read_text())

    @torch.no_grad()
    def _measured(self, domain: str, folder: Path) -> dict[str, Any]:
        trained = json.loads((folder / "training.json").read_text())
        packed = text_data.pack(self.documents(domain, "train"), self.tokenizer, LENGTH, max_tokens=self.a.text)
        rows = [(f"row {row}", packed.tokens[row][1:]) for row in trained["rows"]]
        texts, seconds = {}, {}
        for name, documents in (("rows", rows), ("whole", self._whole(domain))):
            start = time.monotonic()
            texts[name] = RecalledText.of(documents, self.base.vocab_size)
            seconds[name] = time.monotonic() - start
        valid = self.passages(domain, "valid", 2 * FITTED)
        test = self.passages(domain, "test", self.a.test_tokens)
        found: dict[str, Any] = {"tokens": {name: text.num_tokens for name, text in texts.items()}, "sorting": seconds}
        found["rate"], found["parameters"] = trained["learning_rate"], trained["parameters"]
        for kind in ("recall", "lora+recall"):
            alone = ModuleSet(self.base, [m] if (m := self._module(kind, folder, "none")) else [])
            sets = {"base" if kind == "recall" else "lora": alone}
            for name, text in texts.items():
                module = self._module(kind, folder, name)
                assert module is not None
                found[f"fit {kind}, {name}"] = remember(module, text, self.base, valid).to_json()
                sets[f"{kind}, {name}"] = ModuleSet(self.base, [module])
            found |= {name: loss.tolist() for name, loss in self._losses(sets, test).items()}
        found["labels"] = [len(p.tokens) - 1 for p in test]
        return found

    def _whole(self, domain: str) -> list[tuple[str, np.ndarray]]:
        chosen, total = [], 0
        for source, ids in token_documents(self.documents(domain, "train"), self.tokenizer):
            chosen.append((source, ids[: self.a.text - total]))
            total += len(chosen[-1][1])
            if total >= self.a.text:
                break
        return chosen

    def _module(self, kind: str, folder: Path, text: str) -> KnowledgeModule | None:
        if kind == "recall":
            return None if text == "none" else kind_of(kind).create(self.base, RecallConfig())
        trained = json.loads((folder / "training.json").read_text())
        config = kind_of(kind).Config(**{**trained["config"], "recall": text != "none"})
        tensors = read_tensors(folder / "module.safetensors")
        if text != "none":
            tensors["memory.gates"] = torch.zeros(len(LEVELS), FEATURES)
        return kind_of(kind).restore(self.base, config, tensors, str(folder))

    def _losses(self, sets: dict[str, ModuleSet], passages: list[text_data.Passage]) -> dict[str, torch.Tensor]:
        """Of each passage the summed loss, under module sets that differ in their memory alone: the layers run once."""
        found: dict[str, list[torch.Tensor]] = {name: [] for name in sets}
        layers = next(iter(sets.values()))
        for passage in passages:
            ids = torch.tensor([passage.tokens])
            hidden, labels = layers.hidden(ids[:, :-1])[0], ids[0, 1:]
            for name, modules in sets.items():
                contexts = modules.contexts(ids[:, :-1], len(labels))
                losses = label_losses(modules, hidden, labels, None if contexts is None else contexts[0])
                found[name].append(losses.double().sum())
        return {name: torch.stack(losses) for name, losses in found.items()}


def table(rows: dict[tuple[str, int, float | str], dict[str, Any]]) -> list[str]:
    lines = [
        "| domain, seed | base | recall, same text | recall, whole | lora (rate) | lora+recall, same text | whole |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (domain, seed, _), row in rows.items():
        labels = sum(row["labels"])

        def loss(name: str, row: dict[str, Any] = row, labels: int = labels) -> float:
            return sum(row[name]) / labels

        def gain(name: str, alone: str, loss: Callable[[str], float] = loss) -> str:
            return f"{loss(name):.3f} ({loss(name) - loss(alone):+.3f})"

        lines.append(
            f"| {domain}, {seed} | {loss('base'):.3f} | {gain('recall, rows', 'base')} | "
            f"{gain('recall, whole', 'base')} | {loss('lora'):.3f} ({row['rate']:.1e}) | "
            f"{gain('lora+recall, rows', 'lora')} | {gain('lora+recall, whole', 'lora')} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder a domain, with train, valid and test.txt")
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint, as growlm convert makes one")
    parser.add_argument("--out", type=Path, required=True, help="where results are kept")
    parser.add_argument("--domains", nargs="+", default=DOMAINS)
    parser.add_argument("--tokens", type=parse_count, default=40_000, help="that an adapter is trained on")
    parser.add_argument("--text", type=parse_count, default=400_000, help="that the whole text has, at most")
    parser.add_argument("--valid-tokens", type=parse_count, default=4_000)
    parser.add_argument("--test-tokens", type=parse_count, default=8_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rates", nargs="+", default=[AUTO], help="of the adapter; auto finds it by trials")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    adapters = Adapters(a)
    print(machine())
    rows = {}
    for seed in a.seeds:
        for domain in a.domains:
            for given in a.rates:
                rate = given if given == AUTO else float(given)
                rows[domain, seed, rate] = adapters.row(domain, seed, rate)
                print("\n".join(table(rows)[-1:] if len(rows) > 1 else table(rows)), flush=True)


if __name__ == "__main__":
    main()
