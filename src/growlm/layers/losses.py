"""Losses on what routers decide (ModuleFormer, section 4; equations 7, 8 and 10; ST-MoE).

All take the logits of one layer's router (n, e) and, where a batch is padded, which of the n tokens count (n,).
Entropies come from log-softmax, so nothing underflows. With torch.distributed under way, a batch is what all ranks hold
together.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# n tokens, e experts


def mutual_information(logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """`-H(p(e)) + mean over tokens of H(g(.|x))` (equation 7): balance over the batch, focus for a token."""
    log = logits.float().log_softmax(-1)
    each = -(log.exp() * log).sum(-1)
    return _mean(each, counted) - _entropy(_mean(log.exp(), counted))


def load_concentration(logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """`H(p(e))` (equation 8): fewer experts are used."""
    return _entropy(_mean(logits.float().softmax(-1), counted))


def routing_regularisation(embeddings: Tensor) -> Tensor:
    """`||A'||^2` of new experts' embeddings (e', z) (equation 10): the smaller, the less readily they are chosen."""
    return embeddings.float().square().sum()


def load_balance(logits: Tensor, experts: Tensor, counted: Tensor | None = None) -> Tensor:
    """ST-MoE's balance loss: experts times the sum of (share of choices) x (mean probability); 1 where all are even.

    Args:
        experts: (n, k), the chosen ones.
    """
    probability = _mean(logits.float().softmax(-1), counted)
    chosen = torch.zeros_like(logits, dtype=torch.float32).scatter_add_(
        -1, experts, torch.ones_like(experts, dtype=torch.float32)
    )
    share = _mean(chosen, counted) / experts.shape[-1]
    return logits.shape[-1] * (share.detach() * probability).sum()


def router_z(logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """ST-MoE's z-loss: the mean square of logsumexp, which keeps logits small."""
    return _mean(logits.float().logsumexp(-1).square(), counted)


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.xlogy(probabilities, probabilities.clamp_min(torch.finfo(torch.float32).tiny)).sum()


def _mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """Mean over the first dimension, of what counts, on all ranks."""
    if counted is None:
        total, number = values.sum(0), torch.tensor(float(len(values)), device=values.device)
    else:
        weight = counted.to(values.dtype)
        total = torch.tensordot(weight, values, 1)
        number = weight.sum()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        from torch.distributed.nn.functional import all_reduce

        total, number = all_reduce(total), all_reduce(number)
    return total / number.clamp_min(1.0)
