"""Evaluate: perplexity by domain of base, own module and routed choice; routing; forgetting; memory.

Knows documents, losses and routes. Draws nothing: see `report.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growlm import __version__
from growlm import data as text_data
from growlm.engine import Engine
from growlm.errors import ConfigError, DataError
from growlm.modules import ModuleSet
from growlm.modules.probe import probe
from growlm.modules.scoring import passage_losses
from growlm.router import NONE, base_states
from growlm.store import Store
from growlm.training.progress import counting_bar


@dataclass(frozen=True)
class EvalConfig:
    """Settings of `growlm eval`.

    Attributes:
        sequence_length: longer documents are scored in pieces of so many tokens.
        max_documents: of each domain, the first so many; 0 for all.
        route_tokens: how much of a document's beginning the router sees.
        text_key, separator: as in `learn`.
    """

    sequence_length: int = 512
    max_documents: int = 200
    route_tokens: int = 256
    text_key: str = "text"
    separator: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("sequence_length", 2), ("max_documents", 0), ("route_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True)
class EvalResult:
    """What was measured; `to_json` gives the fields in the form of `growlm eval --json`.

    Attributes:
        perplexity: by domain: base, module (its own), routed, and how many tokens and documents they are over.
        forgetting: mean increase of log-loss, in nats a token, of the base and of every module since it was learned,
            on a fixed text; exactly 0 where not a bit of the logits has changed.
        forgetting_detail: what was compared, and what differs in any bit.
        routing: accuracy, confusion (true domain -> chosen -> documents), and retained gain: the share of the
            improvement of each domain's own module that automatic routing keeps (summed log-loss, over documents).
        memory: bytes of base, router and modules; resident with the largest module, and in total.
    """

    store: str
    base: str
    perplexity: dict[str, dict[str, Any]]
    forgetting: float
    forgetting_detail: dict[str, list[str]]
    routing: dict[str, Any]
    memory: dict[str, Any]
    growlm: str = __version__
    date: str = field(default_factory=lambda: date.today().isoformat())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Domain:
    name: str
    passages: list[list[int]]
    owner: list[int]  # the document of each passage
    base: Tensor  # summed log-loss of each document
    own: Tensor
    routed: Tensor
    chosen: list[str]
    num_labels: int


def evaluate(
    store: Store,
    data: Mapping[str, Sequence[str | Path]],
    config: EvalConfig | None = None,
    *,
    memory: str | int | None = None,
    progress: bool | None = None,
) -> EvalResult:
    """Measures a store on held-out text.

    Args:
        data: files or folders by domain, a module's name each; under `"none"`, text that belongs to no module.
        memory: budget of the engine that answers, as in `Engine`.

    Raises:
        UnknownModuleError: a domain that is no module.
        DataError: data that is missing, malformed or too short.
    """
    config = config or EvalConfig()
    if not data:
        raise DataError("no evaluation data; give some as domain=path, e.g. medicine=heldout.txt")
    for name in data:
        if name != NONE:
            store.module(name)
    corpora = {
        name: text_data.read(paths, text_key=config.text_key, separator=config.separator).documents
        for name, paths in data.items()
    }
    with Engine(store, memory=memory) as engine:
        domains = []
        total = len(corpora)
        with counting_bar("evaluating", total, progress) as report:
            for name, documents in corpora.items():
                domains.append(_score(engine, name, documents, config))
                report(len(domains))
        changed, forgetting, checked = _forgetting(engine)
        memory_use = _memory(engine)
    return EvalResult(
        store=str(store.path),
        base=store.manifest.base,
        perplexity={d.name: _perplexities(d) for d in domains},
        forgetting=forgetting,
        forgetting_detail={"checked": checked, "changed": changed},
        routing=_routing(domains),
        memory=memory_use,
    )


def _score(engine: Engine, name: str, documents: Sequence[text_data.Document], config: EvalConfig) -> _Domain:
    chosen_documents = documents[: config.max_documents or None]
    limit = engine.base.max_positions
    length = config.sequence_length if limit is None else min(config.sequence_length, limit)
    found = text_data.passages(chosen_documents, engine.tokenizer, length)
    if not found:
        raise DataError(f"{name}: every document is shorter than two tokens; give more text")
    # Documents too short to score are left out everywhere.
    numbers = {index: at for at, index in enumerate(dict.fromkeys(p.document_index for p in found))}
    passages, owner = [p.tokens for p in found], [numbers[p.document_index] for p in found]
    routes = _route(engine, passages, owner, config.route_tokens)

    def losses(module: str | None, which: Sequence[int]) -> Tensor:
        names = [] if module is None else [module]
        with engine.modules.using(names) as held:
            some = [passages[i] for i in which]
            scored = passage_losses(ModuleSet(engine.base, list(held.values())), some)
        by_document = torch.zeros(len(numbers), dtype=torch.float64)
        return by_document.index_add_(0, torch.tensor([owner[i] for i in which]), scored)

    everything = range(len(passages))
    base = losses(None, everything)
    own = base if name == NONE else losses(name, everything)
    routed = torch.zeros_like(base)
    for module in dict.fromkeys(routes):
        mine = torch.tensor([r == module for r in routes])
        if module in (name, NONE):
            routed[mine] = (own if module == name else base)[mine]
        else:
            routed += losses(module, [i for i in everything if mine[owner[i]]])
    return _Domain(name, passages, owner, base, own, routed, routes, sum(len(p) - 1 for p in passages))


def _route(engine: Engine, passages: Sequence[Sequence[int]], owner: Sequence[int], tokens: int) -> list[str]:
    """The router's choice for each document, from the beginning of its first passage."""
    first: dict[int, list[int]] = {}
    for passage, document in zip(passages, owner, strict=True):
        first.setdefault(document, list(passage[:tokens]))
    starts = [first[d] for d in sorted(first)]
    order = sorted(range(len(starts)), key=lambda i: len(starts[i]))
    chosen = [NONE] * len(starts)
    for at in range(0, len(order), 16):
        some = order[at : at + 16]
        routes = engine.router.route(*base_states(engine.base, [starts[i] for i in some]))
        for i, route in zip(some, routes, strict=True):
            chosen[i] = route.module or NONE
    return chosen


