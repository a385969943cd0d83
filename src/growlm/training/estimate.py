"""Estimate: what a run of `learn` reads, takes and leaves, told before it is made, from a few real steps of it.

Makes them in a folder of its own and writes nothing to the store.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from growlm import data as text_data
from growlm import router
from growlm.base import Base, tensor_bytes
from growlm.disk.files import work_folder
from growlm.errors import StoreError
from growlm.modules import ModuleSet, kind_of
from growlm.modules.scoring import paired_losses
from growlm.progress import reporting
from growlm.store import ROUTER_TRAINED, Store
from growlm.training.checkpoints import saved_step
from growlm.training.config import FITTED, LearnConfig
from growlm.training.corpus import beginnings, validation_tokens
from growlm.training.general import general_shown
from growlm.training.learn import shown
from growlm.training.learn_run import LearnRun
from growlm.training.memory import device_peak_bytes, peak_bytes
from growlm.training.module_training import as_served
from growlm.training.recalling import text_of
from growlm.training.rehearsal import Rehearsal, Rehearsed
from growlm.training.router import last_config
from growlm.training.samples import side_by_side
from growlm.training.validation import Validation
from growlm.units import format_seconds, format_size

_SECONDS = 40.0  # for steps; all else that is timed takes about as long as a step
_TIMED_TOKENS = 256  # of held-out text
_TIMED_PASSAGES = 8  # that the router is shown,
_SHOWN_TOKENS = 64  # and so much of each
_SHOWN = 160  # characters of a sample


@dataclass(frozen=True)
class Estimate:
    """What a run will be.

    Attributes:
        text: what is read and a piece of it, as `learn` says it.
        documents, tokens, learned, rows: that were read: of `tokens`, `learned` are counted by the loss, in rows.
        heldout: documents or passages that are held out, tokens of them by which rate and step are chosen
            (`validation`), and by which it is decided whether the module is admitted (`deciding`).
        steps: at the most: fewer if more does not help on held-out text.
        resumes: steps that a stopped run has done already.
        trials: of learning rates, in rounds: how many, and for how many short steps each.
        seconds: by part, of the whole run.
        memory: peak of main memory in bytes, at the least what this process has had already; `device_memory` of the
            GPU's, where there is one.
        samples: held-out prompts that base and module will answer: `prompt`, `text` and what the `base` answers.
        bytes: of the module on the disk; `text_bytes` of the text that it recalls; `beside` it lies what the router
            keeps of the text; `scratch`, what the run takes besides until it ends.
        timed: optimiser steps from which all this is told.
    """

    name: str
    text: list[str]
    documents: int
    tokens: int
    learned: int
    rows: int
    heldout: dict[str, int]
    steps: int
    tokens_per_step: int
    tokens_trained: int
    resumes: int
    trials: list[dict[str, int]]
    seconds: dict[str, float]
    total_seconds: float
    memory: int
    device_memory: int | None
    bytes: int
    text_bytes: int
    beside: int
    scratch: int
    timed: int
    samples: list[dict[str, str]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        held, parts = self.heldout, {part: seconds for part, seconds in self.seconds.items() if seconds >= 0.5}
        rounds = ", then ".join(f"{r['rates']} are tried for {r['steps']} short steps" for r in self.trials)
        gpu = "" if self.device_memory is None else f", {format_size(self.device_memory)} of the GPU's"
        resumed = f"; a stopped run goes on after step {self.resumes:,}" if self.resumes else ""
        text = f"{format_size(self.text_bytes)} of text, " if self.text_bytes else ""
        steps = [
            f"held-out text: {held['validation']:,} tokens of it choose the step, {held['deciding']:,} decide whether "
            "the module is admitted",
            f"steps: {self.steps:,} at the most, of {self.tokens_per_step:,} tokens; {self.tokens_trained:,} tokens "
            f"in all, repeats included{resumed}",
            f"learning rates: {rounds or 'none are tried'}",
        ]
        if not self.steps:
            steps = [f"held-out text: {held['deciding']:,} tokens decide whether the module is admitted", "steps: none"]
        return [
            *self.text,
            *steps,
            f"time: about {format_seconds(self.total_seconds)}"
            + (f" ({', '.join(f'{part} {format_seconds(s)}' for part, s in parts.items())})" if parts else ""),
            f"memory: about {format_size(self.memory)} at the most{gpu}",
            f"disk: {format_size(self.bytes)}, {text}and beside it {format_size(self.beside)} for the router; "
            f"{format_size(self.scratch)} more until the run ends",
            *(
                f"prompt: {shown(s['prompt'], _SHOWN, end=True)}\n  base: {shown(s['base'], _SHOWN)}"
                for s in self.samples
            ),
        ]


def estimate(
    store: Store,
    name: str,
    data: Sequence[str | Path],
    config: LearnConfig | None = None,
    *,
    update: bool = False,
    samples: int = 3,
    progress: bool | None = None,
) -> Estimate:
    """What `learn` with the same arguments would do. Takes about a minute once the base is loaded and the text is read;
    changes nothing, but that what a store keeps of a GGUF base is made again if it is gone.

    Raises:
        as `learn`, but that it may turn out no better than the base; and StoreError: the module of this run is saved
            already, and only the router is left to be trained.
    """
    # On the disk that the run would be on.
    with reporting(name, progress), work_folder(store.scratch) as work:
        return _estimate(store, name, data, config or LearnConfig(), update, samples, work)


def _estimate(
    store: Store, name: str, data: Sequence[str | Path], config: LearnConfig, update: bool, samples: int, work: Path
) -> Estimate:
    run = LearnRun.prepare(store, name, data, config, update=update)
    config = run.config
    if run.saved is not None:
        raise StoreError(
            f"{store.path}: version {run.saved.version} of {name!r} is saved, by a run that was stopped after that; "
            "the same command without --dry-run ends it"
        )
    clock = _Clock()
    base = run.load_base(remember=False)
    clock.count("base")
    tokens, tokenizer = run.tokenized()
    run.require_fit(base, tokens, tokenizer)
    clock.count("text")
    served = base.dtype

    # The router's share.
    shown = tokens.shown(base, config)
    passages = [*itertools.chain(*shown)]
    few, layer = [p[:_SHOWN_TOKENS] for p in passages[:_TIMED_PASSAGES]], store.manifest.routing_layer
    router.gather_evidence(base, few[:1], few[:1], layer=layer)  # warms up
    clock.count(None)
    router.gather_evidence(base, few, few[:1], layer=layer)
    token = clock.count(None) / sum(map(len, [*few, few[0]]))

    def showing(texts: Sequence[Sequence[int]]) -> float:
        return token * sum(min(len(text), _SHOWN_TOKENS) for text in texts)

    clock.seconds["passages for the router"] = showing(passages)
    if not router.has_general(store):
        clock.seconds["general text for the router"] = showing(general_shown(store, base, tokenizer))
    beside = router.evidence_bytes(*shown, base.hidden_size) + tensor_bytes(tokens.samples(config, run.keep).values())
    if store.manifest.router == ROUTER_TRAINED:
        whole = token * base.num_layers / (layer or base.num_layers)
        clock.seconds["router"] = _router_tokens(store, name, base) * whole

    kind = kind_of(config.kind)
    if kind.trains:
        learning = Rehearsal(
            base,
            kind,
            config,
            tokens.packed,
            work,
            tokens.begin,
            tokens.replay,
            beginnings(tokens.validation, _TIMED_TOKENS, config.seed),
        )
        found, steps, trained = learning.measure(_SECONDS), learning.steps, learning.module
        del learning
    else:
        found, steps, trained = Rehearsed.nothing(), [], kind.create(base, config.shape)
    clock.seconds |= {"vocabulary rows": found.rows, "trials": found.trials, "steps": found.steps}
    if run.placement.dtype != served:
        clock.count(None)
        del base
        base = run.load_base(remember=False)
        clock.count("base")
    module, text, fitted_by = as_served(base, trained, name), 0, 0
    if module.memory is not None:
        clock.count(None)
        kept = text_of(base, run.body.text.documents, tokenizer)
        clock.count("sorting the text")
        text = sum(tensor_bytes(part.values()) for part in kept.files().values())
        fitted_by = _length(beginnings(tokens.validation, FITTED, 0))

    # Scores: where training begins and after some steps, and in the end of the best one.
    read = sum(map(len, steps)) * config.sequence_length
    chosen_by = _length(beginnings(tokens.validation, validation_tokens(read), config.seed))
    decided_by = tokens.deciding(config)
    timed = beginnings(decided_by, _TIMED_TOKENS, config.seed)
    clock.count(None)
    paired_losses([ModuleSet(base), ModuleSet(base, [module])], [p.tokens for p in timed])
    a_token = clock.count(None) / _length(timed)
    times = 1 if run.old is None else 2  # by the version that it replaces as well
    scored = len(Validation.due(len(steps), len(steps))) if steps else 0
    clock.seconds["fitting what the text adds"] = fitted_by * a_token / 2
    clock.seconds["scores and admission"] = chosen_by * found.score * scored + _length(decided_by) * a_token * times
    clock.count(None)
    answers = side_by_side(base, module, tokenizer, tokens.heldout, samples, seed=config.seed)
    clock.count("samples")
    return Estimate(
        name=name,
        text=run.body.lines(tokens, tokenizer, config),
        documents=len(run.body.text.documents),
        tokens=tokens.packed.num_tokens,
        learned=tokens.packed.num_counted,
        rows=len(tokens.packed),
        heldout={
            "documents": len({p.document_index for p in (*tokens.validation, *tokens.heldout)}),
            "validation": chosen_by,
            "deciding": _length(decided_by),
        },
        steps=len(steps),
        tokens_per_step=max(map(len, steps), default=0) * config.sequence_length,
        tokens_trained=read,
        resumes=saved_step(run.folder),
        trials=[{"rates": number, "steps": length} for number, length in found.rounds],
        seconds=clock.seconds,
        total_seconds=sum(clock.seconds.values()),
        memory=max(found.peak, peak_bytes()),
        device_memory=_most(found.device_peak, device_peak_bytes(run.placement.device)),
        scratch=found.scratch,
        bytes=module.num_bytes(),
        text_bytes=text,
        beside=beside,
        timed=found.timed,
        samples=[{"prompt": a.prompt, "text": a.text, "base": a.base} for a in answers],
    )


class _Clock:
    """Seconds by part of the run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = monotonic()

    def count(self, part: str | None) -> float:
        """Seconds since it was last asked, which count for a part, or for none."""
        now, last = monotonic(), self._last
        self._last = now
        if part is not None:
            self.seconds[part] = self.seconds.get(part, 0.0) + now - last
        return now - last


def _most(one: int | None, other: int | None) -> int | None:
    return max((n for n in (one, other) if n is not None), default=None)


def _length(passages: Sequence[text_data.Passage]) -> int:
    return sum(len(p.tokens) for p in passages)


def _router_tokens(store: Store, name: str, base: Base) -> float:
    """Tokens that the base alone reads in the time in which a trained router is trained after this."""
    config = last_config(store)
    categories = len({*store.modules, name}) + 1
    rows = config.rows_wanted(categories * config.passages)
    layers = 1 + 3 * config.router_layers / base.num_layers
    return rows * config.sequence_length * layers
