"""Measure: perplexity by domain of base, own module and routed choice; routing; forgetting; memory and compute.

Knows documents, losses and routes. Draws nothing: see `report.py`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growlm import __version__
from growlm import data as text_data
from growlm.engine import Engine
from growlm.errors import DataError, GrowlmError
from growlm.evaluation.config import EvalConfig
from growlm.evaluation.continual import ForgettingMatrix
from growlm.evaluation.statistics import Bootstrap, calibration
from growlm.modules import ModuleSet
from growlm.modules.probe import probe
from growlm.modules.scoring import passage_losses
from growlm.router import NONE, Route, Router, base_states, load_router, names_of
from growlm.store import Store, StoredModule
from growlm.training.progress import counting_bar


@dataclass(frozen=True)
class EvalResult:
    """What was measured; `to_json` gives the fields in the form of `growlm eval --json`. A module that diverged has
    losses that are no numbers: nan here, null there.

    Attributes:
        perplexity: by domain: base, module (its own), routed, each with its interval over documents, the retained gain,
            and how many tokens and documents they are over.
        forgetting: mean increase of log-loss, in nats a token, of the base and of every module since it was learned,
            on a fixed text; exactly 0 where not a bit of the logits has changed.
        forgetting_detail: what was `checked`; what has `changed` in any bit; what is `not_comparable` and so not in
            the mean, because its loss was no number then or is none now.
        matrix: routed perplexity on every domain after each domain that was learned, in the order of learning, with
            average forgetting, backward and forward transfer; None where fewer than two domains were measured.
        routing: accuracy, confusion (true domain -> chosen -> documents), retained gain: the share of the improvement
            of each domain's own module that automatic routing keeps (summed log-loss, over documents); intervals of
            accuracy and gain; calibration; the share of *none* on text of no domain and on the domains' text.
        memory: bytes of base, router and modules; resident with the largest module, and in total.
        compute: parameters of base, active and in total; tokens a second while scoring.
    """

    store: str
    base: str
    perplexity: dict[str, dict[str, Any]]
    forgetting: float
    forgetting_detail: dict[str, list[str]]
    matrix: dict[str, Any] | None
    routing: dict[str, Any]
    memory: dict[str, Any]
    compute: dict[str, Any]
    growlm: str = __version__
    date: str = field(default_factory=lambda: date.today().isoformat())

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)), parse_constant=lambda name: None)


@dataclass
class _Domain:
    """One domain's held-out text, what each router chose for it, and what each module made of it."""

    name: str
    passages: list[list[int]]
    owner: Tensor  # (passages,) the document of each passage
    labels: Tensor  # (documents,) tokens scored
    choices: list[list[str]] = field(default_factory=list)  # by router: the module chosen for each document
    confidence: Tensor = field(default_factory=lambda: torch.empty(0))  # (documents,) the full router's
    losses: dict[str, Tensor] = field(default_factory=dict)  # by module: (documents,) summed; nan where not scored

    @property
    def base(self) -> Tensor:
        return self.losses[NONE]

    @property
    def own(self) -> Tensor:
        return self.losses[self.name]

    def chosen(self, router: int) -> Tensor:
        """Summed log-loss of each document under the choices of a router, (documents,)."""
        return torch.stack([self.losses[c][d] for d, c in enumerate(self.choices[router])])

    def wanted(self, module: str) -> list[int]:
        """Documents that must be scored under a module."""
        if module in (NONE, self.name):
            return list(range(len(self.labels)))
        return [d for d in range(len(self.labels)) if any(c[d] == module for c in self.choices)]


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
    learned = [m.name for m in _in_order(store) if m.name in data]
    stages = learned if config.matrix and len(learned) > 1 else []
    with Engine(store, memory=memory, router=config.router) as engine:
        domains = [_read(engine, name, documents, config) for name, documents in corpora.items()]
        replayed = (load_router(store, stages[: i + 1], kind=config.router) for i in range(len(stages)))
        routers = [engine.router, *(router.bind(engine.base) for router in replayed)]
        for domain in domains:
            _route(engine, domain, routers, config.route_tokens)
        speed = _score(engine, domains, progress)
        forgetting, forgetting_detail = _forgetting(engine)
        memory_use = _memory(engine)
    draws = Bootstrap([len(d.labels) for d in domains])
    status = store.status()
    return EvalResult(
        store=str(store.path),
        base=store.manifest.base,
        perplexity={d.name: _perplexities(d, draws, i) for i, d in enumerate(domains)},
        forgetting=forgetting,
        forgetting_detail=forgetting_detail,
        matrix=_matrix(domains, stages),
        routing=_routing(domains, draws),
        memory=memory_use,
        compute={
            "base_parameters": status["base_parameters"],
            "active_parameters": status["active_parameters"],
            "total_parameters": status["total_parameters"],
            "tokens_per_second": speed,
        },
    )


