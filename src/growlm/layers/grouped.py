"""Grouped products: tokens sorted by expert, one linear map per expert in one product, and back.

A token's result depends on that token alone: no capacity, no token is dropped, whatever else is in the batch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# n tokens, d hidden size, e experts, k experts of a token


@dataclass(frozen=True)
class Dispatch:
    """Tokens sorted by expert: a token stands in as many rows as experts were chosen for it."""

    order: Tensor  # (n k,) the choice, i k + j for token i's j-th, that each sorted row is
    back: Tensor  # (n k,) its inverse: the sorted row of each choice
    ends: Tensor  # (e,) int32, the row after each expert's last
    top_k: int

    @classmethod
    def of(cls, experts: Tensor, num_experts: int) -> Dispatch:
        """Of the choices (n, k)."""
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        counts = torch.zeros(num_experts, dtype=torch.int32, device=flat.device)
        counts.index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        return cls(order, back, counts.cumsum(0, dtype=torch.int32), experts.shape[-1])

    def spread(self, tokens: Tensor) -> Tensor:
        """Tokens (n, d) -> sorted rows (n k, d)."""
        rows = tokens[:, None].expand(-1, self.top_k, -1).reshape(-1, tokens.shape[-1])
        return _Permutation.apply(rows, self.order, self.back)

    def sort(self, choices: Tensor) -> Tensor:
        """One row a choice (n, k, d) -> sorted rows (n k, d)."""
        return _Permutation.apply(choices.flatten(0, 1), self.order, self.back)

    def unsort(self, rows: Tensor) -> Tensor:
        """Sorted rows (n k, d) -> one row a choice (n, k, d)."""
        return _Permutation.apply(rows, self.back, self.order).view(-1, self.top_k, rows.shape[-1])

    def combine(self, rows: Tensor, gates: Tensor) -> Tensor:
        """Sorted rows (n k, d) -> every token's sum by gates (n, k): (n, d)."""
        return (self.unsort(rows) * gates.to(rows.dtype)[..., None]).sum(1)


class _Permutation(torch.autograd.Function):
    """Rows in another order; the gradient takes the inverse, a gather and not a scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permutation.apply(grad, inverse, order), None, None


class GroupedLinear(nn.Module):
    """One linear map per expert: (rows, in) sorted by expert -> (rows, out), in one grouped product.

    Attributes:
        weight: (e, in, out).
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, out_features))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        return grouped_product(rows, self.weight, ends)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`rows[start:end] @ weight[i]` for every expert i; `ends` (e,) int32 are where their rows end.

    In the dtype of autocast where that is on. No size is read back from the device.
    """
    dtype = torch.get_autocast_dtype(rows.device.type) if torch.is_autocast_enabled(rows.device.type) else rows.dtype
    return torch.ops.growlm.grouped_product(rows.to(dtype), weight.to(dtype), ends)


# Operators of our own around torch's, whose shape rules for tracing know bfloat16 only.


def _aligned(*matrices: Tensor) -> bool:
    """Whether torch's grouped product takes them: rows of a multiple of 16 bytes, some of them, and on a GPU the first
    one at such a place."""
    rows = all(m.shape[-1] * m.element_size() % 16 == 0 and len(m) for m in matrices)
    return rows and all(m.device.type == "cpu" or m.data_ptr() % 16 == 0 for m in matrices)


def _parts(ends: Tensor) -> list[slice]:
    bounds = [0, *ends.tolist()]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


@torch.library.custom_op("growlm::grouped_product", mutates_args=())
def _grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if _aligned(rows, weight):
        return F.grouped_mm(rows, weight, offs=ends)
    out = rows.new_empty(len(rows), weight.shape[2])
    for part, matrix in zip(_parts(ends), weight, strict=True):
        torch.mm(rows[part], matrix, out=out[part])
    return out


@_grouped_product.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@torch.library.custom_op("growlm::grouped_product_backward", mutates_args=())
def _grouped_product_backward(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    if _aligned(rows, weight):
        return F.grouped_mm(grad, weight.transpose(1, 2), offs=ends), F.grouped_mm(rows.t(), grad, offs=ends)
    grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
    for i, part in enumerate(_parts(ends)):
        torch.mm(grad[part], weight[i].t(), out=grad_rows[part])
        torch.mm(rows[part].t(), grad[part], out=grad_weight[i])
    return grad_rows, grad_weight


@_grouped_product_backward.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape)


def _grouped_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*torch.ops.growlm.grouped_product_backward(grad, *ctx.saved_tensors), None)


_grouped_product.register_autograd(_grouped_backward, setup_context=_grouped_setup)
