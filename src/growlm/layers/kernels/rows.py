"""Rows of large tables in Triton: products with the rows that tokens chose, weighted sums, and gradients of tables.

Sums are in float32, in an order that depends on shapes alone: nothing is added by two programs. Ids are not checked.
Addresses of rows are 64-bit: a table has more elements than 32 bits count. Numbers that change from call to call are no
reason to compile anew (`do_not_specialize`).
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

# n tokens, s choices of a token, m parts of a row, d width of a part, r rows that were read, b bytes of an element

Schedule = Literal["token", "expert"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_WIDEST = 8192  # parts that one program holds whole, where rows are read once for all tokens
_VECTOR = 16  # bytes that a thread reads at once
_WARP = 32  # threads


def fits(table: Tensor, *others: Tensor) -> bool:
    """Whether these kernels take them: a dtype that is summed in float32, the same for all, rows in one piece."""
    return table.dtype in DTYPES and table.stride(1) == 1 and all(x.dtype == table.dtype for x in others)


def products(
    x: Tensor,
    table: Tensor,
    ids: Tensor,
    *,
    schedule: Schedule = "token",
    by_expert: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`x[i] . table[ids[i, j]]` for each part: (n, d), (N, m d), (n, s) -> (n, s, m).

    Bytes that are moved:

        token:  b (n s m d + n d + n s m) + 8 n s                  rows; tokens, read once each; results; ids
        expert: b (r m d + n s m d + n s m) + 24 n s + sorting     rows, once each; tokens, once a choice; results

    By expert, the token is what is read once for each choice. So its bytes are fewer only as far as tokens come from
    the cache (n d b is 16 MB for 8,192 tokens of width 1,024 in bfloat16), and rows repeat: of a million rows that
    are chosen a million times, r is 63%. By token needs no sorting and moves no more where rows hardly repeat or the
    table itself fits into the cache, and is the default; by expert is for tables larger than the cache of which every
    row is chosen many times.

    Args:
        by_expert: all ids in ascending order, and where each stood (n s,), if they were sorted before.
    """
    n, d = x.shape
    s, m = ids.shape[1], table.shape[1] // d
    out = x.new_empty(n, s, m)
    if not out.numel():
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    ids = ids.contiguous()
    strides = x.stride(0), table.stride(0)
    with torch.cuda.device_of(x):
        if schedule == "token" or d > _WIDEST:
            block_d, block_s = min(_power_of_two(d), _columns(x, 1)), 16
            blocks = triton.cdiv(s * m, block_s)
            _products_by_token[n * blocks,](
                x, table, ids, out, *strides, s, blocks, m=m, d=d, block_s=block_s, block_d=block_d, num_warps=4
            )
        else:
            ordered, order = ids.flatten().sort(stable=True) if by_expert is None else by_expert
            block_d, block_p = _power_of_two(d), 16
            warps = min(max(block_d // 1024, 1), 8)
            _products_by_expert[triton.cdiv(n * s, block_p) * m,](
                x, table, ordered, order, order // s, out, *strides, n * s, m=m, d=d, block_p=block_p, block_d=block_d,
                num_warps=warps,
            )  # fmt: skip
    return out


def weighted_sum(weights: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """`sum over j and parts of weights[i, j, part] table[ids[i, j], part]`: (n, s, m), (N, m d), (n, s) -> (n, d).

    Bytes: b (n s m d + n s m + n d) + 8 n s. By token alone: by expert, what a row adds to each of its tokens would
    either be added to memory by many programs at once, in an order that changes, or be written, n s d numbers, which
    is as much as reading a row for each choice.
    """
    n, s, m = weights.shape
    d = table.shape[1] // m
    out = table.new_empty(n, d)
    if not s:
        return out.zero_()
    if not n:
        return out
    block_d, warps = _whole_columns(table, d)
    blocks = triton.cdiv(d, block_d)
    with torch.cuda.device_of(table):
        _weighted_sum[n * blocks,](
            weights.contiguous(), table, ids.contiguous(), out, table.stride(0), s, blocks,
            m=m, d=d, block_s=8, block_d=block_d, num_warps=warps,
        )  # fmt: skip
    return out


def gradient_of_rows(weights: Tensor, tokens: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """`sum over the choices of a row of weights[i, j] tokens[i]`: (n, s, m), (n, d) -> (rows, m d).

    Bytes: b (n s m d + rows m d + n s m) + 16 n s + 8 rows; tokens come from the cache as far as it holds them.

    Args:
        order: the choices n s, sorted by row.
        starts: each row's first among them (rows,), in ascending order; a row that was not chosen has the next one's,
            and a gradient of zero.
    """
    n, s, m = weights.shape
    d = tokens.shape[1]
    out = tokens.new_empty(len(starts), m * d)
    if not n * s:
        return out.zero_()
    if not out.numel():
        return out
    tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
    block_d, warps = _whole_columns(tokens, d)
    blocks = triton.cdiv(d, block_d)
    block_p = min(max(_power_of_two(n * s // len(starts)), 2), 16)  # choices of a row that are read at once
    with torch.cuda.device_of(tokens):
        _gradient_of_rows[len(starts) * m * blocks,](
            weights.contiguous(), tokens, order, order // s, starts, out, tokens.stride(0), n * s, len(starts), blocks,
            m=m, d=d, block_p=block_p, block_d=block_d, num_warps=warps,
        )  # fmt: skip
    return out


def starts_of(ordered: Tensor, num_rows: int) -> Tensor:
    """Where each of all rows starts among ids in ascending order: (N,). Unlike counting, it asks nothing back from the
    device."""
    return torch.searchsorted(ordered, torch.arange(num_rows, device=ordered.device))


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _columns(like: Tensor, warps: int) -> int:
    """Elements that so many warps read at once."""
    return warps * _WARP * _VECTOR // like.element_size()


def _whole_columns(like: Tensor, d: int) -> tuple[int, int]:
    """A block of columns and its warps: every thread has columns of its own, and sums rows with no other."""
    block = min(_power_of_two(d), _columns(like, 4))
    return block, max(block // _columns(like, 1), 1)


@triton.jit
def _products_by_token(
    x, table, ids, out, x_stride, table_stride, s, blocks,
    m: tl.constexpr, d: tl.constexpr, block_s: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Some choices of a token; their blocks lie side by side, so that the token stays in the cache."""
    program = tl.program_id(0)
    token = (program // blocks).to(tl.int64)
    slot = program % blocks * block_s + tl.arange(0, block_s)  # choices and their parts
    real = slot < s * m
    row = tl.load(ids + token * s + slot // m, real, 0).to(tl.int64)
    start = row * table_stride + slot % m * d
    total = tl.zeros((block_s, block_d), tl.float32)
    for at in range(0, d, block_d):
        column = at + tl.arange(0, block_d)
        inside = column < d
        features = tl.load(x + token * x_stride + column, inside, 0).to(tl.float32)
        rows = tl.load(table + start[:, None] + column[None, :], real[:, None] & inside[None, :], 0).to(tl.float32)
        total += rows * features[None, :]
    tl.store(out + token * s * m + slot, tl.sum(total, 1), real)


@triton.jit(do_not_specialize=["pairs"])
def _products_by_expert(
    x, table, ordered, order, choosers, out, x_stride, table_stride, pairs,
    m: tl.constexpr, d: tl.constexpr, block_p: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """One part, and some choices in the order of their rows. What is loaded depends on nothing that was loaded for the
    choice before, so that the loads of many are under way at once."""
    program = tl.program_id(0)
    part = program % m
    first = (program // m).to(tl.int64) * block_p
    column = tl.arange(0, block_d)
    within = tl.arange(0, block_p)
    results = tl.zeros((block_p,), tl.float32)
    row = tl.zeros((block_d,), tl.float32)
    for j in range(block_p):
        real = first + j < pairs
        expert = tl.load(ordered + first + j, real, 0).to(tl.int64)
        before = tl.load(ordered + first + j - 1, real & (j > 0), -1).to(tl.int64)
        token = tl.load(choosers + first + j, real, 0)
        changes = real & (expert != before)
        read = tl.load(table + expert * table_stride + part * d + column, column < tl.where(changes, d, 0), 0)
        row = tl.where(changes, read.to(tl.float32), row)
        features = tl.load(x + token * x_stride + column, column < tl.where(real, d, 0), 0).to(tl.float32)
        results = tl.where(within == j, tl.sum(row * features, 0), results)
    real = first + within < pairs
    pair = tl.load(order + first + within, real, 0)
    tl.store(out + pair * m + part, results, real)


@triton.jit
def _weighted_sum(
    weights, table, ids, out, table_stride, s, blocks,
    m: tl.constexpr, d: tl.constexpr, block_s: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Some columns of a token."""
    program = tl.program_id(0)
    token = (program // blocks).to(tl.int64)
    column = program % blocks * block_d + tl.arange(0, block_d)
    inside = column < d
    total = tl.zeros((block_d,), tl.float32)
    for at in range(0, s * m, block_s):
        slot = at + tl.arange(0, block_s)  # choices and their parts
        real = slot < s * m
        row = tl.load(ids + token * s + slot // m, real, 0).to(tl.int64)
        weight = tl.load(weights + token * s * m + slot, real, 0).to(tl.float32)
        start = row * table_stride + slot % m * d
        rows = tl.load(table + start[:, None] + column[None, :], real[:, None] & inside[None, :], 0).to(tl.float32)
        total += tl.sum(weight[:, None] * rows, 0)
    tl.store(out + token * d + column, total, inside)


@triton.jit(do_not_specialize=["pairs", "num_rows"])
def _gradient_of_rows(
    weights, tokens, order, choosers, starts, out, token_stride, pairs, num_rows, blocks,
    m: tl.constexpr, d: tl.constexpr, block_p: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Some columns of a part of a row: it walks the choices of that row."""
    program = tl.program_id(0)
    column = program % blocks * block_d + tl.arange(0, block_d)
    inside = column < d
    part = program // blocks % m
    row = (program // blocks // m).to(tl.int64)
    start = tl.load(starts + row)
    end = tl.load(starts + row + 1, row + 1 < num_rows, pairs)
    total = tl.zeros((block_d,), tl.float32)
    for at in range(start, end, block_p):
        pair = at + tl.arange(0, block_p)
        real = pair < end
        weight = tl.load(weights + tl.load(order + pair, real, 0) * m + part, real, 0).to(tl.float32)
        start_of = tl.load(choosers + pair, real, 0) * token_stride
        features = tl.load(
            tokens + start_of[:, None] + column[None, :], real[:, None] & inside[None, :], 0
        ).to(tl.float32)  # fmt: skip
        total += tl.sum(weight[:, None] * features, 0)
    tl.store(out + (row * m + part) * d + column, total, inside)