def _in_order(store: Store) -> list[StoredModule]:
    """The current modules in the order of learning. An update does not change a module's place: what counts is the
    earliest version that is still there."""

    def learned(module: StoredModule) -> tuple[str, str]:
        folders = module.folder.parent.iterdir()
        for version in sorted(int(f.name) for f in folders if f.name.isdecimal() and int(f.name) < module.version):
            with suppress(GrowlmError):  # incomplete or damaged: `verify` says so
                return store.module(module.name, version).manifest.created, module.name
        return module.manifest.created, module.name

    return sorted(store.modules.values(), key=learned)


def _read(engine: Engine, name: str, documents: Sequence[text_data.Document], config: EvalConfig) -> _Domain:
    chosen_documents = documents[: config.max_documents or None]
    limit = engine.base.max_positions
    length = config.sequence_length if limit is None else min(config.sequence_length, limit)
    found = text_data.passages(chosen_documents, engine.tokenizer, length)
    if not found:
        raise DataError(f"{name}: every document is shorter than two tokens; give more text")
    # Documents too short to score are left out everywhere.
    numbers = {index: at for at, index in enumerate(dict.fromkeys(p.document_index for p in found))}
    owner = torch.tensor([numbers[p.document_index] for p in found])
    scored = torch.tensor([len(p.tokens) - 1 for p in found])
    labels = torch.zeros(len(numbers), dtype=torch.int64).index_add_(0, owner, scored)
    return _Domain(name, [p.tokens for p in found], owner, labels)


def _route(engine: Engine, domain: _Domain, routers: Sequence[Router], tokens: int) -> None:
    """Each router's choice for each document, from the beginning of its first passage."""
    first: dict[int, list[int]] = {}
    for passage, document in zip(domain.passages, domain.owner.tolist(), strict=True):
        first.setdefault(document, list(passage[:tokens]))
    starts = [first[d] for d in range(len(first))]
    order = sorted(range(len(starts)), key=lambda i: len(starts[i]))
    routes: list[list[Route]] = [[Route(None, {NONE: 1.0})] * len(starts) for _ in routers]
    for at in range(0, len(order), 16):
        some = order[at : at + 16]
        states = base_states(engine.base, [starts[i] for i in some])
        for found, router in zip(routes, routers, strict=True):
            for i, route in zip(some, router.route(*states), strict=True):
                found[i] = route
    domain.choices = [names_of(found) for found in routes]
    domain.confidence = torch.tensor([max(r.scores.values(), default=1.0) for r in routes[0]])


def _score(engine: Engine, domains: Sequence[_Domain], progress: bool | None) -> dict[str, float]:
    """Fills in the losses, module by module, so that each is read once. Returns tokens a second, base and modules."""
    modules = [NONE, *dict.fromkeys(m for d in domains for m in (d.name, *(c for cs in d.choices for c in cs)))]
    work = [(m, d, d.wanted(m)) for m in dict.fromkeys(modules) for d in domains]
    work = [(m, d, documents) for m, d, documents in work if documents]
    tokens, seconds = {"base": 0, "module": 0}, {"base": 0.0, "module": 0.0}
    with counting_bar("evaluating", len(work), progress) as report:
        for at, (module, domain, documents) in enumerate(work):
            mine = torch.zeros(len(domain.labels), dtype=torch.bool)
            mine[documents] = True
            which = mine[domain.owner].nonzero()[:, 0]
            with engine.modules.using([] if module == NONE else [module]) as held:
                started = time.perf_counter()
                scored = passage_losses(
                    ModuleSet(engine.base, list(held.values())), [domain.passages[i] for i in which.tolist()]
                )
                side = "base" if module == NONE else "module"
                seconds[side] += time.perf_counter() - started
            tokens[side] += int(domain.labels[mine].sum())
            losses = torch.zeros(len(domain.labels), dtype=torch.float64).index_add_(0, domain.owner[which], scored)
            domain.losses[module] = losses.masked_fill(~mine, math.nan)
            report(at + 1)
    return {side: tokens[side] / seconds[side] for side in tokens if seconds[side] > 0}


def _matrix(domains: Sequence[_Domain], stages: Sequence[str]) -> dict[str, Any] | None:
    if not stages:
        return None
    by_name = {d.name: d for d in domains}
    columns = [by_name[name] for name in stages]

    def loss(domain: _Domain, losses: Tensor) -> float:
        return float(losses.sum() / domain.labels.sum())

    return ForgettingMatrix(
        stages,
        [loss(d, d.base) for d in columns],
        [[loss(d, d.chosen(1 + stage)) for d in columns] for stage in range(len(stages))],
    ).to_json()


