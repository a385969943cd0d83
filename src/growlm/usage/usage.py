"""Usage: how often every expert is chosen on a text, and how far domains differ in that (ModuleFormer, figure 2).

Counts what expert routers decide, and what product keys retrieve, while text is read; changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growlm import data as text_data
from growlm.base import Base
from growlm.base.checkpoint import load_model, load_tokenizer, resolve, stored_dtype
from growlm.base.padding import pad_right
from growlm.base.placement import find_device
from growlm.errors import ConfigError, DataError, setting
from growlm.layers.experts import AttentionExperts, SparseFeedForward
from growlm.layers.insertion import AttentionUnion, Beside, FeedForwardUnion
from growlm.layers.routing import watched
from growlm.modules import ModuleSet
from growlm.progress import phase, track
from growlm.store import Store
from growlm.usage.pools import PoolCounter, PoolCounts

_BATCH = 8


@dataclass(frozen=True)
class Place:
    """One expert router: the layer it is in, and which half of it."""

    layer: int
    part: str  # "attention" or "feed_forward"
    num_experts: int
    new: int = 0  # of these the last so many, which modules brought

    @property
    def name(self) -> str:
        return f"layer {self.layer} {self.part.replace('_', '-')}"


@dataclass(frozen=True)
class Usage:
    """How often every expert was chosen: per domain, one tensor (num_experts,) for each place, in counts; and per
    domain what every layer of product keys retrieved, in pools."""

    places: list[Place]
    counts: dict[str, list[Tensor]]
    tokens: dict[str, int]
    sources: dict[str, list[text_data.Source]] = field(default_factory=dict)
    pools: dict[str, list[PoolCounts]] = field(default_factory=dict)

    def share(self, domain: str, place: int) -> Tensor:
        """Of a domain's choices at a place, the share of every expert, (num_experts,); they sum to one."""
        counts = self.counts[domain][place].double()
        return counts / counts.sum().clamp_min(1)

    def divergence(self, one: str, other: str) -> float:
        """KL divergence of the experts' shares in nats, mean over places and pools. An expert that was never chosen
        counts as chosen half a time, so that it is finite."""
        ours, theirs = self._choices(one), self._choices(other)
        total = 0.0
        for p, q in zip(ours, theirs, strict=True):
            p, q = p.double() + 0.5, q.double() + 0.5
            p, q = p / p.sum(), q / q.sum()
            total += float((p * (p / q).log()).sum())
        return total / len(ours)

    def _choices(self, domain: str) -> list[Tensor]:
        return [*self.counts[domain], *(pool.counts for pool in self.pools.get(domain, ()))]

    def lines(self) -> list[str]:
        """A table for people: what was read, how uneven its use of experts is, and how far texts differ."""
        found = []
        for name in self.counts:
            found.append(f"{name}: {self.tokens[name]:,} tokens")
            for i, place in enumerate(self.places):
                share = self.share(name, i)
                top = ", ".join(f"{e} {float(share[e]):.0%}" for e in share.argsort(descending=True)[:4].tolist())
                idle = int((share == 0).sum())
                unused = f"; {idle} of {place.num_experts} never chosen" if idle else ""
                if 0 < place.new < place.num_experts:
                    first = place.num_experts - place.new
                    unused += f"; new from {first} on: {float(share[first:].sum()):.0%}"
                uneven = f"KL from even use {_unevenness(share):.3f} nats"
                found.append(f"  {place.name:<22} {uneven}; experts most used: {top}{unused}")
            found += [f"  {pool.line()}" for pool in self.pools.get(name, ())]
        pairs = list(permutations(self.counts, 2))
        if pairs:
            found.append("KL divergence between texts, nats:")
            found += [f"  {a} from {b}: {self.divergence(a, b):.3f}" for a, b in pairs]
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "places": [{"layer": p.layer, "part": p.part, "experts": p.num_experts, "new": p.new} for p in self.places],
            "tokens": self.tokens,
            "counts": {name: [c.tolist() for c in found] for name, found in self.counts.items()},
            "divergence": {f"{a} from {b}": self.divergence(a, b) for a, b in permutations(self.counts, 2)},
            "unevenness": {
                name: [_unevenness(self.share(name, i)) for i in range(len(self.places))] for name in self.counts
            },
            "pools": {
                name: [
                    {
                        "layer": pool.layer,
                        "experts": pool.num_experts,
                        "share_used": pool.share_used,
                        "unevenness": pool.unevenness,
                        "counts": pool.counts.tolist(),
                    }
                    for pool in pools
                ]
                for name, pools in self.pools.items()
            },
        }


def _unevenness(share: Tensor) -> float:
    """KL divergence from even use, in nats: 0 where all experts are used alike."""
    return float(math.log(len(share)) + torch.xlogy(share, share).sum())


