"""Answering: how likely each of several answers is after one context, which is computed once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from growlm.base.cache import KVCache
from growlm.base.padding import pad_right
from growlm.modules import ModuleSet


@dataclass(frozen=True)
class Answered:
    """
    Attributes:
        scores: log-probabilities of the answers in nats.
        written: for each, whether greedy decoding would have written it.
    """

    scores: list[float]
    written: list[bool]


@torch.no_grad()
def answered(modules: ModuleSet, context: Sequence[int], answers: Sequence[Sequence[int]]) -> Answered:
    """What `growlm.modules.scoring.continuation_scores` finds for one context of at least two tokens, and answers."""
    past = len(context) - 1
    cache = KVCache(modules.cache_slots)
    _run(modules, torch.tensor([list(context[:-1])]), 0, cache)
    ids, real = pad_right([[context[-1], *answer] for answer in answers])
    hidden = _run(modules, ids[:, :-1], past, cache.select(torch.zeros(len(answers), dtype=torch.long)))
    scored, labels = real[:, 1:], ids[:, 1:]
    before = torch.tensor(list(context[:-1])).expand(len(answers), -1)
    contexts = modules.contexts(torch.cat([before, ids[:, :-1]], dim=1), ids.shape[1] - 1)
    logits = modules.project(hidden[scored], None if contexts is None else contexts[scored]).float()
    found = logits.log_softmax(-1).gather(-1, labels[scored][:, None])[:, 0].double()
    right = logits.argmax(-1) == labels[scored]
    sizes = scored.sum(-1).tolist()
    return Answered(
        [float(part.sum()) for part in found.split(sizes)], [bool(part.all()) for part in right.split(sizes)]
    )


def _run(modules: ModuleSet, ids: torch.Tensor, past: int, cache: KVCache) -> torch.Tensor:
    """The last layer's output (b, t, d) of ids (b, t) after `past` tokens in the cache, which grows by them."""
    base = modules.base
    hidden, shared = base.begin(ids, past=past, cache=cache)
    return base.run(base.embed_positions(modules.embed(hidden, ids), shared.positions), modules.layers, shared)
