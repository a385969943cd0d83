"""Scoring: the log-loss of passages under a module set. Knows token ids; not what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from growlm.layers.cross_entropy import token_losses
from growlm.modules import ModuleSet

_BATCH_TOKENS = 4096


@torch.no_grad()
def passage_losses(
    modules: ModuleSet,
    passages: Sequence[Sequence[int]],
    *,
    per_token: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Summed log-loss in nats of each passage's tokens but the first, float64 (number of passages,).

    Args:
        passages: token ids, at least two each.
        per_token: called with labels (n,) and their losses (n,) as they are computed.
        progress: called with the number of passages done.
    """
    base = modules.base
    order = sorted(range(len(passages)), key=lambda i: len(passages[i]))
    totals = torch.zeros(len(passages), dtype=torch.float64)
    at = 0
    while at < len(order):
        longest = len(passages[order[at]])
        chosen = [order[at]]
        # Grow the batch while its padded size stays within bounds; texts are sorted, so padding is small.
        for i in order[at + 1 :]:
            longest = max(longest, len(passages[i]))
            if longest * (len(chosen) + 1) > _BATCH_TOKENS:
                break
            chosen.append(i)
        at += len(chosen)
        longest = max(len(passages[i]) for i in chosen)
        # Padding on the right needs no mask: attention is causal, and padded positions are not counted.
        rows = torch.zeros(len(chosen), longest, dtype=torch.long)
        counted = torch.zeros(len(chosen), longest - 1, dtype=torch.bool)
        for row, i in enumerate(chosen):
            rows[row, : len(passages[i])] = torch.tensor(passages[i], dtype=torch.long)
            counted[row, : len(passages[i]) - 1] = True
        rows, counted = rows.to(base.device), counted.to(base.device)
        hidden = base.norm(modules.hidden(rows[:, :-1]))
        labels = rows[:, 1:][counted]
        own = modules.rows.head
        losses = token_losses(
            hidden[counted],
            base.head_weight,
            labels,
            rows=None if own is None else own.rows,
            ids=None if own is None else own.ids,
            softcap=base.softcap,
        )
        if per_token is not None:
            per_token(labels, losses)
        totals[chosen] = torch.stack([part.double().sum() for part in losses.split(counted.sum(-1).tolist())]).cpu()
        if progress is not None:
            progress(at)
    return totals


def num_labels(passages: Sequence[Sequence[int]]) -> int:
    """Tokens that `passage_losses` scores."""
    return sum(len(p) - 1 for p in passages)
