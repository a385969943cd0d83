"""Stick-breaking attention in Triton: forward, backward, and decode split over keys.

Formulas and limits are those of `growlm/layers/stickbreaking.py`. One program walks from the newest block of keys that
its queries see to the oldest, and ends where every stick of the block is used up, or where the queries' documents
begin. Blocks of keys are counted from key 0, so that all kernels cut them alike.

The sum over newer keys within a block. Of 16-bit inputs it is a product with a triangle of ones: `tl.cumsum` along the
keys takes what a tensor core returns through shared memory and back, twice, and shuffles it between lanes, where the
triangle takes it from registers and adds keys of the block / (2 widths) to the products that are made anyway; on Hopper
these wait for the exponentials, of which there are 16 a clock and 3 a logit. Each summand goes in as two bfloat16 (16
bits of mantissa; the total that a block hands to the next is summed in float32). Of float32 inputs, whose products are
made without tensor cores, it is `tl.cumsum`: the triangle would cost as much as the logits do.

Backward, without atomics, so that the same input gives the same bits: `query_gradient` walks as the forward does and
stores what of every stick is gone, and the sum of a_i so far, where it enters a block of keys; with these
`key_value_gradients` goes through the queries of one block of keys. The alternative, to walk again for every block of
keys, is cubic. That is 8 bytes a query, head and block of keys, thus quadratic; so queries go band by band, each band's
states within `STATE_BYTES`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

# b batch, h heads of queries, g heads of keys and values, n = h / g, t queries, s keys, d head width, e width of values
# r rows: queries of a block, in decode those of all n heads; l = s - t: keys before the first query

STATE_BYTES = 1 << 28  # of what the backward pass stores for one band of queries
MAX_WIDTH = 256  # of heads and values
MAX_DECODE_ROWS = 64  # n t, up to which keys are split between programs
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LOG2E = math.log2(math.e)
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_PRECISION = tl.constexpr("tf32x3")
_LOG2E_ = tl.constexpr(_LOG2E)
# As in `growlm/layers/stickbreaking.py`, here of base 2.
_SURE = tl.constexpr(120.0)
_GONE = tl.constexpr(80.0 * _LOG2E)
_BROKEN = tl.constexpr(17.0 * _LOG2E)
_NOTHING = tl.constexpr(1e9)  # -log of a stick that was not followed to where it would be asked for


class Blocks(NamedTuple):
    """How a kernel is cut."""

    rows: int
    keys: int
    warps: int
    stages: int
    chunk: int = 8  # blocks between two looks at whether all is used up: a loop of known length is prefetched


# By kernel and whether inputs have 16 bits: the widest head (or values) and its blocks. A warp group's matrix product
# takes 64 rows; sums of 256 columns fill the registers of 8 warps. In float32, products unroll over the head's width.
_TABLE: dict[tuple[str, bool], list[tuple[int, Blocks]]] = {
    ("forward", True): [(64, Blocks(128, 64, 8, 3)), (128, Blocks(128, 64, 8, 2)), (256, Blocks(128, 64, 8, 2))],
    ("forward", False): [(64, Blocks(32, 32, 4, 2)), (128, Blocks(32, 32, 4, 2)), (256, Blocks(32, 32, 8, 1))],
    ("backward", True): [(64, Blocks(64, 64, 4, 2)), (128, Blocks(64, 64, 8, 2)), (256, Blocks(64, 64, 8, 1))],
    ("backward", False): [(64, Blocks(32, 32, 4, 2)), (128, Blocks(32, 32, 4, 1)), (256, Blocks(16, 32, 8, 1))],
    ("decode", True): [(64, Blocks(16, 64, 4, 3)), (128, Blocks(16, 64, 4, 3)), (256, Blocks(16, 64, 4, 2))],
    ("decode", False): [(64, Blocks(16, 32, 4, 2)), (128, Blocks(16, 32, 4, 2)), (256, Blocks(16, 32, 4, 1))],
}


def blocks(kernel: str, query: Tensor, value: Tensor) -> Blocks:
    """How `forward`, `backward` or `decode` is cut for these inputs."""
    width = max(query.shape[-1], value.shape[-1])
    return next(cut for widest, cut in _TABLE[kernel, query.dtype != torch.float32] if width <= widest)


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernels take these inputs."""
    same = query.dtype in DTYPES and key.dtype == query.dtype and value.dtype == query.dtype
    return same and 1 <= query.shape[-1] <= MAX_WIDTH and 1 <= value.shape[-1] <= MAX_WIDTH


