"""Stages with a published base: those that differ from the small base's. The base is given, modules are learned with
the defaults of `growlm learn`, one that is refused is told and left out, and full finetuning is there to compare with.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from growlm import data as text_data
from growlm.base import Base
from growlm.base.checkpoint import load_model, load_tokenizer, num_parameters
from growlm.base.placement import Placement, find_device
from growlm.demo.published_sizing import SEQUENCE_LENGTH, PublishedSize
from growlm.demo.stages import Stages
from growlm.errors import NotBetterError
from growlm.evaluation import EvalConfig, evaluate
from growlm.evaluation.report import write_report
from growlm.layers.cross_entropy import linear_cross_entropy
from growlm.layers.tables import free_bytes
from growlm.modules import ModuleSet
from growlm.modules.kinds import kind_of
from growlm.modules.scoring import passage_losses
from growlm.router import NONE, has_general
from growlm.router.states import base_states
from growlm.store import Store
from growlm.training.config import FinetuneConfig, LearnConfig
from growlm.training.corpus import TrainingCorpus, require_positions
from growlm.training.finetune import finetune
from growlm.training.general import describe_general
from growlm.training.learn import learn
from growlm.training.memory import kept_pages
from growlm.training.module_training import ModuleTraining
from growlm.training.segments import final_states

_T = TypeVar("_T")
_MEASURED_ROWS = 4  # of learning; so many of SEQUENCE_LENGTH tokens
_FINETUNING_BYTES = 16  # a parameter: weight, gradient and two moments
_ACTIVATIONS = 2_500_000_000  # bytes that a step of finetuning takes besides, about


@dataclass(frozen=True)
class PublishedStages(Stages):
    """
    Args:
        base: a GGUF file or a checkpoint folder.
    """

    size: PublishedSize  # type: ignore[assignment]
    base: Path

    def _parts(self, domain: str, done: Mapping[str, dict[str, Any]]) -> dict[str, Callable[[], dict[str, Any]]]:
        return super()._parts(domain, done) | {"base": self._base, "finetune": lambda: self._finetune(domain)}

    def _base(self) -> dict[str, Any]:
        if not any((self.out / "brain" / "modules").glob("*")):
            shutil.rmtree(self.out / "brain", ignore_errors=True)  # of a demo for which there was too little time
        store = self._store(self.base)
        return {"parameters": num_parameters(store.base_folder), "bytes": store.base_bytes()}

    def _learn(self, name: str) -> dict[str, Any]:
        store = Store.open(self.out / "brain")
        if name not in store.modules:
            if not has_general(store):  # as `growlm new --general` does
                base = store.load_base(device=self.device)
                describe_general(store, base, store.load_tokenizer(), [self._train("english")])
                del base
            config = LearnConfig(tokens=self.size.learn_tokens[name], device=self.device, precision=self.precision)
            try:
                learn(store, name, [self._train(name)], config, progress=self.progress)
            except NotBetterError as error:
                return {"refused": str(error)}
        return self._learned(store, name)

    def _evaluate(self) -> dict[str, Any]:
        """Of domains without a module too, as text that belongs to none."""
        store = Store.open(self.out / "brain")
        config = EvalConfig(max_documents=self.size.max_documents, device=self.device)

        def found(names: Sequence[str], general: str) -> dict[str, Any]:
            data = {name: [self._test(name)] for name in names} | {NONE: [self._test(general)]}
            return evaluate(store, data, config, progress=self.progress).to_json()

        learned = [name for name in self.size.learn_tokens if name in store.modules]
        refused = [name for name in self.size.learn_tokens if name not in learned]
        return {
            "evaluation": found(learned, "english"),
            "status": store.status(),
            "refused": {name: found([], name)["perplexity"][NONE] for name in refused},
        }

    def _finetune(self, name: str) -> dict[str, Any]:
        """All parameters, from where the domain before has left them."""
        order = list(self.size.learn_tokens)
        earlier = order[: order.index(name)]
        out = self.out / "finetuned" / name
        source = self.out / "finetuned" / earlier[-1] if earlier else Store.open(self.out / "brain").base_folder
        if not out.exists():
            out.parent.mkdir(exist_ok=True)
            config = FinetuneConfig(
                tokens=self.size.learn_tokens[name],
                device=self.device,
                precision=self.precision,
                admit_anyway=True,  # the table says what did not help
            )
            finetune(source, out, [self._train(name)], config, progress=self.progress)
        names = [*order, "english"] if name == order[-1] else [name]
        found = self._perplexities(out, names)
        if earlier:
            shutil.rmtree(source, ignore_errors=True)
        return {"perplexity": found}

    def _perplexities(self, folder: Path, names: list[str]) -> dict[str, float]:
        """Of a checkpoint on held-out text, which is cut as `growlm eval` cuts it."""
        model = load_model(folder, "float32").to(find_device(self.device))
        base, tokenizer = Base(model, str(folder)), load_tokenizer(folder)
        length = min(SEQUENCE_LENGTH, base.max_positions or SEQUENCE_LENGTH)
        found = {}
        for name in names:
            documents = text_data.read([self._test(name)]).documents[: self.size.max_documents]
            passages = [p.tokens for p in text_data.passages(documents, tokenizer, length)]
            loss = float(passage_losses(ModuleSet(base), passages).sum()) / sum(len(p) - 1 for p in passages)
            found[name] = math.exp(min(loss, 700.0))
        return found

    def _report(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        write_report(evaluation, self.out / "report")
        return {}

    def measure(self) -> dict[str, Any]:
        """The fields of `PublishedSpeeds`, as JSON: a few steps of each with this base, on the first domain's text."""
        placement = Placement.of(self.device, self.precision)
        store, clock = Store.open(self.out / "brain"), _Clock()
        base = clock.of("load", 1, lambda: store.load_base(device=placement.device))
        config = LearnConfig(
            tokens=_MEASURED_ROWS * SEQUENCE_LENGTH, learning_rate=1e-4, device=self.device, precision=self.precision
        ).on(sum(p.numel() for p in base.model.parameters()))
        require_positions(base, config)
        name = next(iter(self.size.learn_tokens))
        tokens = TrainingCorpus.read([self._train(name)], config).tokenized(store.load_tokenizer(), config)
        row, layer = tokens.packed[[0]], store.manifest.routing_layer
        ids, count = row.tolist(), row.numel()
        passage_losses(ModuleSet(base), ids)  # the first pass is not like the others
        clock.of("read", count, lambda: base_states(base, ids, layer))
        clock.of("score", count, lambda: passage_losses(ModuleSet(base), ids))
        with tempfile.TemporaryDirectory(dir=self.out) as work:
            training = ModuleTraining(base, kind_of(config.kind), config, tokens.packed, Path(work), tokens.begin)
            clock.of("learn", _MEASURED_ROWS * SEQUENCE_LENGTH, training.run)
            del training
        if self._can_finetune(base):
            step = self._finetuning_step(base, placement)
            with kept_pages():
                step(row[:, :128])
                clock.of("finetune", count, lambda: step(row))
        return {"speeds": {"finetune": None} | clock.seconds(steady=placement.device.type == "cpu")}

    def _can_finetune(self, base: Base) -> bool:
        """Whether there is the memory for it."""
        needed = _FINETUNING_BYTES * sum(p.numel() for p in base.model.parameters()) + _ACTIVATIONS
        free = free_bytes(base.device)
        return free is None or needed <= free

    def _finetuning_step(self, base: Base, placement: Placement) -> Callable[[torch.Tensor], None]:
        whole = Base(base.model.float().requires_grad_(True), base.where, freeze=False)

        def step(row: torch.Tensor) -> None:
            inputs, labels = row[:, :-1].to(placement.device), row[:, 1:].to(placement.device)
            with placement.autocast():
                hidden, _ = final_states(whole, inputs)
            hidden = hidden.to(placement.dtype).flatten(0, 1)
            linear_cross_entropy(hidden, whole.head_weight, labels.flatten(), softcap=whole.softcap).backward()

        return step


class _Clock:
    """Seconds of what is measured, and of them those in which this process was at work."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, float, float]] = {}

    def of(self, name: str, count: int, do: Callable[[], _T]) -> _T:
        started, worked = time.monotonic(), time.thread_time()
        result = do()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._found[name] = count, time.monotonic() - started, time.thread_time() - worked
        return result

    def seconds(self, *, steady: bool) -> dict[str, float]:
        """Of each, for one of its `count`. Others on the machine disturb one part and not the next: where it is
        `steady` each is taken to wait as much as all did together."""
        waits = sum(took for _, took, _ in self._found.values()) / sum(busy for _, _, busy in self._found.values())
        return {name: (waits * busy if steady else took) / count for name, (count, took, busy) in self._found.items()}
