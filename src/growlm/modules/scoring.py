"""Scoring: the log-loss of passages under a module set. Knows token ids; not what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from growlm.base.padding import pad_right
from growlm.layers.cross_entropy import token_losses
from growlm.modules.module_set import ModuleSet
from growlm.progress import track
from growlm.recall.contexts import Contexts

_BATCH_TOKENS = 4096
_PROJECTED = 512  # tokens whose logits are held at a time


def passage_losses(
    modules: ModuleSet,
    passages: Sequence[Sequence[int]],
    *,
    counted: Sequence[Sequence[bool]] | None = None,
    per_token: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Summed log-loss in nats of each passage's tokens but the first, float64 (number of passages,).

    Args:
        passages: token ids, at least two each.
        counted: of each passage's tokens, whether its loss counts; by default all do.
        per_token: called with labels (n,) and their losses (n,) as they are computed.
    """
    return paired_losses([modules], passages, counted=counted, per_token=per_token)[0]


@torch.no_grad()
def paired_losses(
    sets: Sequence[ModuleSet],
    passages: Sequence[Sequence[int]],
    *,
    counted: Sequence[Sequence[bool]] | None = None,
    per_token: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """As `passage_losses`, under several module sets of one base, (sets, number of passages): the layers below the
    lowest of their forks run once for all."""
    base = sets[0].base
    fork = min(modules.fork for modules in sets) if len(sets) > 1 else 0
    order = sorted(range(len(passages)), key=lambda i: len(passages[i]))
    totals = torch.zeros(len(sets), len(passages), dtype=torch.float64)
    batches = _batches([len(passages[i]) for i in order])
    for batch in track(batches, "scoring", "passages", total=len(passages), count=len):
        chosen = [order[i] for i in batch]
        ids, real = pad_right([passages[i] for i in chosen], base.device)
        scored = real[:, 1:]
        if counted is not None:
            scored = scored & pad_right([[int(c) for c in counted[i]] for i in chosen], base.device)[0][:, 1:].bool()
        labels = ids[:, 1:][scored]
        inputs = ids[:, :-1]
        embedded, shared = base.begin(inputs)
        if fork > 0:
            embedded = base.run(base.embed_positions(embedded, shared.positions), sets[0].layers[:fork], shared)
        for row, modules in enumerate(sets):
            hidden = embedded
            if fork == 0:
                hidden = base.embed_positions(modules.embed(embedded, inputs), shared.positions)
            hidden = base.run(hidden, modules.layers[fork:], shared)
            contexts = modules.contexts(inputs, inputs.shape[1])
            losses = label_losses(modules, hidden[scored], labels, contexts if contexts is None else contexts[scored])
            if per_token is not None:
                per_token(labels, losses)
            parts = losses.cpu().double().split(scored.sum(-1).tolist())  # not every device has float64
            totals[row, chosen] = torch.stack([part.sum() for part in parts])
    return totals


@torch.no_grad()
def label_losses(
    modules: ModuleSet, hidden: torch.Tensor, labels: torch.Tensor, contexts: Contexts | None
) -> torch.Tensor:
    """Log-losses of labels (n,) in nats, (n,) float32, from the last layer's output (n, d) and, where the modules ask
    for them, contexts (n,)."""
    if contexts is not None:
        losses = [labels.new_empty(0, dtype=torch.float32)]
        for at in range(0, len(labels), _PROJECTED):
            part = slice(at, at + _PROJECTED)
            logits = modules.project(hidden[part], contexts[part]).float()
            losses.append(torch.nn.functional.cross_entropy(logits, labels[part], reduction="none"))
        return torch.cat(losses)
    base, own = modules.base, modules.rows.head
    return token_losses(
        base.norm(hidden),
        base.head_weight,
        labels,
        rows=None if own is None else own.rows,
        ids=None if own is None else own.ids,
        softcap=base.softcap,
    )


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places in a list of ascending lengths, in runs whose padded size stays within bounds."""
    batch: list[int] = []
    for place, length in enumerate(lengths):
        if batch and length * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def num_labels(passages: Sequence[Sequence[int]], counted: Sequence[Sequence[bool]] | None = None) -> int:
    """Tokens that `passage_losses` scores."""
    return sum(len(p) - 1 for p in passages) if counted is None else sum(sum(c[1:]) for c in counted)


@torch.no_grad()
def continuation_scores(
    modules: ModuleSet,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> list[tuple[float, bool]]:
    """Of each (context, continuation), at least one token each: the continuation's log-probability in nats, and whether
    greedy decoding would have written it."""
    base = modules.base
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    batches = _batches([len(pairs[i][0]) + len(pairs[i][1]) for i in order])
    for batch in track(batches, "scoring", "texts", total=len(pairs), count=len):
        some = [order[i] for i in batch]
        ids, real = pad_right([[*pairs[i][0], *pairs[i][1]] for i in some])
        contexts = torch.tensor([len(pairs[i][0]) for i in some])
        scored = real & (torch.arange(ids.shape[1]) >= contexts[:, None])
        ids, scored = ids.to(base.device), scored[:, 1:].to(base.device)
        hidden, labels = modules.hidden(ids[:, :-1])[scored], ids[:, 1:][scored]
        before = modules.contexts(ids[:, :-1], ids.shape[1] - 1)
        found, greedy = [], []
        for at in range(0, len(labels), _PROJECTED):
            part, wanted = slice(at, at + _PROJECTED), labels[at : at + _PROJECTED]
            logits = modules.project(hidden[part], None if before is None else before[scored][part]).float()
            found.append(logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0])
            greedy.append(logits.argmax(-1) == wanted)
        sizes = scored.sum(-1).tolist()
        each = zip(some, torch.cat(found).cpu().double().split(sizes), torch.cat(greedy).split(sizes), strict=True)
        for i, values, right in each:
            scores[i] = (float(values.sum()), bool(right.all()))
    return scores
