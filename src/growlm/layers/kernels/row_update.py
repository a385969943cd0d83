"""Row-wise AdamW in Triton: one step of the rows that have a gradient, in one walk over them. Knows no optimiser."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# r rows with a gradient, N rows of the table, w width of a row

_WIDEST = 4096  # columns at a time


def fits(table: Tensor, first: Tensor, second: Tensor) -> bool:
    """Whether this kernel takes them: rows in one piece, in a dtype that is worked out in float32."""
    return (
        table.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and first.dtype == second.dtype == torch.float32
        and table.is_contiguous()
        and first.is_contiguous()
        and second.is_contiguous()
    )


def update_rows(
    table: Tensor,
    rows: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    sizes: Tensor,
    corrections: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    kept: float,
    noise: Tensor | None,
    shifts: Tensor | None,
) -> None:
    """One AdamW step of some rows of table (N, w), in place; each row stands among `rows` once.

    Bytes, an element of a row: those of the row twice, of its gradient once (from the cache a second time), 8 of `m`,
    and 8 of `v` if that is by element.

    Args:
        rows: (r,).
        gradient: (r, w).
        first: (N, w) float32.
        second: (N,) or (N, w) float32.
        sizes: (r,) float32, what a step is multiplied by: the negative rate over the bias correction of `m`.
        corrections: (r,) float32, the square root of the bias correction of `v`.
        kept: the share of a row that weight decay leaves.
        noise, shifts: what bfloat16 is rounded by: for `len(noise) // w` rows at a time, one number an element (16
            bits, int16), and one more for each time, to be added to all. Without them rows are rounded to nearest.
    """
    r, w = len(rows), table.shape[1]
    if not r or not w:
        return
    block = min(triton.next_power_of_2(w), _WIDEST)
    with torch.cuda.device_of(table):
        _update_rows[r,](
            table, rows.contiguous(), gradient.contiguous(), first, second, sizes, corrections,
            rows if noise is None else noise, rows if shifts is None else shifts, eps, kept,
            1 if noise is None else len(noise) // w, beta1=betas[0], beta2=betas[1], by_row=second.ndim == 1,
            noisy=noise is not None, w=w, block=block, num_warps=max(min(block // 256, 8), 1),
        )  # fmt: skip


@triton.jit
def _toward(value, other, weight: tl.constexpr):
    """As torch's lerp."""
    if weight < 0.5:
        return value + weight * (other - value)
    else:  # noqa: RET505 - which of both is settled where it is compiled
        return other - (other - value) * (1 - weight)


@triton.jit(do_not_specialize=["eps", "kept", "rows_at_a_time"])
def _update_rows(
    table, rows, gradient, first, second, sizes, corrections, noise, shifts, eps, kept, rows_at_a_time,
    beta1: tl.constexpr, beta2: tl.constexpr, by_row: tl.constexpr, noisy: tl.constexpr,
    w: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One row."""
    program = tl.program_id(0)
    row = tl.load(rows + program).to(tl.int64)
    start = program.to(tl.int64) * w  # of its gradient
    size = tl.load(sizes + program)
    corrected = tl.load(corrections + program)
    if by_row:
        squares = tl.zeros((block,), tl.float32)
        for at in range(0, w, block):
            column = at + tl.arange(0, block)
            g = tl.load(gradient + start + column, column < w, 0).to(tl.float32)
            squares += g * g
        v = _toward(tl.load(second + row), tl.sum(squares, 0) / w, 1 - beta2)
        tl.store(second + row, v)
        size = tl.div_rn(size, tl.div_rn(tl.sqrt_rn(v), corrected) + eps)
    for at in range(0, w, block):
        column = at + tl.arange(0, block)
        inside = column < w
        g = tl.load(gradient + start + column, inside, 0).to(tl.float32)
        m = _toward(tl.load(first + row * w + column, inside, 0), g, 1 - beta1)
        tl.store(first + row * w + column, m, inside)
        if not by_row:
            v = _toward(tl.load(second + row * w + column, inside, 0), g * g, 1 - beta2)
            tl.store(second + row * w + column, v, inside)
            m = tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), corrected) + eps)
        old = tl.load(table + row * w + column, inside, 0).to(tl.float32)
        new = old * kept + m * size
        if noisy:
            drawn = tl.load(noise + program % rows_at_a_time * w + column, inside, 0).to(tl.int32)
            drawn = (drawn + tl.load(shifts + program // rows_at_a_time)) & 0xFFFF
            new = ((new.to(tl.int32, bitcast=True) + drawn) & -65536).to(tl.float32, bitcast=True)
        tl.store(table + row * w + column, new, inside)