def _perplexities(domain: _Domain, draws: Bootstrap, group: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    labels = domain.labels.double()
    sides = {"base": domain.base, "module": domain.own, "routed": domain.chosen(0)}
    sums = {side: draws.sums(group, losses) for side, losses in sides.items()}
    for side, losses in sides.items():
        found[side] = math.exp(min(float(losses.sum() / labels.sum()), 700.0))
        means = sums[side] / draws.sums(group, labels)
        found[f"{side}_interval"] = draws.interval(means.clamp(max=700.0).exp())
    gain = float((domain.base - domain.own).sum())
    kept = float((domain.base - sides["routed"]).sum())
    found["retained_gain"] = kept / gain if gain > 0 else None
    found["tokens"] = int(domain.labels.sum())
    found["documents"] = len(domain.labels)
    return found


def _routing(domains: Sequence[_Domain], draws: Bootstrap) -> dict[str, Any]:
    confusion: dict[str, dict[str, int]] = {}
    for domain in domains:
        row = confusion.setdefault(domain.name, {})
        for choice in domain.choices[0]:
            row[choice] = row.get(choice, 0) + 1
    columns = dict.fromkeys([*confusion, *(c for row in confusion.values() for c in row), NONE])
    confusion = {name: {c: row.get(c, 0) for c in columns} for name, row in confusion.items()}
    right = [torch.tensor([c == d.name for c in d.choices[0]]) for d in domains]
    none = [torch.tensor([c == NONE for c in d.choices[0]]) for d in domains]
    documents = sum(map(len, right))
    gains = [d.base - d.own for d in domains]
    kept = [d.base - d.chosen(0) for d in domains]
    gain = float(sum(g.sum() for g in gains))
    resampled = [sum(draws.sums(i, x) for i, x in enumerate(each)) for each in (right, gains, kept)]
    shares = {
        where: float(torch.cat(some).double().mean())
        for where, some in (
            ("of_no_domain", [n for n, d in zip(none, domains, strict=True) if d.name == NONE]),
            ("of_domains", [n for n, d in zip(none, domains, strict=True) if d.name != NONE]),
        )
        if some
    }
    return {
        "accuracy": sum(int(r.sum()) for r in right) / documents,
        "accuracy_interval": draws.interval(torch.as_tensor(resampled[0]) / documents),
        "confusion": confusion,
        "retained_gain": float(sum(k.sum() for k in kept)) / gain if gain > 0 else None,
        "retained_gain_interval": draws.interval(torch.as_tensor(resampled[2]) / resampled[1]) if gain > 0 else None,
        "none": shares,
        "calibration": calibration(torch.cat([d.confidence for d in domains]), torch.cat(right)),
    }


def _forgetting(engine: Engine) -> tuple[float, dict[str, list[str]]]:
    """Compares what base and modules answer now with what they answered when each module was learned."""
    changed: set[str] = set()
    not_comparable: set[str] = set()
    increases: list[float] = []
    base_now = probe(ModuleSet(engine.base))
    checked: list[str] = []
    for name, stored in engine.store.modules.items():
        record = stored.manifest.training.get("probe")
        if not isinstance(record, dict):
            continue
        checked.append(name)
        with engine.modules.using([name]) as held:
            module_now = probe(ModuleSet(engine.base, [held[name]]))
        for part, now, then in ((name, module_now, record.get("module")), ("base", base_now, record.get("base"))):
            found = then if isinstance(then, dict) else {}
            if "logits" in found and found["logits"] != now["logits"]:
                changed.add(part)
            increase = now["loss"] - found["loss"] if isinstance(found.get("loss"), int | float) else math.nan
            if math.isfinite(increase):
                increases.append(increase)
            else:
                not_comparable.add(part)
    if checked:
        checked.insert(0, "base")
    mean = sum(increases) / len(increases) if increases else 0.0
    return mean, {"checked": checked, "changed": sorted(changed), "not_comparable": sorted(not_comparable)}


def _memory(engine: Engine) -> dict[str, Any]:
    modules = {m.name: m.bytes for m in _in_order(engine.store)}
    return {
        "base_bytes": engine.base_bytes,
        "router_bytes": engine.router.num_bytes(),
        "modules": modules,
        "resident_bytes": engine.fixed_bytes + max(modules.values(), default=0),
        "total_bytes": engine.fixed_bytes + sum(modules.values()),
    }
