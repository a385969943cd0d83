"""Measure: perplexity by domain of base, own module and routed choice; routing; forgetting; memory and compute.

Knows documents, losses and routes. Draws nothing: see `report.py`.
"""

from __future__ import annotations

import itertools
import json
import math
import time
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
from growlm.engine.second_look import SecondLooks
from growlm.errors import ConfigError, DataError
from growlm.evaluation.beginnings import Beginnings
from growlm.evaluation.config import EvalConfig
from growlm.evaluation.continual import ForgettingMatrix
from growlm.evaluation.forgetting import forgetting
from growlm.evaluation.replay import earlier_stages, in_order, routers
from growlm.evaluation.statistics import Bootstrap, calibration
from growlm.modules import ModuleSet
from growlm.modules.scoring import passage_losses
from growlm.progress import phase, reporting
from growlm.router import NONE, Route, names_of
from growlm.store import Store, StoredModule

_STATES = 512_000_000  # bytes of the base's states that are kept from one router of the replay to the next


@dataclass(frozen=True)
class EvalResult:
    """What was measured; `to_json` gives the fields in the form of `growlm eval --json`. A module that diverged has
    losses that are no numbers: nan here, null there.

    Attributes:
        perplexity: by domain: base, module (its own), routed, each with its interval over documents, the retained gain,
            and how many tokens and documents they are over.
        forgetting: largest increase of log-loss, in nats a token, of the base and of every module since it was
            learned, among those that changed, on a fixed text; exactly 0 where not a bit of the logits has changed;
            None where no module could be compared.
        forgetting_detail: what was `checked`; what has `changed` in any bit; what is `not_comparable` and so not in
            the number, because its loss was no number then or is none now.
        matrix: routed perplexity on every domain after each domain that was learned, in the order of learning, with
            average forgetting, backward and forward transfer; which modules were `updated` since, as every row is of
            the modules' present versions. None where fewer than two domains were measured.
        routing: accuracy, confusion (true domain -> chosen -> documents), retained gain: the share of the improvement
            of each domain's own module that automatic routing keeps (summed log-loss, over the domains' documents);
            `none_cost`: what routing costs text of no domain, in nats a token; intervals of the three; calibration;
            the share of *none* on text of no domain and on the domains' text.
        memory: bytes of base, router and modules; resident with the largest module, and in total.
        compute: parameters of base, active and in total; tokens a second while scoring.
        settings: that it was measured with, as `EvalConfig` has them; of the router, the kind that chose.
    """

    store: str
    base: str
    perplexity: dict[str, dict[str, Any]]
    forgetting: float | None
    forgetting_detail: dict[str, list[str]]
    matrix: dict[str, Any] | None
    routing: dict[str, Any]
    memory: dict[str, Any]
    compute: dict[str, Any]
    settings: dict[str, Any]
    growlm: str = __version__
    date: str = field(default_factory=lambda: date.today().isoformat())

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)), parse_constant=lambda name: None)