def _perplexities(domain: _Domain) -> dict[str, Any]:
    def perplexity(losses: Tensor) -> float:
        return math.exp(min(float(losses.sum()) / domain.num_labels, 700.0))

    gain = float((domain.base - domain.own).sum())
    kept = float((domain.base - domain.routed).sum())
    return {
        "base": perplexity(domain.base),
        "module": perplexity(domain.own),
        "routed": perplexity(domain.routed),
        "retained_gain": kept / gain if gain > 0 else None,
        "tokens": domain.num_labels,
        "documents": len(domain.base),
    }


def _routing(domains: Sequence[_Domain]) -> dict[str, Any]:
    confusion: dict[str, dict[str, int]] = {}
    for domain in domains:
        row = confusion.setdefault(domain.name, {})
        for choice in domain.chosen:
            row[choice] = row.get(choice, 0) + 1
    columns = dict.fromkeys([*confusion, *(c for row in confusion.values() for c in row), NONE])
    confusion = {name: {c: row.get(c, 0) for c in columns} for name, row in confusion.items()}
    documents = sum(len(d.chosen) for d in domains)
    gain = sum(float((d.base - d.own).sum()) for d in domains)
    kept = sum(float((d.base - d.routed).sum()) for d in domains)
    return {
        "accuracy": sum(confusion[d.name][d.name] for d in domains) / documents,
        "confusion": confusion,
        "retained_gain": kept / gain if gain > 0 else None,
    }


def _forgetting(engine: Engine) -> tuple[list[str], float, list[str]]:
    """Compares what base and modules answer now with what they answered when each module was learned."""
    changed: set[str] = set()
    increases: list[float] = []
    now_base = probe(ModuleSet(engine.base))
    checked: list[str] = []
    for name, stored in engine.store.modules.items():
        then = stored.manifest.training.get("probe")
        if then is None:
            continue
        checked.append(name)
        with engine.modules.using([name]) as held:
            now = probe(ModuleSet(engine.base, [held[name]]))
        increases += [now["loss"] - then["module"]["loss"], now_base["loss"] - then["base"]["loss"]]
        if now["logits"] != then["module"]["logits"]:
            changed.add(name)
        if now_base["logits"] != then["base"]["logits"]:
            changed.add("base")
    if checked:
        checked.insert(0, "base")
    return sorted(changed), sum(increases) / len(increases) if increases else 0.0, checked


def _memory(engine: Engine) -> dict[str, Any]:
    stored = sorted(engine.store.modules.values(), key=lambda m: m.manifest.created)
    modules = {m.name: m.bytes for m in stored}
    return {
        "base_bytes": engine.base_bytes,
        "router_bytes": engine.router.num_bytes(),
        "modules": modules,
        "resident_bytes": engine.fixed_bytes + max(modules.values(), default=0),
        "total_bytes": engine.fixed_bytes + sum(modules.values()),
    }
