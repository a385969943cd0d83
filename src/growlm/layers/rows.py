"""Rows of large tables: products with the rows that tokens chose, and their weighted sums. Knows no experts.

Neither direction makes a tensor of tokens x choices x width: rows are read into the cache and used there, and the
gradient of a table holds the rows that were read, no others.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from growlm.layers import kernels

# n tokens, s choices of a token, m parts of a row, d width of a part, r rows that were read

# Bytes of rows that stay in the caches of some cores between reading and use; smaller chunks synchronise more.
_CACHED = 1 << 22


class Choices:
    """The rows that tokens chose, (n, s), and who chose each row, worked out once and when first asked for."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self._ordered: tuple[Tensor, Tensor] | None = None
        self._by_row: tuple[Tensor, Tensor, Tensor] | None = None

    def ordered(self) -> tuple[Tensor, Tensor]:
        """All ids in ascending order, and the choices n s sorted so."""
        if self._ordered is None:
            self._ordered = self.ids.flatten().sort(stable=True)
        return self._ordered

    def by_row(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows (r,) in ascending order, the choices n s sorted by row, and each row's first among them (r,)."""
        if self._by_row is None:
            ordered, order = self.ordered()
            rows, counts = torch.unique_consecutive(ordered, return_counts=True)
            self._by_row = rows, order, counts.cumsum(0) - counts
        return self._by_row


@torch.compiler.disable  # tracing knows no sparse gradients
def row_products(x: Tensor, table: Tensor, choices: Choices, *, sparse: bool = True) -> Tensor:
    """`x[i] . table[ids[i, j]]`, for each of the m parts that a row has: (n, d), (N, m d) -> (n, s, m).

    In the dtype of the table. Its gradient is a sparse tensor of the rows that were read, or dense if not `sparse`.
    """
    return _Products.apply(x.to(table.dtype), table, choices, sparse)


@torch.compiler.disable
def weighted_rows(weights: Tensor, table: Tensor, choices: Choices, *, sparse: bool = True) -> Tensor:
    """`sum over j and parts of weights[i, j, part] table[ids[i, j], part]`: (n, s, m), (N, m d) -> (n, d).

    In the dtype of the table, summed in float32. Its gradient is as that of `row_products`.
    """
    return _WeightedRows.apply(weights.to(table.dtype), table, choices, sparse)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, choices: Choices, sparse: bool) -> Tensor:
        ctx.save_for_backward(x, table)
        ctx.choices, ctx.sparse = choices, sparse
        return products(x, table, choices.ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, table = ctx.saved_tensors
        for_x = weighted_sum(grad, table, ctx.choices.ids) if ctx.needs_input_grad[0] else None
        for_table = table_gradient(grad, x, table, ctx.choices, ctx.sparse) if ctx.needs_input_grad[1] else None
        return for_x, for_table, None, None


class _WeightedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, table: Tensor, choices: Choices, sparse: bool) -> Tensor:
        ctx.save_for_backward(weights, table)
        ctx.choices, ctx.sparse = choices, sparse
        return weighted_sum(weights, table, choices.ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weights, table = ctx.saved_tensors
        grad = grad.contiguous()
        for_weights = products(grad, table, ctx.choices.ids) if ctx.needs_input_grad[0] else None
        for_table = table_gradient(weights, grad, table, ctx.choices, ctx.sparse) if ctx.needs_input_grad[1] else None
        return for_weights, for_table, None, None


def products(x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """`row_products` without a gradient: (n, d), (N, m d), (n, s) -> (n, s, m)."""
    if fast := _kernels(table, x):
        return fast.products(x, table, ids)
    n, d = x.shape
    parts, ids = _parts(table, ids, d)
    out = x.new_empty(n, ids.shape[1])
    size = max(_CACHED // max(ids.shape[1] * d * table.element_size(), 1), 1)
    singles = torch.arange(size * ids.shape[1], device=ids.device)
    for at in range(0, n, size):
        chosen, tokens = ids[at : at + size], x[at : at + size]
        rows = read_rows(parts, chosen.flatten(), singles).view(*chosen.shape, d)
        torch.sum(rows.mul_(tokens[:, None]), -1, out=out[at : at + size])
    m = table.shape[1] // d
    return out.view(n, ids.shape[1] // m, m)


def weighted_sum(weights: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """`weighted_rows` without a gradient: (n, s, m), (N, m d), (n, s) -> (n, d)."""
    if fast := _kernels(table, weights):
        return fast.weighted_sum(weights, table, ids)
    n, s, m = weights.shape
    parts, ids = _parts(table, ids, table.shape[1] // m)
    return _bags(parts, ids.flatten(), torch.arange(0, n * s * m, s * m, device=ids.device), weights.flatten())


def _kernels(table: Tensor, *others: Tensor) -> ModuleType | None:
    """The same in Triton, where it can take them."""
    if not kernels.available(table.device):
        return None
    from growlm.layers.kernels import rows

    return rows if rows.fits(table, *others) else None


def _parts(table: Tensor, ids: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """A table of the parts of rows (N m, d), and the ids of the chosen rows' parts (n, s m)."""
    m = table.shape[1] // d
    if m == 1:
        return table, ids
    ids = (ids[..., None] * m + torch.arange(m, device=ids.device)).flatten(1)
    return table.view(-1, d), ids


def read_rows(table: Tensor, ids: Tensor, singles: Tensor) -> Tensor:
    """Rows (ids, d), without a gradient; `singles` are 0, 1, 2, ... for as many rows or more.

    On a processor as bags of one row: that kernel asks for rows ahead of their use, which halves the time that
    `index_select` takes on tables larger than the cache.
    """
    if table.device.type == "cpu" and table.dtype in (torch.float32, torch.bfloat16):
        return _bags(table, ids, singles[: len(ids)], None)
    return table.index_select(0, ids)


def _bags(table: Tensor, ids: Tensor, starts: Tensor, weights: Tensor | None) -> Tensor:
    """Sums of (weighted) rows, a bag from each of `starts` (b,) to the next: (b, d). Without a gradient: the kernel
    then keeps nothing for one."""
    if not len(ids):
        return table.new_zeros(len(starts), table.shape[1])
    return torch.embedding_bag(table.detach(), ids, starts, False, 0, False, weights)[0]


def table_gradient(weights: Tensor, tokens: Tensor, table: Tensor, choices: Choices, sparse: bool) -> Tensor:
    """The gradient `sum over (i, j) that chose the row of weights[i, j] tokens[i]`: (n, s, m), (n, d) -> (N, m d)."""
    fast = _kernels(tokens, weights)
    if fast and not sparse:
        ordered, order = choices.ordered()
        return fast.gradient_of_rows(weights, tokens, order, fast.starts_of(ordered, len(table)))
    rows, order, starts = choices.by_row()
    if fast:
        values = fast.gradient_of_rows(weights, tokens, order, starts)
    else:
        chooser = order // weights.shape[1]
        by_row = weights.flatten(0, 1)[order]  # (n s, m)
        values = torch.cat([_bags(tokens, chooser, starts, by_row[:, part]) for part in range(weights.shape[2])], 1) \
            if weights.shape[2] > 1 else _bags(tokens, chooser, starts, by_row[:, 0])  # fmt: skip
    if not sparse:
        return torch.zeros_like(table).index_copy_(0, rows, values)
    _warn_in_silence()
    return torch.sparse_coo_tensor(rows[None], values, table.shape, is_coalesced=True, check_invariants=False)


@functools.cache
def _warn_in_silence() -> None:
    """torch 2.11 warns at the first sparse tensor of a process that they are not checked, though it was told not to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(0), (1,), check_invariants=False)