@dataclass
class _Domain:
    """One domain's held-out text, what each router chose for it, and what each module made of it."""

    name: str
    passages: list[list[int]]
    counted: list[list[bool]] | None  # which of their tokens are scored; None for all
    owner: Tensor  # (passages,) the document of each passage
    labels: Tensor  # (documents,) tokens scored
    beginnings: list[list[int]]  # of each document, as far as the router sees it
    choices: list[list[str]] = field(default_factory=list)  # by router, the store's first: each document's module
    routed: list[str] = field(default_factory=list)  # each document's module by the full router, before a second look
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
        progress: False is silent; by default there are bars on stderr, or where it is no terminal, lines, one in ten
            seconds at most.

    Raises:
        UnknownModuleError: a domain that is no module.
        DataError: data that is missing, malformed or too short.
        BudgetError: what is measured does not fit `memory`.
        ConfigError, StoreError: a router that was not trained for any of the modules, or no such device.
    """
    with reporting(store.path.name or store.path.resolve().name, progress):
        return _evaluate(store, data, config or EvalConfig(), memory)


def _evaluate(
    store: Store, data: Mapping[str, Sequence[str | Path]], config: EvalConfig, memory: str | int | None
) -> EvalResult:
    if not data:
        raise DataError("no evaluation data; give some as domain=path, e.g. medicine=heldout.txt")
    for name in data:
        if name != NONE:
            store.module(name)
    corpora = {name: text_data.read(paths, **config.reading).documents for name, paths in data.items()}
    _require_different(corpora)
    order = in_order(store)
    learned = [m.name for m in order if m.name in data]
    replayed = config.matrix and len(learned) > 1
    stages = earlier_stages([m.name for m in order], learned) if replayed else []
    with Engine(
        store,
        memory=memory,
        device=config.device,
        router=config.router,
        experts_on=config.experts_on,
        row_cache=config.row_cache,
    ) as engine:
        _check_router(engine)
        domains = [_read(engine, name, documents, config) for name, documents in corpora.items()]
        _route(engine, domains, stages, config.second_look)
        speed = _score(engine, domains)
        largest_increase, forgetting_detail = forgetting(engine)
        memory_use = _memory(engine, order)
    draws = Bootstrap([len(d.labels) for d in domains])
    with phase("drawing intervals"):
        perplexity = {d.name: _perplexities(d, draws, i) for i, d in enumerate(domains)}
        routing = _routing(domains, draws)
    status = store.status()
    return EvalResult(
        store=str(store.path),
        base=store.manifest.base,
        perplexity=perplexity,
        forgetting=largest_increase,
        forgetting_detail=forgetting_detail,
        matrix=_matrix(domains, order) if replayed else None,
        routing=routing,
        memory=memory_use,
        compute={
            "base_parameters": status["base_parameters"],
            "active_parameters": status["active_parameters"],
            "total_parameters": status["total_parameters"],
            "tokens_per_second": speed,
        },
        settings=asdict(config) | {"router": config.router or store.manifest.router},
    )


def _require_different(corpora: Mapping[str, Sequence[text_data.Document]]) -> None:
    """No domain has the text that belongs to none: what is right of one would be wrong of the other. Two modules may
    have one text, to be compared, whatever routing then counts."""
    none = [d.text for d in corpora.get(NONE, ())]
    for name, documents in corpora.items():
        if name != NONE and none and none == [d.text for d in documents]:
            raise DataError(
                f"{name} and {NONE} are given the same text, which cannot belong to both; give each its own"
            )


def _check_router(engine: Engine) -> None:
    """A trained router that knows no module sends every text to the base: that says nothing of how well it chooses."""
    if engine.router.kind == "transformer" and not engine.router.names and engine.store.modules:
        path = engine.store.path
        raise ConfigError(
            f"{path}: its transformer router was trained for none of its modules; train one with "
            f"`growlm router {path} --kind transformer`, or give --router gaussian"
        )


def _read(engine: Engine, name: str, documents: Sequence[text_data.Document], config: EvalConfig) -> _Domain:
    chosen_documents = documents[: config.max_documents or None]
    limit = engine.base.max_positions
    length = config.sequence_length if limit is None else min(config.sequence_length, limit)
    found = text_data.passages(chosen_documents, engine.tokenizer, length)
    if config.tokens is not None:
        # The passage that reaches the number is the last.
        before = itertools.accumulate((len(p.tokens) for p in found), initial=0)
        found = [p for p, seen_before in zip(found, before, strict=False) if seen_before < int(config.tokens)]
    if not found:
        what = "has no answer within a row" if any(d.turns for d in chosen_documents) else "is shorter than two tokens"
        raise DataError(f"{name}: every document {what}; give more text")
    engine.base.require_rows([t for p in found for t in p.tokens], name, engine.tokenizer)
    # Documents too short to score are left out everywhere.
    numbers = {index: at for at, index in enumerate(dict.fromkeys(p.document_index for p in found))}
    owner = torch.tensor([numbers[p.document_index] for p in found])
    scored = torch.tensor([p.num_scored for p in found])
    labels = torch.zeros(len(numbers), dtype=torch.int64).index_add_(0, owner, scored)
    seen = config.route_tokens if limit is None else min(config.route_tokens, limit)
    begin = len(text_data.start_tokens(engine.tokenizer))
    beginnings: list[list[int]] = [[] for _ in numbers]
    for passage, document in zip(found, owner.tolist(), strict=True):
        start = beginnings[document]
        more = passage.tokens[begin if start else 0 :]  # what the router sees may be longer than what is scored at once
        start += more[: seen - len(start)]
    for index, at in numbers.items():
        asked = text_data.asked(chosen_documents[index].turns)
        if asked.strip():
            (ids,) = text_data.encode_texts(engine.tokenizer, [asked])
            beginnings[at] = [*text_data.start_tokens(engine.tokenizer), *ids][:seen]
    return _Domain(name, [p.tokens for p in found], text_data.masks_of(found), owner, labels, beginnings)


def _route(engine: Engine, domains: Sequence[_Domain], stages: Sequence[Sequence[str]], second_look: bool) -> None:
    """Fills in the choices of the store's router, and of the router of each stage."""
    looks = SecondLooks(engine)

    def chosen(domain: _Domain, routes: Sequence[Route]) -> list[str]:
        names = names_of(routes)
        if second_look:
            looked = looks.kept([None if name == NONE else name for name in names], domain.beginnings)
            names = [name or NONE for name in looked]
        return names

    room = _STATES // len(domains) if stages else 0
    texts = [Beginnings(engine.base, domain.beginnings, room) for domain in domains]
    documents = sum(len(domain.beginnings) for domain in domains)
    with phase("routing", documents, "documents"):
        for domain, beginnings in zip(domains, texts, strict=True):
            routes = beginnings.routes(engine.router)
            domain.choices.append(chosen(domain, routes))
            domain.routed = names_of(routes)
            domain.confidence = torch.tensor([max(r.scores.values(), default=1.0) for r in routes])
    if not stages:
        return
    with phase("replaying the order of learning", documents * len(stages), "documents"):
        for router in routers(engine, stages):
            found = [beginnings.routes(router) for beginnings in texts]
            del router  # before the next one is read, and before a module is that it may have chosen
            for domain, routes in zip(domains, found, strict=True):
                domain.choices.append(chosen(domain, routes))