# What the kernels share


@triton.jit
def _dot(a, b, NARROW: tl.constexpr):
    if _INTERPRETED:  # it multiplies bfloat16 as if they were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    if NARROW:
        return tl.dot(a, b)
    return tl.dot(a, b, input_precision=_PRECISION)


@triton.jit
def _load(
    base, first, stop, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr
):
    """Rows from `first` on of a matrix: (ROWS, COLUMNS), nought from row `stop` (unless WHOLE: there is none) and from
    column WIDTH on."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = base + first.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if WHOLE:
        if WIDTH == COLUMNS:
            return tl.load(at)
        return tl.load(at, mask=columns[None, :] < WIDTH, other=0.0)
    if WIDTH == COLUMNS:
        return tl.load(at, mask=(first + rows)[:, None] < stop, other=0.0)
    return tl.load(at, mask=((first + rows)[:, None] < stop) & (columns[None, :] < WIDTH), other=0.0)


@triton.jit
def _logits(
    q, keys, scale, positions, inside, cols, s, seen, m_s, mine, theirs,
    MASK: tl.constexpr, DOCUMENTS: tl.constexpr, CLEAR: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Logits of base 2, (rows, keys): minus infinity where nothing is seen.

    `positions`, `inside` and `mine` (rows,): of the queries, whether there is one, its document. `seen`: the mask, of
    all queries (MASK 1) or of each (2, (rows,)). CLEAR: no key is later than a query, and none is past the last.
    """
    logits = _dot(q, tl.trans(keys), NARROW) * scale
    logits = tl.minimum(logits, _SURE, propagate_nan=tl.PropagateNan.ALL)
    if not CLEAR:
        logits = tl.where(cols[None, :] <= positions[:, None], logits, float("-inf"))
    if MASK == 1:
        visible = tl.load(seen + cols * m_s, mask=cols < s, other=0)
        logits = tl.where((visible != 0)[None, :], logits, float("-inf"))
    if MASK == 2:
        there = inside[:, None] & (cols < s)[None, :]
        visible = tl.load(seen[:, None] + (cols * m_s)[None, :], mask=there, other=0)
        logits = tl.where(visible != 0, logits, float("-inf"))
    if DOCUMENTS:
        others = tl.load(theirs + cols, mask=cols < s, other=0)
        logits = tl.where(mine[:, None] == others[None, :], logits, float("-inf"))
    return logits


@triton.jit
def _taken(logits, NARROW: tl.constexpr):
    """-log2(1 - beta). Of small odds by its series: 1 + odds would keep few of their digits."""
    odds = tl.exp2(logits)
    few = tl.minimum(odds, 0.015625)
    series = few * (_LOG2E_ - few * (_LOG2E_ / 2 - few * (_LOG2E_ / 3 - few * (_LOG2E_ / 4))))
    return tl.where(odds < 0.015625, series, _log2(1.0 + odds, NARROW))


@triton.jit
def _log2(x, NARROW: tl.constexpr):
    """Of 16-bit inputs by the processor's own instruction (an error of 2^-22), which `tl.log2` does not use."""
    if NARROW:
        if _INTERPRETED:
            return tl.log2(x)
        return libdevice.fast_log2f(x)
    return tl.log2(x)


@triton.jit
def _triangle(KEYS: tl.constexpr):
    """1 where the row's key is newer than the column's."""
    keys = tl.arange(0, KEYS)
    return (keys[:, None] > keys[None, :]).to(tl.float32).to(tl.bfloat16)


@triton.jit
def _newer(x, triangle, NARROW: tl.constexpr):
    """Of every key, the sum over the newer keys of the block, (rows, keys)."""
    if NARROW:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        return _dot(high, triangle, NARROW) + _dot(low, triangle, NARROW)
    return tl.cumsum(x, 1, reverse=True) - x


# Kernels


