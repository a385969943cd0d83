"""Cross-entropy of a linear head, a chunk of tokens at a time.

The logits of a large vocabulary are the largest tensor of a training step. Here they exist for one chunk only: the loss
and its gradients are made in one walk, so that the backward pass has nothing left to do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

# n tokens, d hidden size, v vocabulary, r own rows

_CHUNK = 1 << 23  # logits held at a time
# Times as many on a GPU. Each chunk reads the whole head, which takes a GPU as long as products of a few hundred rows
# with it; of a vocabulary of 128,000 a processor's chunk has 65 rows.
_ON_GPU = 8


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    ids: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Log-loss of every token in nats, (n,) float32, without gradient. Arguments as in `linear_cross_entropy`.

    Scores what is served: the rows' logits are added to the head's and capped in the dtype of `hidden`, as the engine
    does, and the head is not copied.
    """
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = weight.to(hidden.dtype)
        own = None if rows is None else rows.to(hidden.dtype)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        size = _chunk(weight)
        for at in range(0, len(hidden), size):
            h = hidden[at : at + size]
            logits = h @ head.T
            if own is not None:
                assert ids is not None
                logits = logits.index_add_(-1, ids, h @ own.T)
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            losses[at : at + size] = cross_entropy(logits.float(), labels[at : at + size], reduction="none")
        return losses


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    ids: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Mean cross-entropy of `softmax(hidden @ weight.T)`.

    Args:
        hidden: (n, d), after the final norm; its dtype is that of the matrix products.
        weight: output head (v, d).
        labels: (n,); one below 0 is not counted, and neither its logits nor gradients are computed.
        rows, ids: (r, d) and (r,), ids ascending: added to the head's rows `ids`; gradients reach `rows` alone if
            `weight` is frozen.
        softcap: logits are bounded to +-softcap by tanh, as gemma2 does.

    Returns:
        A float32 scalar in nats a token that counts; 0 where none does.
    """
    counted = labels >= 0
    if not counted.all():
        if not counted.any():  # of nothing: zero, and so are all gradients
            return sum(t[:0].sum(dtype=torch.float32) for t in (hidden, weight, rows) if t is not None)  # type: ignore
        hidden, labels = hidden[counted], labels[counted]
    return _LinearCrossEntropy.apply(hidden, weight, rows, ids, labels, softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor | None,
        ids: Tensor | None,
        labels: Tensor,
        softcap: float | None,
    ) -> Tensor:
        if not any(ctx.needs_input_grad):
            return token_losses(hidden, weight, labels, rows=rows, ids=ids, softcap=softcap).mean()
        losses, *gradients = _walk(hidden, weight, rows, ids, labels, softcap, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        gradients = [None if g is None else g * outputs[0].to(g.dtype) for g in ctx.saved_tensors]
        return (*gradients, None, None, None)


def _walk(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    ids: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Losses (n,), and the gradients of their mean with respect to hidden, weight and rows, where needed."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        dtype = hidden.dtype
        head, order = weight.to(dtype), None
        if rows is not None:
            assert ids is not None
            # Own rows first: their part of a chunk's gradient is then a slice, not a gather. In bfloat16 they are
            # rounded with the head that they are added to: one product a chunk, where scoring takes two.
            order = torch.cat([ids, _others(ids, len(weight))])
            head = head.index_select(0, order)
            head[: len(ids)] += rows.to(dtype)
            labels = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))[labels]
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for_hidden = torch.empty_like(hidden) if needs[0] else None
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        for_rows = torch.zeros_like(rows, dtype=torch.float32) if needs[2] and rows is not None else None
        size = _chunk(weight)
        for at in range(0, len(hidden), size):
            h, y = hidden[at : at + size], labels[at : at + size, None]
            logits = (h @ head.T).float()
            slope = None
            if softcap is not None:
                logits = logits.div_(softcap).tanh_()
                slope = 1 - logits.square()
                logits = logits.mul_(softcap)
            # One pass for the probabilities; the largest gives back the sum that they were divided by.
            g = logits.softmax(-1)
            log_sum = logits.amax(-1, keepdim=True) - g.amax(-1, keepdim=True).log()
            losses[at : at + size] = (log_sum - logits.gather(-1, y))[:, 0]
            # Gradient of the sum: softmax - one_hot. It is divided by n where it has become small.
            g.scatter_add_(-1, y, torch.full_like(log_sum, -1.0))
            if slope is not None:
                g = g.mul_(slope)
            g = g.to(dtype)
            if for_hidden is not None:
                torch.mm(g, head, out=for_hidden[at : at + size])
            if for_weight is not None:
                for_weight += g.T @ h
            if for_rows is not None:
                for_rows += g[:, : len(for_rows)].T @ h
        share = 1.0 / len(hidden)
        return (
            losses,
            None if for_hidden is None else for_hidden.mul_(share),
            None if for_weight is None else _unordered(for_weight, order).mul_(share).to(weight.dtype),
            None if for_rows is None or rows is None else for_rows.mul_(share).to(rows.dtype),
        )


def _chunk(weight: Tensor) -> int:
    """Tokens at a time."""
    held = _CHUNK * (_ON_GPU if weight.device.type == "cuda" else 1)
    return max(held // len(weight), 16)


def _others(ids: Tensor, count: int) -> Tensor:
    """The numbers below `count` that are not in `ids`, ascending."""
    others = torch.ones(count, dtype=torch.bool, device=ids.device)
    others[ids] = False
    return others.nonzero()[:, 0]


def _unordered(gradient: Tensor, order: Tensor | None) -> Tensor:
    return gradient if order is None else torch.empty_like(gradient).index_copy_(0, order, gradient)
