"""Thin products: a few rows through a large matrix, in the order of operands that the processor does faster.

Matrix libraries compute `x W^T` for few rows x of many processors at a fraction of their bandwidth, and `W x^T` at most
of it; at very few rows and at many it is the other way round. Which is faster where is measured, once a process, when
it is asked for first. The results differ by rounding, so that only who says so (`thin_products`) gets them.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# n rows

_LARGE = 1 << 16  # numbers of a matrix for which it is worth it
_TRIED = (2, 4, 8, 16, 32, 64)  # rows at which both orders are measured
_BETTER = 1.1  # times faster it has to be
_MATRICES, _SIDE, _TURNS = 6, 1024, 4  # 24 megabytes in float32: more than most caches near a core hold

_now = threading.local()


class ThinLinear(nn.Linear):
    """A linear layer that takes thin products where they are wanted and faster. What they give lies in memory column by
    column: to turn it would cost a tenth of the product."""

    def forward(self, input: Tensor) -> Tensor:
        if not getattr(_now, "wanted", False):
            return F.linear(input, self.weight, self.bias)
        rows = input.numel() // input.shape[-1]
        if rows < _TRIED[0] or rows not in thin_rows(self.weight.dtype):
            return F.linear(input, self.weight, self.bias)
        turned = made_up(input.reshape(rows, -1)).t()
        if self.bias is None:
            out = torch.mm(self.weight, turned)
        else:
            out = torch.addmm(self.bias[:, None], self.weight, turned)
        return out.t()[:rows].view(*input.shape[:-1], -1)


def made_up(x: Tensor) -> Tensor:
    """Rows (n, d) with as many of zeros behind them as they are best computed with."""
    rows = best_rows(len(x))
    return x if len(x) == rows else F.pad(x, (0, 0, 0, rows - len(x)))


def add_thin(total: Tensor, matrix: Tensor, few: Tensor, counts: float = 1.0) -> Tensor:
    """`total` (n, out) and, counted so many times, what a matrix (out, r) makes of columns (r, n or more)."""
    if few.shape[1] == len(total):
        return torch.addmm(total.t(), matrix, few, alpha=counts).t()
    return torch.add(total, torch.mm(matrix, few).t()[: len(total)], alpha=counts)


def allow_thin_products(module: nn.Module) -> None:
    """Has the large linear layers in a module on the processor take thin products where they are wanted; nothing else
    about them changes."""
    for part in module.modules():
        if type(part) is nn.Linear and part.weight.numel() >= _LARGE and part.weight.device.type == "cpu":
            part.__class__ = ThinLinear


@contextmanager
def thin_products() -> Iterator[None]:
    """Within it, this thread wants them."""
    _now.wanted = True
    try:
        yield
    finally:
        _now.wanted = False


@cache
def thin_rows(dtype: torch.dtype) -> range:
    """Of how many rows they are faster here."""
    matrices, faster = _matrices(dtype), []
    for rows in _TRIED:
        x = torch.ones(rows, _SIDE, dtype=dtype)
        plain, thin = _seconds(partial(_plain, x, matrices)), _seconds(partial(_thin, x, matrices))
        faster.append(thin * _BETTER < plain)
    best = [rows for rows, won in zip(_TRIED, faster, strict=True) if won]
    return range(best[0], best[-1] + 1) if best else range(0)


def best_rows(rows: int) -> int:
    """How many rows so many are best computed as. Matrix libraries work in tiles of 4 and of 16 rows and are slow with
    what remains: on a processor with AVX2, products of 13, 14, 15 and 16 rows took 138, 140, 162 and 97 ms."""
    if rows % 16 >= 10:
        return -(-rows // 16) * 16
    return rows + (rows % 4 == 3)


def _matrices(dtype: torch.dtype) -> list[Tensor]:
    return [torch.ones(_SIDE, _SIDE, dtype=dtype) for _ in range(_MATRICES)]


def _plain(x: Tensor, matrices: list[Tensor]) -> None:
    for matrix in matrices:
        F.linear(x, matrix)


def _thin(x: Tensor, matrices: list[Tensor]) -> None:
    for matrix in matrices:
        torch.mm(matrix, x.t())


def _seconds(run: Callable[[], object]) -> float:
    times = []
    with torch.inference_mode():
        for _ in range(_TURNS):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