@triton.jit(do_not_specialize=["t", "s"])
def forward_kernel(
    query, key, value, out, exact, mask, documents, starts, scale, t, s, h, n,
    q_b, q_h, q_t, k_b, k_g, k_s, v_b, v_g, v_s, m_b, m_t, m_s,
    D: tl.constexpr, E: tl.constexpr, WIDE_D: tl.constexpr, WIDE_E: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
    MASK: tl.constexpr, DOCUMENTS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """A program: a block of queries of one head, the longest walks first. `out` in the dtype of the queries, and of 16
    bits also `exact` in float32, both (b, h, t, E) and contiguous."""
    number = tl.cdiv(t, ROWS)
    heads = tl.num_programs(0) // number
    first = (number - 1 - tl.program_id(0) // heads) * ROWS
    head = tl.program_id(0) % heads
    b, h_, g_ = (head // h).to(tl.int64), (head % h).to(tl.int64), (head % h // n).to(tl.int64)
    rows = first + tl.arange(0, ROWS)
    inside = rows < t
    positions = s - t + rows
    query += b * q_b + h_ * q_h
    key += b * k_b + g_ * k_g
    value += b * v_b + g_ * v_g
    q = _load(query, first, t, q_t, D, ROWS, WIDE_D, False)
    triangle = _triangle(KEYS)
    seen, mine, low = mask, positions, 0
    if MASK == 1:
        seen = mask + b * m_b
    if MASK == 2:
        seen = mask + b * m_b + rows.to(tl.int64) * m_t
    if DOCUMENTS:
        documents += b * s
        mine = tl.load(documents + positions, mask=inside, other=0)
        low = tl.load(starts + b * s + s - t + first) // KEYS
    total = tl.zeros([ROWS, WIDE_E], tl.float32)
    passed = tl.where(inside, 0.0, _NOTHING)

    at = (s - t + tl.minimum(first + ROWS, t) - 1) // KEYS  # the block of the last query
    clear = (s - t + first + 1) // KEYS - 1  # the newest block that all queries see whole
    for phase in tl.static_range(2):
        end = tl.maximum(low, clear + 1) if phase == 0 else low
        going = at >= end
        while going:
            count = tl.minimum(at - end + 1, CHUNK)
            for i in range(count):
                start = (at - i) * KEYS
                cols = start + tl.arange(0, KEYS)
                keys = _load(key, start, s, k_s, D, KEYS, WIDE_D, phase == 1)
                values = _load(value, start, s, v_s, E, KEYS, WIDE_E, phase == 1)
                logits = _logits(
                    q, keys, scale, positions, inside, cols, s, seen, m_s, mine, documents,
                    MASK, DOCUMENTS, phase == 1, NARROW,
                )  # fmt: skip
                taken = _taken(logits, NARROW)
                weights = tl.exp2(logits - taken - _newer(taken, triangle, NARROW) - passed[:, None])
                passed += tl.sum(taken, 1)
                total += _dot(weights.to(values.dtype), values, NARROW)
            at -= count
            going = (at >= end) & (tl.min(passed, 0) <= _GONE)

    columns = tl.arange(0, WIDE_E)
    place = (head.to(tl.int64) * t + rows)[:, None] * E + columns[None, :]
    there = inside[:, None] & (columns < E)[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=there)
    if NARROW:
        tl.store(exact + place, total, mask=there)


@triton.jit(do_not_specialize=["t", "s", "span", "splits"])
def decode_kernel(
    query, key, value, parts, gone, mask, documents, starts, scale, t, s, g, n, span, splits,
    q_b, q_h, q_t, k_b, k_g, k_s, v_b, v_g, v_s, m_b, m_t, m_s,
    D: tl.constexpr, E: tl.constexpr, WIDE_D: tl.constexpr, WIDE_E: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
    MASK: tl.constexpr, DOCUMENTS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """A program: `span` blocks of keys, for the n t queries that share a head of keys, as if the sticks began there.

    `parts` (b, g, n t, splits, E) are the sums, `gone` (b, g, n t, splits) what of the sticks is gone; split 0 holds
    the newest keys.
    """
    split, head = tl.program_id(0) % splits, tl.program_id(0) // splits
    b, g_ = (head // g).to(tl.int64), (head % g).to(tl.int64)
    rows = tl.arange(0, ROWS)
    inside = rows < n * t
    token = rows % t
    positions = s - t + token
    columns = tl.arange(0, WIDE_D)
    place = (g_ * n + rows // t) * q_h + token * q_t
    q = tl.load(
        query + b * q_b + place[:, None] + columns[None, :], mask=inside[:, None] & (columns < D)[None, :], other=0.0
    )
    key += b * k_b + g_ * k_g
    value += b * v_b + g_ * v_g
    triangle = _triangle(KEYS)
    seen, mine, low = mask, positions, 0
    if MASK == 1:
        seen = mask + b * m_b
    if MASK == 2:
        seen = mask + b * m_b + token.to(tl.int64) * m_t
    if DOCUMENTS:
        documents += b * s
        mine = tl.load(documents + positions, mask=inside, other=0)
        low = tl.load(starts + b * s + s - t) // KEYS
    total = tl.zeros([ROWS, WIDE_E], tl.float32)
    passed = tl.where(inside, 0.0, _NOTHING)

    at = (s - 1) // KEYS - split * span
    end = tl.maximum(low, at - span + 1)
    going = at >= end
    while going:
        count = tl.minimum(at - end + 1, CHUNK)
        for i in range(count):
            start = (at - i) * KEYS
            cols = start + tl.arange(0, KEYS)
            keys = _load(key, start, s, k_s, D, KEYS, WIDE_D, False)
            values = _load(value, start, s, v_s, E, KEYS, WIDE_E, False)
            logits = _logits(
                q, keys, scale, positions, inside, cols, s, seen, m_s, mine, documents,
                MASK, DOCUMENTS, False, NARROW,
            )  # fmt: skip
            taken = _taken(logits, NARROW)
            weights = tl.exp2(logits - taken - _newer(taken, triangle, NARROW) - passed[:, None])
            passed += tl.sum(taken, 1)
            total += _dot(weights.to(values.dtype), values, NARROW)
        at -= count
        going = (at >= end) & (tl.min(passed, 0) <= _GONE)

    outer = (head.to(tl.int64) * n * t + rows) * splits + split
    columns = tl.arange(0, WIDE_E)
    tl.store(parts + outer[:, None] * E + columns[None, :], total, mask=inside[:, None] & (columns < E)[None, :])
    tl.store(gone + outer, passed, mask=inside)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    parts, gone, out, exact, splits,
    E: tl.constexpr, WIDE_E: tl.constexpr, SPLITS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """A program: one query of one head. What the newer splits left of the stick multiplies a split's sum."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDE_E)
    total = tl.zeros([WIDE_E], tl.float32)
    passed = 0.0
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        # What the split before has taken: sums over it lose nothing beside what the split itself takes, and more.
        before = tl.load(gone + row * splits + split - 1, mask=(split > first) & (split < splits), other=0.0)
        newer = passed + tl.cumsum(before, 0)
        place = (row * splits + split)[:, None] * E + columns[None, :]
        part = tl.load(parts + place, mask=(split < splits)[:, None] & (columns < E)[None, :], other=0.0)
        total += tl.sum(part * tl.exp2(-newer)[:, None], 0)
        passed += tl.sum(tl.load(gone + row * splits + split, mask=split < splits, other=0.0), 0)
    there = columns < E
    tl.store(out + row * E + columns, total.to(out.dtype.element_ty), mask=there)
    if NARROW:
        tl.store(exact + row * E + columns, total, mask=there)


@triton.jit(do_not_specialize=["t", "s", "band", "stop", "states"])
def query_gradient_kernel(
    query, key, value, grad, out, grad_query, wholes, entered, newest, reached, mask, documents, starts,
    scale, factor, t, s, h, n, band, stop, states,
    q_b, q_h, q_t, k_b, k_g, k_s, v_b, v_g, v_s, o_b, o_h, o_t, m_b, m_t, m_s,
    D: tl.constexpr, E: tl.constexpr, WIDE_D: tl.constexpr, WIDE_E: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
    MASK: tl.constexpr, DOCUMENTS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """A program: a block of queries of one head, of those from `band` to `stop`.

    `out` is contiguous and float32. Stored for `key_value_gradients_kernel`: grad . out in `wholes` (b h, band's rows);
    what of a stick is gone, and the sum of a_i, before a block of keys in `entered` and `newest`, both (b h, states,
    band's rows); and the oldest block of keys that was walked to in `reached` (b h, band's blocks of rows).
    """
    number = tl.cdiv(stop - band, ROWS)
    heads = tl.num_programs(0) // number
    block = number - 1 - tl.program_id(0) // heads
    first = band + block * ROWS
    head = tl.program_id(0) % heads
    b, h_, g_ = (head // h).to(tl.int64), (head % h).to(tl.int64), (head % h // n).to(tl.int64)
    head = head.to(tl.int64)
    rows = first + tl.arange(0, ROWS)
    inside = rows < stop
    positions = s - t + rows
    query += b * q_b + h_ * q_h
    key += b * k_b + g_ * k_g
    value += b * v_b + g_ * v_g
    q = _load(query, first, stop, q_t, D, ROWS, WIDE_D, False)
    upper = _load(grad + b * o_b + h_ * o_h, first, stop, o_t, E, ROWS, WIDE_E, False)
    outs = _load(out + head * t * E, first, stop, E, E, ROWS, WIDE_E, False)
    whole = tl.sum(upper.to(tl.float32) * outs, 1)
    wholes += head * (stop - band)
    tl.store(wholes + rows - band, whole, mask=inside)
    triangle = _triangle(KEYS)
    seen, mine, low = mask, positions, 0
    if MASK == 1:
        seen = mask + b * m_b
    if MASK == 2:
        seen = mask + b * m_b + rows.to(tl.int64) * m_t
    if DOCUMENTS:
        documents += b * s
        mine = tl.load(documents + positions, mask=inside, other=0)
        low = tl.load(starts + b * s + s - t + first) // KEYS
    total = tl.zeros([ROWS, WIDE_D], tl.float32)
    passed = tl.where(inside, 0.0, _NOTHING)
    newer = tl.zeros([ROWS], tl.float32)

    at = (s - t + tl.minimum(first + ROWS, stop) - 1) // KEYS
    clear = (s - t + first + 1) // KEYS - 1
    for phase in tl.static_range(2):
        end = tl.maximum(low, clear + 1) if phase == 0 else low
        going = at >= end
        while going:
            count = tl.minimum(at - end + 1, CHUNK)
            for i in range(count):
                start = (at - i) * KEYS
                cols = start + tl.arange(0, KEYS)
                keys = _load(key, start, s, k_s, D, KEYS, WIDE_D, phase == 1)
                values = _load(value, start, s, v_s, E, KEYS, WIDE_E, phase == 1)
                state = (head * states + at - i) * (stop - band) + rows - band
                tl.store(entered + state, passed, mask=inside)
                tl.store(newest + state, newer, mask=inside)
                logits = _logits(
                    q, keys, scale, positions, inside, cols, s, seen, m_s, mine, documents,
                    MASK, DOCUMENTS, phase == 1, NARROW,
                )  # fmt: skip
                pull, change, taken = _changes(
                    logits, upper, values, passed, newer, whole, triangle, NARROW
                )[1:]  # fmt: skip
                passed += tl.sum(taken, 1)
                newer += tl.sum(pull, 1)
                total += _dot(change.to(keys.dtype), keys, NARROW)
            at -= count
            going = (at >= end) & (tl.min(passed, 0) <= _GONE)

    tl.store(reached + head * number + block, at + 1)
    columns = tl.arange(0, WIDE_D)
    place = (head * t + rows)[:, None] * D + columns[None, :]
    there = inside[:, None] & (columns < D)[None, :]
    tl.store(grad_query + place, (total * factor).to(grad_query.dtype.element_ty), mask=there)


@triton.jit
def _changes(logits, upper, values, passed, newer, whole, triangle, NARROW: tl.constexpr):
    """(weights, a, gradients of the logits, -log2(1 - beta)), all (rows, keys)."""
    taken = _taken(logits, NARROW)
    share = logits - taken  # log2 beta
    gone = _newer(taken, triangle, NARROW) + passed[:, None]
    weights = tl.exp2(share - gone)
    pull = _dot(upper, tl.trans(values), NARROW) * weights
    others = (_newer(pull, triangle, NARROW) + newer[:, None] - whole[:, None]) * tl.exp2(share)
    return weights, pull, pull + tl.where(gone > _BROKEN, 0.0, others), taken


@triton.jit(do_not_specialize=["t", "s", "band", "stop", "states"])
def key_value_gradients_kernel(
    query, key, value, grad, grad_key, grad_value, wholes, entered, newest, reached, mask, documents, ends,
    scale, factor, t, s, g, n, band, stop, states,
    q_b, q_h, q_t, k_b, k_g, k_s, v_b, v_g, v_s, o_b, o_h, o_t, m_b, m_t, m_s,
    D: tl.constexpr, E: tl.constexpr, WIDE_D: tl.constexpr, WIDE_E: tl.constexpr,
    ROWS: tl.constexpr, WALKED: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
    MASK: tl.constexpr, DOCUMENTS: tl.constexpr, NARROW: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """A program: a block of keys of one head, and the queries from `band` to `stop` of all heads that share it.

    `wholes` and so on are what `query_gradient_kernel` has stored; its blocks of WALKED rows are whole numbers of ROWS.
    ADD: to what `grad_key` and `grad_value` hold.
    """
    heads = tl.num_programs(0) // states
    block = tl.program_id(0) // heads  # the oldest first: most queries see them
    head = tl.program_id(0) % heads
    b, g_ = (head // g).to(tl.int64), (head % g).to(tl.int64)
    head = head.to(tl.int64)
    start = block * KEYS
    cols = start + tl.arange(0, KEYS)
    query += b * q_b
    grad += b * o_b
    keys = _load(key + b * k_b + g_ * k_g, start, s, k_s, D, KEYS, WIDE_D, False)
    values = _load(value + b * v_b + g_ * v_g, start, s, v_s, E, KEYS, WIDE_E, False)
    triangle = _triangle(KEYS)
    last = stop
    if MASK != 0:
        mask += b * m_b
    if DOCUMENTS:
        documents += b * s
        last = tl.minimum(stop, tl.load(ends + b * s + tl.minimum(start + KEYS, s) - 1).to(tl.int32) - (s - t))
    total_key = tl.zeros([KEYS, WIDE_D], tl.float32)
    total_value = tl.zeros([KEYS, WIDE_E], tl.float32)
    width = stop - band
    # Of this band's blocks of rows: the first with a query that sees a key, the first whose queries see all of them.
    earliest = tl.maximum(start - (s - t) - band, 0) // ROWS
    clear = tl.maximum(earliest, tl.cdiv(tl.maximum(start + KEYS - 1 - (s - t) - band, 0), ROWS))
    number = tl.cdiv(tl.maximum(last - band, 0), ROWS)

    for shared in range(n):
        own = (b * g + g_) * n + shared
        h_ = g_ * n + shared
        for phase in tl.static_range(2):
            at = earliest if phase == 0 else clear
            end = tl.minimum(clear, number) if phase == 0 else number
            while at < end:
                count = tl.minimum(end - at, CHUNK)
                walked = (at + tl.arange(0, CHUNK)) * ROWS // WALKED
                chunk = tl.arange(0, CHUNK) < count
                oldest = tl.load(reached + own * tl.cdiv(width, WALKED) + walked, mask=chunk, other=states)
                if tl.min(oldest, 0) <= block:
                    for i in range(count):
                        first = band + (at + i) * ROWS
                        rows = first + tl.arange(0, ROWS)
                        inside = rows < stop
                        positions = s - t + rows
                        q = _load(query + h_ * q_h, first, stop, q_t, D, ROWS, WIDE_D, False)
                        upper = _load(grad + h_ * o_h, first, stop, o_t, E, ROWS, WIDE_E, False)
                        whole = tl.load(wholes + own * width + rows - band, mask=inside, other=0.0)
                        reach = tl.load(reached + own * tl.cdiv(width, WALKED) + (at + i) * ROWS // WALKED)
                        followed = rows < tl.where(reach <= block, stop, 0)
                        state = (own * states + block) * width + rows - band
                        passed = tl.load(entered + state, mask=followed, other=_NOTHING)
                        newer = tl.load(newest + state, mask=followed, other=0.0)
                        seen, mine = mask, positions
                        if MASK == 2:
                            seen = mask + rows.to(tl.int64) * m_t
                        if DOCUMENTS:
                            mine = tl.load(documents + positions, mask=inside, other=0)
                        logits = _logits(
                            q, keys, scale, positions, inside, cols, s, seen, m_s, mine, documents,
                            MASK, DOCUMENTS, phase == 1, NARROW,
                        )  # fmt: skip
                        weights, _, change, _ = _changes(logits, upper, values, passed, newer, whole, triangle, NARROW)
                        total_value += _dot(tl.trans(weights.to(upper.dtype)), upper, NARROW)
                        total_key += _dot(tl.trans(change.to(q.dtype)), q, NARROW)
                at += count

    total_key *= factor
    columns = tl.arange(0, WIDE_D)
    place = ((head * s) + cols)[:, None] * D + columns[None, :]
    there = (cols < s)[:, None] & (columns < D)[None, :]
    if ADD:
        total_key += tl.load(grad_key + place, mask=there, other=0.0)
    tl.store(grad_key + place, total_key.to(grad_key.dtype.element_ty), mask=there)
    columns = tl.arange(0, WIDE_E)
    place = ((head * s) + cols)[:, None] * E + columns[None, :]
    there = (cols < s)[:, None] & (columns < E)[None, :]
    if ADD:
        total_value += tl.load(grad_value + place, mask=there, other=0.0)
    tl.store(grad_value + place, total_value.to(grad_value.dtype.element_ty), mask=there)


# Launches


class _Call:
    """Arguments that the kernels of one call share."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, documents: Tensor | None
    ) -> None:
        self.query, self.key, self.value = (_rows(x) for x in (query, key, value))
        self.b, self.h, self.t, self.d = query.shape
        self.g, self.s, self.e = value.shape[1:]
        self.n = self.h // self.g
        self.scale = scale
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.documents: Tensor | None = None
        self.starts: Tensor | None = None
        self.ends: Tensor | None = None
        if documents is not None:
            self.documents, self.starts, self.ends = _bounds(documents)

    def strides(self, *tensors: Tensor) -> tuple[int, ...]:
        """Of all but the last dimension; and those of the mask."""
        mask = (0, 0, 0) if self.mask is None else (self.mask.stride(0), *self.mask.stride()[2:])
        return (*(stride for x in tensors for stride in x.stride()[:3]), *mask)

    def constants(self, cut: Blocks) -> dict[str, Any]:
        return {
            "D": self.d,
            "E": self.e,
            "WIDE_D": max(16, triton.next_power_of_2(self.d)),  # a matrix product takes 16 at least
            "WIDE_E": max(16, triton.next_power_of_2(self.e)),
            "ROWS": cut.rows,
            "KEYS": cut.keys,
            "CHUNK": cut.chunk,
            "MASK": 0 if self.mask is None else 1 if self.mask.shape[2] == 1 else 2,
            "DOCUMENTS": self.documents is not None,
            "NARROW": self.query.dtype != torch.float32,
            "num_warps": cut.warps,
            "num_stages": cut.stages,
        }


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _bounds(documents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(b, s) each: the documents, where every token's begins, and where it ends. Where they are not in order, all may
    see all that their numbers allow: 0 and s. Nothing is read back from the device."""
    documents = documents.contiguous()
    ordered = (documents[:, 1:] >= documents[:, :-1]).all(1, keepdim=True)
    starts = torch.searchsorted(documents, documents, out_int32=True)
    ends = torch.searchsorted(documents, documents, right=True, out_int32=True)
    return documents, starts * ordered, ends.masked_fill_(~ordered, documents.shape[1])


def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    # Said, since what Triton does unasked changes with its release.
    kernel[(programs,)](*arguments, **constants, enable_fp_fusion=True)


def _on(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of several devices, that of the queries is the one that kernels run on."""

    @functools.wraps(function)
    def on(*arguments: Any, **options: Any) -> Any:
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        if device.type != "cuda":
            return function(*arguments, **options)
        with torch.cuda.device(device):
            return function(*arguments, **options)

    return on


@_on
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    cut: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (b, h, t, e), and the same in float32: of float32 inputs, the output itself.

    Arguments are those of `stickbreaking_attention`; the mask is of type bool and (b, 1, 1 or t, s).
    """
    call = _Call(query, key, value, scale, mask, documents)
    out, exact = _outputs(call)
    if out.numel():
        cut = cut or blocks("forward", query, value)
        launch(
            forward_kernel,
            call.b * call.h * triton.cdiv(call.t, cut.rows),
            (call.query, call.key, call.value, out, exact, call.mask, call.documents, call.starts,
             scale * _LOG2E, call.t, call.s, call.h, call.n, *call.strides(call.query, call.key, call.value)),
            call.constants(cut),
        )  # fmt: skip
    return out, exact


def _outputs(call: _Call) -> tuple[Tensor, Tensor]:
    out = call.query.new_empty(call.b, call.h, call.t, call.e)
    return out, out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)


@_on
def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    cut: Blocks | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`forward` for few queries of many keys (n t up to MAX_DECODE_ROWS), which are split between programs."""
    call = _Call(query, key, value, scale, mask, documents)
    out, exact = _outputs(call)
    if not out.numel():
        return out, exact
    cut = cut or blocks("decode", query, value)
    rows = call.n * call.t
    number = triton.cdiv(call.s, cut.keys)
    if splits is None:
        splits = _splits(call, cut)
    span = triton.cdiv(number, splits)
    splits = triton.cdiv(number, span)
    parts = torch.empty(call.b, call.g, rows, splits, call.e, dtype=torch.float32, device=query.device)
    gone = parts.new_empty(call.b, call.g, rows, splits)
    constants = call.constants(cut)
    launch(
        decode_kernel,
        call.b * call.g * splits,
        (call.query, call.key, call.value, parts, gone, call.mask, call.documents, call.starts, scale * _LOG2E,
         call.t, call.s, call.g, call.n, span, splits, *call.strides(call.query, call.key, call.value)),
        constants | {"ROWS": max(cut.rows, triton.next_power_of_2(rows))},
    )  # fmt: skip
    launch(
        combine_kernel,
        call.b * call.h * call.t,
        (parts, gone, out, exact, splits),
        {"E": call.e, "WIDE_E": constants["WIDE_E"], "SPLITS": 16, "NARROW": constants["NARROW"], "num_warps": 4},
    )
    return out, exact


def _splits(call: _Call, cut: Blocks) -> int:
    """Enough for two programs a multiprocessor, of four blocks of keys at least."""
    device = call.query.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = triton.cdiv(2 * processors, call.b * call.g)
    return max(1, min(wanted, call.s // (4 * cut.keys)))


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`decode` where queries are few and keys many, else `forward`."""
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    few = 0 < rows <= MAX_DECODE_ROWS and key.shape[2] >= 8 * blocks("decode", query, value).keys
    return (decode if few else forward)(query, key, value, scale, mask, documents)


@_on
def backward(
    grad: Tensor,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    cut: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; `grad` (b, h, t, e), and `out` in float32 as `forward` returns it."""
    call = _Call(query, key, value, scale, mask, documents)
    grad, out = _rows(grad.to(query.dtype)), out.contiguous()
    cut = cut or blocks("backward", query, value)
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    if not grad.numel():
        return grad_query.zero_(), torch.zeros_like(key), torch.zeros_like(value)
    number = triton.cdiv(call.s, cut.keys)
    rows = STATE_BYTES // (8 * call.b * call.h * number) // cut.rows * cut.rows
    bands = range(0, call.t, min(max(rows, cut.rows), call.t))
    whole = len(bands) == 1
    kind = None if whole else torch.float32
    make = torch.empty_like if whole else torch.zeros_like
    grad_key, grad_value = (make(x, dtype=kind, memory_format=torch.contiguous_format) for x in (key, value))
    constants = call.constants(cut)
    for band in bands:
        stop = min(band + bands.step, call.t)
        states = triton.cdiv(call.s - call.t + stop, cut.keys)
        wholes = torch.empty(call.b * call.h, stop - band, dtype=torch.float32, device=query.device)
        entered, newest = wholes.new_empty(2, call.b * call.h, states, stop - band).unbind()
        reached = wholes.new_empty(call.b * call.h, triton.cdiv(stop - band, cut.rows), dtype=torch.int32)
        kept = (wholes, entered, newest, reached, call.mask, call.documents)
        strides = call.strides(call.query, call.key, call.value, grad)
        launch(
            query_gradient_kernel,
            call.b * call.h * triton.cdiv(stop - band, cut.rows),
            (call.query, call.key, call.value, grad, out, grad_query, *kept, call.starts,
             scale * _LOG2E, scale, call.t, call.s, call.h, call.n, band, stop, states, *strides),
            constants,
        )  # fmt: skip
        launch(
            key_value_gradients_kernel,
            call.b * call.g * states,
            (call.query, call.key, call.value, grad, grad_key, grad_value, *kept, call.ends,
             scale * _LOG2E, scale, call.t, call.s, call.g, call.n, band, stop, states, *strides),
            constants | {"WALKED": cut.rows, "ADD": not whole},
        )  # fmt: skip
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)
