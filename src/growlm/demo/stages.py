"""Stages: what each part of the demo does in the demo's folder, and what is kept of it.

Knows the verbs; not their order, nor the time that there is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growlm import data as text_data
from growlm.demo import corpora
from growlm.demo.accounting import account, paper_config
from growlm.demo.sizing import SEQUENCE_LENGTH, DemoSize
from growlm.engine import Engine
from growlm.evaluation import EvalConfig, evaluate
from growlm.evaluation.report import write_report
from growlm.router import NONE
from growlm.store import Store
from growlm.training.config import LearnConfig, PretrainConfig
from growlm.training.learn import learn
from growlm.training.pretrain import pretrain

_PROMPT_CHARACTERS = 300  # of a held-out document, for the samples


@dataclass(frozen=True)
class Stages:
    """The parts of one demo. Each gives a JSON object; one that was stopped goes on where it was, or begins again.

    Args:
        done: by stage, what earlier ones gave.
    """

    out: Path
    size: DemoSize
    device: str
    precision: str
    progress: bool | None

    def run(self, stage: str, done: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        verb, _, domain = stage.partition("-")
        return self._parts(domain, done)[verb]()

    def _parts(self, domain: str, done: Mapping[str, dict[str, Any]]) -> dict[str, Callable[[], dict[str, Any]]]:
        return {
            "text": self._text,
            "pretrain": self._pretrain,
            "learn": lambda: self._learn(domain),
            "evaluate": self._evaluate,
            "generate": self._generate,
            "report": lambda: self._report({**done["evaluate"]["evaluation"], **done["generate"]}),
        }

    def _text(self) -> dict[str, Any]:
        corpora.write(self.out / "text", max_bytes=self.size.text_bytes)
        return {"bytes": self.size.text_bytes}

    def _pretrain(self) -> dict[str, Any]:
        base = self.out / "base"
        if not base.exists():
            config = PretrainConfig(
                preset=self.size.preset,
                vocab_size=self.size.vocab_size,
                tokens=self.size.pretrain_tokens,
                batch_size=self.size.pretrain_batch,
                sequence_length=SEQUENCE_LENGTH,
                device=self.device,
                precision=self.precision,
            )
            pretrain(base, [self._train("english")], config, progress=self.progress)
        record = json.loads((base / "pretrain.json").read_bytes())
        return {key: record[key] for key in ("parameters", "loss_before", "loss_after", "tokens", "seconds")}

    def _learn(self, name: str) -> dict[str, Any]:
        store = self._store(self.out / "base")
        if name not in store.modules:
            config = LearnConfig(
                tokens=self.size.learn_tokens[name],
                num_layers=self.size.num_layers,
                batch_size=self.size.learn_batch,
                router_samples=self.size.router_samples,
                sequence_length=SEQUENCE_LENGTH,
                device=self.device,
                precision=self.precision,
                admit_anyway=True,  # the table says what did not help
            )
            learn(store, name, [self._train(name)], config, progress=self.progress)
        return self._learned(store, name)

    def _store(self, base: Path) -> Store:
        """The store, made where it is not there."""
        brain = self.out / "brain"
        if not (brain / "store.json").is_file() and not any(brain.glob("modules/*")):
            shutil.rmtree(brain, ignore_errors=True)  # a process was killed when it made the store
        return Store.open(brain) if brain.exists() else Store.create(brain, base=base)

    def _learned(self, store: Store, name: str) -> dict[str, Any]:
        record = store.module(name).manifest.training
        return {key: record[key] for key in ("loss_before", "loss_after", "tokens", "seconds")}

    def _evaluate(self) -> dict[str, Any]:
        store = Store.open(self.out / "brain")
        data = {name: [self._test(name)] for name in self.size.learn_tokens} | {NONE: [self._test("english")]}
        config = EvalConfig(sequence_length=SEQUENCE_LENGTH, max_documents=self.size.max_documents, device=self.device)
        found = evaluate(store, data, config, progress=self.progress).to_json()
        return {"evaluation": found, "status": store.status()}

    def _generate(self) -> dict[str, Any]:
        """A continuation of the beginning of a held-out document of each domain."""
        first = {name: text_data.read([self._test(name)]).documents[0].text for name in self.size.learn_tokens}
        prompts = {name: text[:_PROMPT_CHARACTERS] for name, text in first.items()}
        with Engine(Store.open(self.out / "brain"), device=self.device) as engine:
            answers = engine.generate_many(list(prompts.values()), max_new_tokens=48, temperature=0.7, top_p=0.9)
        samples = [
            {"domain": name, "prompt": prompt, "text": answer.text, "module": answer.module}
            for (name, prompt), answer in zip(prompts.items(), answers, strict=True)
        ]
        return {"samples": samples}

    def _report(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        write_report(evaluation, self.out / "report")
        return {"accounting": account(paper_config()).lines()}

    def _train(self, name: str) -> Path:
        return self.out / "text" / name / "train.jsonl"

    def _test(self, name: str) -> Path:
        return self.out / "text" / name / "test.jsonl"
