"""Stick-breaking attention: the kernels that `stickbreaking.py` launches, and the formulas in them.

A program walks from the newest block of keys that its queries see to the oldest, and ends where every stick of the
block is used up, or where the queries' documents begin. Blocks of keys are counted from key 0, so that all kernels cut
them alike. Offsets that grow with batch, heads or tokens are of 64 bits; within a block they are of 32.

The sum over newer keys within a block. Of 16-bit inputs it is a product with a triangle of ones: `tl.cumsum` along the
keys takes what a tensor core returns through shared memory and back, twice, and shuffles it between lanes, where the
triangle takes it from registers and adds keys of the block / (2 widths) to the products that are made anyway; on Hopper
these wait for exponentials and logarithms, of which a multiprocessor makes 16 a clock and a logit wants 3. Each summand
goes in as two bfloat16 (16 bits of mantissa; the total that a block hands to the next is summed in float32). Of float32
inputs, whose products are made without tensor cores, it is `tl.cumsum`: the triangle would cost as much as the logits.

So do the weights where values are summed up: an error of the output is one of grad . out, which the backward pass takes
from the gradient of every logit down to where the stick is broken. Of weights in one bfloat16 the gradient of a query
was off by up to 2.5e-2 of its largest magnitude, where two leave 5e-3.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from triton.language.extra import libdevice

# b batch, h heads of queries, g heads of keys and values, n = h / g, t queries, s keys, d head width, e width of values
# rows: queries of a block; in decode those of all n heads. s - t: keys before the first query

INTERPRETED = bool(triton.knobs.runtime.interpret)

_INTERPRETED = tl.constexpr(INTERPRETED)
_PRECISION = tl.constexpr("ieee")  # of products in float32
_LOG2E = tl.constexpr(math.log2(math.e))
# As in `growlm/layers/stickbreaking.py`, here of base 2.
_SURE = tl.constexpr(120.0)
_GONE = tl.constexpr(80.0 * math.log2(math.e))
_BROKEN = tl.constexpr(17.0 * math.log2(math.e))
_NOTHING = tl.constexpr(1e9)  # -log of a stick that was not followed to where it would be asked for


# What the kernels share


@triton.jit
def _dot(a, b, NARROW: tl.constexpr):
    if _INTERPRETED:  # it multiplies bfloat16 as if they were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    if NARROW:
        return tl.dot(a, b)
    return tl.dot(a, b, input_precision=_PRECISION)


@triton.jit
def _exact_dot(x, y, NARROW: tl.constexpr):
    """The product of x, in float32, and y: if that is narrow, x goes in as two numbers of its dtype."""
    high = x.to(y.dtype)
    total = _dot(high, y, NARROW)
    if NARROW:
        total += _dot((x - high.to(tl.float32)).to(y.dtype), y, NARROW)
    return total


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
    series = few * (_LOG2E - few * (_LOG2E / 2 - few * (_LOG2E / 3 - few * (_LOG2E / 4))))
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
        return _exact_dot(x, triangle, NARROW)
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
                total += _exact_dot(weights, values, NARROW)
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
            total += _exact_dot(weights, values, NARROW)
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
