"""Pruning of a store's module: the same module without those of its experts that a text uses least.

Usage is counted with the module active beside the base; only the module's own experts go, and the base is not touched.
What goes of a module is its kind's own: experts one by one here, sub-keys with theirs in `pool_pruning.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from growlm import router
from growlm.base import Base
from growlm.base.placement import find_device
from growlm.disk.files import checkpoint_folder, refuse_existing
from growlm.errors import ConfigError, IntegrityError
from growlm.layers.experts import SparseFeedForward, per_expert
from growlm.layers.insertion import NewExperts
from growlm.modules import KnowledgeModule, ModuleSet
from growlm.modules.experts import Experts
from growlm.modules.peer import Peer
from growlm.modules.probe import probe
from growlm.router.samples import GENERAL_SAMPLES
from growlm.store import GENERAL, Store, StoredModule
from growlm.surgery.choosing import Candidates, check_share, choose
from growlm.surgery.pool_pruning import prune_pools
from growlm.training.corpus import evidence_beside
from growlm.usage.usage import Place, Usage, count_usage


def prune_module(
    store: Store,
    name: str | None,
    data: Sequence[str | Path],
    *,
    keep: float,
    normalise: str = "max",
    out: str | Path | None = None,
    tokens: int | None = None,
    separator: str | None = None,
    text_key: str = "text",
    format: str = "auto",
    device: str | torch.device = "auto",
) -> dict[str, Any]:
    """Saves a module without its least used experts on a text, and returns what was kept.

    It becomes the module's next version, with the old one beside it, or the only module of a new store. What the router
    knows of the domain stays as it is.

    Args:
        name: a module of kind experts or peer.
        data: text of the domain.
        keep: share of the module's parameters that stays. At least so many of its experts stay in every layer: as a
            token uses where they stand beside a dense feed-forward or are found by product keys, one where they joined
            others.
        normalise: as `prune` of a model; where the module's experts joined others, all that the router chose count.
        out: folder of the new store; None for the next version in this one.
        tokens: of the text at most.
        device: where the text is read.

    Raises:
        UnknownModuleError: no such module.
        ConfigError: no module is named, it is of another kind, a share that would empty a layer, or no such device.
        StoreError: `out` exists, the module changed meanwhile, or the disk is full.
    """
    check_share(keep, normalise)
    found = find_device(device)
    out = None if out is None else Path(out).expanduser()
    if out is not None:
        refuse_existing(out)
    stored, pruner = _prunable(store, name)
    base = store.load_base(device=found)
    module = store.load(stored.name, base, version=stored.version)
    alone, whole = ModuleSet(base), ModuleSet(base, [module])
    tokenizer = store.load_tokenizer()
    usage = count_usage(
        whole, tokenizer, {"text": data}, tokens=tokens, separator=separator, text_key=text_key, format=format
    )
    try:
        smaller, experts = pruner(base, module, usage, keep=keep, normalise=normalise)
    except ConfigError as error:
        raise ConfigError(f"{store.path}: module {stored.name!r}: {error}") from None
    before, after = module.num_parameters(), smaller.num_parameters()
    said = stored.manifest.training
    pruned = {
        "version": stored.version,
        "keep": keep,
        "normalise": normalise,
        "sources": [asdict(s) for s in usage.sources["text"]],
        "tokens": usage.tokens["text"],
        "parameters_before": before,
        "experts": experts,
    }
    training = {
        **said,
        **_growth(stored, smaller),
        "pruned": [*said.get("pruned", []), pruned],
        "probe": {"base": probe(alone), "module": probe(ModuleSet(base, [smaller]))},
    }
    files = evidence_beside(stored)
    if out is None:
        saved = router.commit_and_route(
            store, stored.name, smaller, training, files, stored, made_from=stored.version, evidence_of=stored
        )
    else:
        with checkpoint_folder(out, smaller.num_bytes()) as work:
            saved = _store_beside(store, work).commit(stored.name, smaller, training, files, evidence_of=stored)
    return {
        "path": str(store.path if out is None else out),
        "module": stored.name,
        "version": saved.version,
        "parameters_before": before,
        "parameters": after,
        "kept": after / before,
        "experts": experts,
    }


def prune_experts(
    base: Base, module: Experts, usage: Usage, *, keep: float, normalise: str
) -> tuple[Experts, list[dict[str, Any]]]:
    """A module without its least used experts, and at every place which of them it kept.

    Raises:
        ConfigError: none was ever opened, or a share that cannot be reached.
    """
    if not any(place.new for place in usage.places):
        raise ConfigError("its experts are untrained, so that none is used; run growlm learn")
    places, kept = choose_module_experts(module, usage, "text", keep=keep, normalise=normalise)
    experts = [{"place": p.name, "kept": k, "of": p.new} for p, k in zip(places, kept, strict=True)]
    return without_module_experts(base, module, places, kept), experts


# How a module of a kind becomes smaller: from the base, the module and its usage, what is left and what that is.
_PRUNERS: dict[str, Callable[..., tuple[KnowledgeModule, list[dict[str, Any]]]]] = {
    Experts.kind: prune_experts,
    Peer.kind: prune_pools,
}


def choose_module_experts(
    module: Experts, usage: Usage, domain: str, *, keep: float, normalise: str
) -> tuple[list[Place], list[list[int]]]:
    """Where a module has experts, and which of them stay, ascending and counted from its own first.

    Args:
        usage: counted with this module alone active.

    Raises:
        ConfigError: a share that cannot be reached.
    """
    places, routers = [], []
    for place, counts in zip(usage.places, usage.counts[domain], strict=True):
        if not place.new:
            continue
        part = _part(module, place)
        size = sum(tensor[0].numel() for tensor in _per_expert(part).values())
        least = part.router.top_k if isinstance(part, SparseFeedForward) else 1
        places.append(place)
        routers.append(Candidates(counts, len(counts) - place.new, size, min(least, place.new)))
    return places, choose(routers, total=module.num_parameters(), keep=keep, normalise=normalise)


def without_module_experts(
    base: Base, module: Experts, places: Sequence[Place], kept: Sequence[Sequence[int]]
) -> Experts:
    """The module with the experts `kept` at each place, and everything else of it as it is."""
    first = module.config.first_layer
    numbers = {part: [_size(getattr(layer, part)) for layer in module.layers] for part in ("attention", "feed_forward")}
    tensors = dict(module.state_dict())
    for place, experts in zip(places, kept, strict=True):
        numbers[place.part][place.layer - first] = len(experts)
        rows = torch.tensor(experts, device=base.device)
        for name, tensor in _per_expert(_part(module, place)).items():
            tensors[f"layers.{place.layer - first}.{place.part}.{name}"] = tensor.detach()[rows]
    config = module.config
    if any(len(k) < p.new for p, k in zip(places, kept, strict=True)):
        changes = {"num_experts": tuple(numbers["feed_forward"]), "num_attention_experts": tuple(numbers["attention"])}
        config = config.model_copy(update=changes)
    return Experts.restore(base, config, tensors, "the pruned module")


def _part(module: Experts, place: Place) -> NewExperts | SparseFeedForward:
    part = getattr(module.layers[place.layer - module.config.first_layer], place.part)
    assert isinstance(part, NewExperts | SparseFeedForward)
    return part


def _size(part: NewExperts | SparseFeedForward | None) -> int:
    return 0 if part is None else len(next(iter(_per_expert(part).values())))


def _per_expert(part: NewExperts | SparseFeedForward) -> dict[str, torch.Tensor]:
    """Tensors that have one row an expert: both linear maps, and what the router compares tokens with."""
    if isinstance(part, NewExperts):
        return {"embeddings": part.embeddings, "first.weight": part.first.weight, "second.weight": part.second.weight}
    return dict(per_expert(part))


def _growth(stored: StoredModule, smaller: KnowledgeModule) -> dict[str, Any]:
    """The record of a module's steps of growth, with the experts that are left of each."""
    said = stored.manifest.training.get("growth")
    if not isinstance(smaller, Peer) or said is None:
        return {}
    b = smaller.config.sub_keys[1]
    left = [[before * b, after * b] for before, after in pairwise(smaller.config.steps)]
    if len(said) != len(left):
        raise IntegrityError(f"{stored.folder}: its manifest does not say how its pools have grown; restore it")
    return {"growth": [{**step, "experts": numbers} for step, numbers in zip(said, left, strict=True)]}


def _prunable(
    store: Store, name: str | None
) -> tuple[StoredModule, Callable[..., tuple[KnowledgeModule, list[dict[str, Any]]]]]:
    kinds = " or ".join(_PRUNERS)
    if name is None:
        known = [m.name for m, kind in store.read_each(lambda m: m.kind) if kind in _PRUNERS]
        raise ConfigError(
            f"{store.path}: is a store, whose base stays as it is; name a module of kind {kinds} with --module: "
            f"{', '.join(known) or 'it has none yet'}"
        )
    stored = store.module(name)
    if stored.kind not in _PRUNERS:
        raise ConfigError(
            f"{store.path}: module {stored.name!r} is of kind {stored.kind}; only modules of kind {kinds} can be pruned"
        )
    return stored, _PRUNERS[stored.kind]


def _store_beside(store: Store, folder: Path) -> Store:
    """A new store for the same base, with what the router knows of text that is none of the modules'."""
    made = store.beside(folder)
    with made.lock():
        for name in (GENERAL, GENERAL_SAMPLES):
            if (tensors := store.router_files(name).read()) is not None:
                made.router_files(name).write(tensors)
    return made