def _score(engine: Engine, domains: Sequence[_Domain]) -> dict[str, float]:
    """Fills in the losses, module by module, so that each is read once. Returns tokens a second, base and modules."""
    modules = [NONE, *dict.fromkeys(m for d in domains for m in (d.name, *(c for cs in d.choices for c in cs)))]
    work = [(m, d, d.wanted(m)) for m in dict.fromkeys(modules) for d in domains]
    work = [(m, d, documents) for m, d, documents in work if documents]
    tokens, seconds = {"base": 0, "module": 0}, {"base": 0.0, "module": 0.0}
    owners = [int(torch.isin(d.owner, torch.tensor(documents)).sum()) for _, d, documents in work]
    with phase("scoring", sum(owners), "passages"):
        for module, domain, documents in work:
            mine = torch.zeros(len(domain.labels), dtype=torch.bool)
            mine[documents] = True
            which = mine[domain.owner].nonzero()[:, 0]
            with engine.modules.using([] if module == NONE else [module]) as held:
                started = time.perf_counter()
                chosen = which.tolist()
                scored = passage_losses(
                    ModuleSet(engine.base, list(held.values())),
                    [domain.passages[i] for i in chosen],
                    counted=None if domain.counted is None else [domain.counted[i] for i in chosen],
                )
                side = "base" if module == NONE else "module"
                seconds[side] += time.perf_counter() - started
            tokens[side] += int(domain.labels[mine].sum())
            losses = torch.zeros(len(domain.labels), dtype=torch.float64).index_add_(0, domain.owner[which], scored)
            domain.losses[module] = losses.masked_fill(~mine, math.nan)
    return {side: tokens[side] / seconds[side] for side in tokens if seconds[side] > 0}


def _matrix(domains: Sequence[_Domain], order: Sequence[StoredModule]) -> dict[str, Any]:
    by_name = {d.name: d for d in domains}
    columns = [by_name[m.name] for m in order if m.name in by_name]

    def loss(domain: _Domain, losses: Tensor) -> float:
        return float(losses.sum() / domain.labels.sum())

    # The last row is of the store as it is, whose router was the first to choose.
    rows = [*range(1, len(columns[0].choices)), 0]
    matrix = ForgettingMatrix(
        [d.name for d in columns],
        [loss(d, d.base) for d in columns],
        [[loss(d, d.chosen(row)) for d in columns] for row in rows],
    )
    return {**matrix.to_json(), "updated": [m.name for m in order if m.version > 1]}


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
    accuracy = torch.stack([draws.sums(i, r) for i, r in enumerate(right)]).sum(0) / documents
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
        "accuracy_interval": draws.interval(accuracy),
        "confusion": confusion,
        **_retained(domains, draws),
        **_none_cost(domains, draws),
        "none": shares,
        "calibration": calibration(
            torch.cat([d.confidence for d in domains]), torch.tensor([c == d.name for d in domains for c in d.routed])
        ),
    }


def _retained(domains: Sequence[_Domain], draws: Bootstrap) -> dict[str, Any]:
    """Of the domains alone: text of none has no module's gain to keep, and how much of it there is would move the
    share."""
    groups = [(i, d) for i, d in enumerate(domains) if d.name != NONE]
    gain = sum(float((d.base - d.own).sum()) for _, d in groups)
    if not gain > 0:
        return {"retained_gain": None, "retained_gain_interval": None}
    kept = sum(float((d.base - d.chosen(0)).sum()) for _, d in groups)
    gains = torch.stack([draws.sums(i, d.base - d.own) for i, d in groups]).sum(0)
    keeps = torch.stack([draws.sums(i, d.base - d.chosen(0)) for i, d in groups]).sum(0)
    return {"retained_gain": kept / gain, "retained_gain_interval": draws.interval(keeps / gains)}


def _none_cost(domains: Sequence[_Domain], draws: Bootstrap) -> dict[str, Any]:
    """What wrong choices cost text of no domain, in nats a token."""
    for i, domain in enumerate(domains):
        if domain.name == NONE:
            lost = domain.chosen(0) - domain.base
            interval = draws.interval(draws.sums(i, lost) / draws.sums(i, domain.labels))
            return {"none_cost": float(lost.sum() / domain.labels.sum()), "none_cost_interval": interval}
    return {"none_cost": None, "none_cost_interval": None}


def _memory(engine: Engine, order: Sequence[StoredModule]) -> dict[str, Any]:
    modules = {m.name: m.bytes for m in order}
    return {
        "base_bytes": engine.base_bytes,
        "router_bytes": engine.router.num_bytes(),
        "modules": modules,
        "resident_bytes": engine.fixed_bytes + max(modules.values(), default=0),
        "total_bytes": engine.fixed_bytes + sum(modules.values()),
    }