def places_of(modules: ModuleSet) -> list[Place]:
    """The expert routers of base and modules in the order in which a forward pass asks them."""
    anatomy, found = modules.base.anatomy, []
    for index, (layer, *_) in enumerate(modules.layers):
        attention = getattr(getattr(layer, anatomy.attention), "experts", None)
        if isinstance(attention, AttentionExperts | AttentionUnion):
            found.append(Place(index, "attention", *_sizes(attention)))
        feed_forward = getattr(layer, anatomy.feed_forward)
        if isinstance(feed_forward, Beside):
            sizes = [part.router.num_experts for part in feed_forward.new]
            found += [Place(index, "feed_forward", size, size) for size in sizes]
        inner = getattr(feed_forward, "experts", None)
        if isinstance(inner, SparseFeedForward | FeedForwardUnion):
            found.append(Place(index, "feed_forward", *_sizes(inner)))
    return found


def _sizes(layer: AttentionExperts | SparseFeedForward | AttentionUnion | FeedForwardUnion) -> tuple[int, int]:
    if isinstance(layer, AttentionUnion | FeedForwardUnion):
        return layer.num_experts, layer.num_new
    return layer.router.num_experts, 0


def open_modules(
    source: str | Path, names: Sequence[str] = (), *, device: str | torch.device = "auto"
) -> tuple[ModuleSet, Any]:
    """A store's base with some of its modules, or a checkpoint by itself; and the tokenizer.

    Raises:
        ConfigError: modules of a checkpoint were asked for, or there is no such device.
        UnknownModuleError: no such module in the store.
        BaseModelError: neither a store nor a checkpoint.
    """
    found = find_device(device)
    if (Path(source).expanduser() / "store.json").exists():
        store = Store.open(source)
        base = store.load_base(device=found)
        return ModuleSet(base, [store.load(name, base) for name in names]), store.load_tokenizer()
    if names:
        raise ConfigError(f"{source}: is no store; --module {names[0]} is for the modules of one")
    folder = resolve(source)
    model = load_model(folder, stored_dtype(folder)).to(found)
    return ModuleSet(Base(model, str(folder))), load_tokenizer(folder)


@torch.no_grad()
def count_usage(
    modules: ModuleSet,
    tokenizer: Any,
    data: Mapping[str, Sequence[str | Path]],
    *,
    sequence_length: int = 512,
    tokens: int | None = None,
    text_key: str = "text",
    separator: str | None = None,
    format: str = "auto",
) -> Usage:
    """Reads every domain's text and counts.

    Args:
        data: paths of text by domain, or of conversations, which are read whole as the chat template writes them.
        format: of records, as `LearnConfig` takes it.
        tokens: of each domain at most.

    Raises:
        ConfigError: nothing has routed experts, or experts found by product keys; or a length that holds no prediction.
        DataError: text that is missing, malformed or shorter than two tokens.
    """
    if sequence_length < 2:
        raise ConfigError(f"{setting('sequence_length')} is {sequence_length}; it must be at least 2")
    places = places_of(modules)
    if not places and not PoolCounter(modules):
        what = ", ".join(f"a module of kind {m.kind}" for m in modules.modules) or "the model"
        raise ConfigError(
            f"{what} has no routed experts to count; give a growlm model with experts, or of a store a module of kind "
            "experts or peer (--module)"
        )
    counts: dict[str, list[Tensor]] = {}
    pools: dict[str, list[PoolCounts]] = {}
    read: dict[str, int] = {}
    sources: dict[str, list[text_data.Source]] = {}
    for domain, paths in data.items():
        corpus = text_data.read(paths, text_key=text_key, separator=separator, format=format)
        documents, sources[domain] = corpus.documents, corpus.sources
        passages = _first(documents, tokenizer, sequence_length, tokens)
        if not passages:
            raise DataError(f"{', '.join(map(str, paths))}: text shorter than two tokens; give more text")
        modules.base.require_rows([t for p in passages for t in p], ", ".join(map(str, paths)), tokenizer)
        counts[domain] = [torch.zeros(p.num_experts, dtype=torch.int64) for p in places]
        read[domain] = sum(map(len, passages))
        counter = PoolCounter(modules)
        for start in track(range(0, len(passages), _BATCH), f"counting use of experts in {domain}", "batches"):
            ids, real = pad_right(passages[start : start + _BATCH])
            real = real.flatten()
            with watched() as routings, counter.counting(real):
                modules.hidden(ids.to(modules.base.device))
            assert len(routings) == len(places)
            for count, routing in zip(counts[domain], routings, strict=True):
                count += torch.bincount(routing.experts.cpu()[real].flatten(), minlength=len(count))
        pools[domain] = counter.pools
    return Usage(places, counts, read, sources, pools)


def _first(
    documents: Sequence[text_data.Document], tokenizer: Any, sequence_length: int, tokens: int | None
) -> list[list[int]]:
    """Passages of at most `tokens` in all, document by document; all of them for None."""
    if tokens is None:
        return [p.tokens for p in text_data.passages(documents, tokenizer, sequence_length)]
    found: list[list[int]] = []
    with phase("tokenizing", tokens, "tokens") as tokenizing:
        for document in documents:
            for passage in text_data.passages([document], tokenizer, sequence_length):
                found.append(passage.tokens[:tokens])
                tokens -= len(found[-1])
                tokenizing.advance(len(found[-1]))
                if tokens < 2:
                    return found
    return found
