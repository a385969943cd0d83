"""Many domains learned one after another on one base: text, settings, and every method that learns it.

Scripts choose the methods and print what they gave.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import growlm
from benchmarks.lib.baselines import Baseline
from benchmarks.lib.common import best_rate
from growlm import data as text_data
from growlm.disk.files import write_atomic
from growlm.disk.tensors import read_tensors, write_tensors
from growlm.errors import TrainingError
from growlm.evaluation import EvalConfig, evaluate
from growlm.evaluation.continual import ForgettingMatrix
from growlm.modules import ModuleSet
from growlm.modules.scoring import num_labels, passage_losses
from growlm.training.config import LearnConfig, TrainConfig
from growlm.training.pretrain import new_model

GENERAL = "general_novels_en"
DOMAINS = [
    "german_novels", "vietnamese_wiki", "medical_qa", "law_dc_code", "finance_fed_speeches",
    "code_mbxp", "math_gsm8k", "shakespeare", "bible_en_kjv",
]  # fmt: skip
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # tried from the middle on, until the best is not at an end
LENGTH, ROUTE = 256, 200  # tokens: of a row, and of what the router sees
GROWLM: dict[str, dict[str, Any]] = {
    "blocks-top": {},
    "blocks-interleaved": {"placement": "interleaved", "vocabulary": "head"},
    "blocks-interleaved-both": {"placement": "interleaved", "vocabulary": "both"},
}


@dataclass
class Bench:
    """One experiment: its text, its base, and where results are kept."""

    out: Path
    general: str
    domains: list[str]
    data: Path
    tokens: int
    test_tokens: int
    base: Path
    seed: int

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        read = [self.general, *self.domains]
        for split in ("train", "test"):
            texts = {name: tuple(d.text for d in self.documents(name, split)) for name in read}
            for name, other in itertools.combinations(read, 2):
                if texts[name] == texts[other]:
                    raise SystemExit(f"{self.data}: {name} and {other} have the same {split} text; give each its own")
        self.test = {name: self._passages(name, "test") for name in [self.general, *self.domains]}

    def documents(self, name: str, split: str) -> list[text_data.Document]:
        for suffix in ("txt", "jsonl"):
            path = self.data / name / f"{split}.{suffix}"
            if path.exists():
                return text_data.read([path], separator="\n\n").documents
        raise SystemExit(f"{self.data / name}: holds no {split}.txt or {split}.jsonl")

    def training_text(self, name: str) -> Path:
        """A domain's training text as one JSONL file, no longer than its tokens need."""
        path = self.out / "text" / f"{name}-train.jsonl"
        if not path.exists():
            self._write(path, self.documents(name, "train"), 8 * self.tokens)
        return path

    def test_text(self, name: str) -> Path:
        """The passages that are measured, a document each."""
        return self.out / "text" / f"{name}-test.jsonl"

    def _passages(self, name: str, split: str) -> list[list[int]]:
        path = self.out / "text" / f"{name}-{split}.jsonl"
        if not path.exists():
            # Every document's first passage, then every document's second: as many documents as there are.
            pieces: list[tuple[int, str]] = []
            for document in self.documents(name, split):
                ids = self.tokenizer(document.text[: 40 * LENGTH], add_special_tokens=False)["input_ids"]
                cut = [ids[at : at + LENGTH] for at in range(0, len(ids), LENGTH)]
                pieces += [(n, self.tokenizer.decode(piece)) for n, piece in enumerate(cut) if len(piece) >= 64]
            pieces.sort(key=lambda piece: piece[0])
            chosen = [text_data.Document(text, name) for _, text in pieces[: -(-self.test_tokens // LENGTH)]]
            self._write(path, chosen, 1 << 40)
        documents = text_data.read([path]).documents
        return [p.tokens for p in text_data.passages(documents, self.tokenizer, LENGTH)]

    def _write(self, path: Path, documents: list[text_data.Document], characters: int) -> None:
        lines, total = [], 0
        for document in documents:
            lines.append(json.dumps({"text": document.text}, ensure_ascii=False))
            total += len(document.text)
            if total > characters:
                break
        write_atomic(path, ("\n".join(lines) + "\n").encode())

    def settings(self, rate: float, tokens: int | None = None) -> TrainConfig:
        return TrainConfig(
            tokens=tokens or self.tokens, sequence_length=LENGTH, batch_size=8, learning_rate=rate, seed=self.seed
        )

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """A result from its file, or made now and written."""
        path = self.out / "results" / f"{name}.json"
        if not path.exists():
            print(f"{name} ...", flush=True)
            result = make()
            write_atomic(path, json.dumps(result, indent=1).encode())
        return json.loads(path.read_text())

    # What is compared

    def rate(self, kind: str, train: Callable[[float], float]) -> float:
        """The rate with the least loss on the first domain's held-out text, after a quarter of the tokens."""
        return best_rate(RATES, lambda r: self.kept(f"rate-{kind}-{r}", lambda: _or_infinite(train, r)))

    def valid(self, name: str) -> list[list[int]]:
        """Held-out passages that nothing is measured on in the end: settings are chosen with them."""
        return self._passages(name, "valid")

    def growlm(self, method: str) -> dict[str, Any]:
        options = GROWLM[method]

        def learn(store: growlm.Store, name: str, rate: float, tokens: int) -> growlm.LearnResult:
            config = LearnConfig(
                admit_anyway=True,
                tokens=tokens,
                sequence_length=LENGTH,
                batch_size=8,
                learning_rate=rate,
                seed=self.seed,
                **options,
            )
            return growlm.learn(store, name, [self.training_text(name)], config)

        def trial(rate: float) -> float:
            folder = self.out / "trials" / f"{method}-{rate}"
            shutil.rmtree(folder, ignore_errors=True)
            store = growlm.Store.create(folder, base=self.base)
            learn(store, self.domains[0], rate, self.tokens // 4)
            with growlm.Engine(store) as engine, engine.modules.using([self.domains[0]]) as held:
                passages = self.valid(self.domains[0])
                losses = passage_losses(ModuleSet(engine.base, list(held.values())), passages)
            shutil.rmtree(folder)
            return float(losses.sum()) / num_labels(passages)

        rate = self.rate(method, trial)
        folder = self.out / "stores" / method
        store = growlm.Store.open(folder) if folder.exists() else growlm.Store.create(folder, base=self.base)
        seconds, walls, resident = [], [], []
        for number, name in enumerate(self.domains):

            def stage(name: str = name, number: int = number) -> dict[str, Any]:
                start, whole = time.perf_counter(), store.find(name) is None
                if whole:
                    learn(store, name, rate, self.tokens)
                took = time.perf_counter() - start if whole else None
                trained = store.module(name).manifest.training["seconds"]
                return {"seconds": trained, "wall": took, "resident": self.resident(store, self.domains[: number + 1])}

            done = self.kept(f"{method}-{number}-{name}", stage)
            seconds.append(done["seconds"])
            walls.append(done.get("wall"))
            resident.append(done["resident"])
        data = {name: [self.test_text(name)] for name in self.domains} | {"none": [self.test_text(self.general)]}
        found = evaluate(store, data, EvalConfig(sequence_length=LENGTH, max_documents=0, route_tokens=ROUTE)).to_json()
        own = {name: math.log(row["module"]) for name, row in found["perplexity"].items()}
        return {
            "rate": rate,
            "parameters": sum(m.parameters for m in store.modules.values()),
            "size": sum(m.parameters for m in store.modules.values()) / len(self.domains),
            "final": {n: math.log(found["perplexity"][n]["routed"]) for n in self.domains},
            "own": own,
            "general": math.log(found["perplexity"]["none"]["routed"]),
            "seconds": sum(seconds),
            "wall": _sum_of_all(walls),
            "resident": resident,
            "evaluation": found,
        }

    def resident(self, store: growlm.Store, names: list[str]) -> int:
        """The most bytes of weights in memory while a prompt of every domain is answered, one module at a time."""
        with growlm.Engine(store, idle=0) as engine:
            prompts = [self.tokenizer.decode(self.test[name][0][:64]) for name in names]
            return max(engine.generate(p, module=n, max_new_tokens=4).resident_bytes
                       for p, n in zip(prompts, names, strict=True))  # fmt: skip

    def baseline(self, method: str, lora_parameters: int) -> dict[str, Any]:
        lora = lora_parameters if method.startswith("lora") else None
        sequence = method.endswith("sequence")

        def fresh() -> Baseline:
            return Baseline(
                self.model, self.tokenizer, lora_parameters=lora, vocabulary="vocabulary" in method, seed=self.seed
            )

        rate = self.baseline_rate(fresh, method.rsplit("-", 1)[0])
        model = fresh()
        rows: list[list[float]] = []
        own: dict[str, float] = {}
        seconds = 0.0
        walls: list[float | None] = []
        general = 0.0

        def weights(number: int) -> Path:
            return self.out / "runs" / method / f"after-{number}.safetensors"

        for number, name in enumerate(self.domains):

            def stage(name: str = name, number: int = number) -> dict[str, Any]:
                nonlocal model
                if not sequence:
                    model = fresh()
                elif number:
                    model.model.load_state_dict(read_tensors(weights(number - 1)), strict=False)
                folder = self.out / "runs" / method / name
                start, whole = time.perf_counter(), not folder.exists()
                documents = text_data.read([self.training_text(name)]).documents
                took = model.learn(documents, self.settings(rate), folder, f"{method}: {name}")
                wall = time.perf_counter() - start if whole else None
                if sequence:
                    write_tensors(weights(number), dict(model.parameters))
                    row = [model.loss(self.test[n]) for n in self.domains]
                else:
                    row = [model.loss(self.test[name])]
                result = {
                    "seconds": took,
                    "wall": wall,
                    "row": row,
                    "general": model.loss(self.test[self.general]),
                    "parameters": sum(p.numel() for p in model.parameters.values()),
                }
                shutil.rmtree(folder)
                if number > 1:
                    weights(number - 2).unlink(missing_ok=True)
                return result

            done = self.kept(f"{method}-{number}-{name}", stage)
            seconds += done["seconds"]
            walls.append(done.get("wall"))
            general = done["general"]
            rows.append(done["row"])
            own[name] = done["row"][number if sequence else 0]
        many = 1 if sequence else len(self.domains)
        result: dict[str, Any] = {
            "rate": rate,
            "parameters": done["parameters"] * many,
            "size": done["parameters"],
            "own": own,
            "seconds": seconds,
            "wall": _sum_of_all(walls),
        }
        if sequence:
            before = [Baseline(self.model, self.tokenizer).loss(self.test[n]) for n in self.domains]
            result["matrix"] = ForgettingMatrix(self.domains, before, rows).to_json()
            result["final"] = dict(zip(self.domains, rows[-1], strict=True))
            result["general"] = general
        else:
            result["final"] = own  # an oracle says which model answers
        return result

    def baseline_rate(self, fresh: Callable[[], Baseline], kind: str) -> float:
        def trial(rate: float) -> float:
            tried = fresh()
            folder = self.out / "trials" / f"{kind}-{rate}"
            documents = text_data.read([self.training_text(self.domains[0])]).documents
            tried.learn(documents, self.settings(rate, self.tokens // 4), folder, f"rate {rate}")
            shutil.rmtree(folder)
            return tried.loss(self.valid(self.domains[0]))

        return self.rate(kind, trial)

    def joint(self, method: str) -> dict[str, Any]:
        """Everything at once, as many tokens as all domains together: the upper bound that keeps all text."""
        model = self.model
        rate = self.baseline_rate(lambda: Baseline(self.model, self.tokenizer, seed=self.seed), "finetune")
        if method == "dense-joint":
            model = self.dense()
        trained = Baseline(model, self.tokenizer)
        packed: list[text_data.Document] = []
        for name in self.domains:
            documents = text_data.read([self.training_text(name)]).documents
            packed += cut(documents, self.tokenizer, self.tokens)
        folder = self.out / "runs" / method
        start, whole = time.perf_counter(), not folder.exists()
        seconds = trained.learn(packed, self.settings(rate, self.tokens * len(self.domains)), folder, method)
        wall = time.perf_counter() - start if whole else None
        final = {n: trained.loss(self.test[n]) for n in self.domains}
        return {
            "rate": rate,
            "parameters": sum(p.numel() for p in trained.parameters.values()),
            "final": final,
            "own": final,
            "general": trained.loss(self.test[self.general]),
            "seconds": seconds,
            "wall": wall,
        }

    def dense(self) -> Any:
        """A model of the size of base and one module, pretrained as the base was."""
        folder = self.out / "dense"
        if not folder.exists():
            config = copy.deepcopy(self.model.config)
            config.num_hidden_layers += 4
            model = Baseline(new_model(config, self.seed), self.tokenizer)
            record = json.loads((self.base / "pretrain.json").read_text())
            rate = record["settings"]["learning_rate"]
            settings = replace(self.settings(rate if isinstance(rate, float) else 1.5e-3, record["tokens"]))
            documents = self.documents(self.general, "train")
            model.learn(documents, settings, self.out / "runs" / "dense", "dense: pretraining")
            model.model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _or_infinite(train: Callable[[float], float], rate: float) -> float:
    try:
        return train(rate)
    except TrainingError:  # it diverged
        return math.inf


def _sum_of_all(values: Sequence[float | None]) -> float | None:
    """Their sum; None where one is not known, as of a stage that was interrupted."""
    known = [v for v in values if v is not None]
    return sum(known) if len(known) == len(values) else None


def cut(documents: list[text_data.Document], tokenizer: Any, tokens: int) -> list[text_data.Document]:
    """The first documents, until they hold so many tokens."""
    total, chosen = 0, []
    for document in documents:
        chosen.append(document)
        total += len(tokenizer(document.text, add_special_tokens=False)["input_ids"]) + 1
        if total >= tokens:
            break
    return chosen
