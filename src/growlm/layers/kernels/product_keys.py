"""Product keys in Triton: the best sub-keys of a half query, and the best sums of two halves.

Scores of sub-keys exist for a block of them at a time; what stays is the best so far. Of equal scores, the smaller id
is better, and of equal sums the smaller pair (i, j). NaN is the largest score, as torch has it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# q queries, z their width, N sub-keys, k best of them

_MOST = 32  # k that is kept in registers
_QUERIES, _KEYS, _FEATURES = 64, 64, 32  # of a block, where keys are compared
_SUMMED = 16  # queries of a block, where sums are


def fits(top_k: int, *tensors: Tensor) -> bool:
    """Whether these kernels take them."""
    return top_k <= _MOST and all(x.dtype == torch.float32 for x in tensors)


def best_keys(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of `queries @ keys.T`, in descending order, and where: (q, z), (N, z) -> (q, k) twice.

    Products are in three parts of TF32, which together are about as exact as float32.
    """
    q, z = queries.shape
    scores = queries.new_empty(q, k)
    ids = torch.empty(q, k, dtype=torch.int64, device=queries.device)
    if not scores.numel():
        return scores, ids
    block_q, block_n = _QUERIES, _KEYS
    block_z = min(max(triton.next_power_of_2(z), 16), _FEATURES)  # 16: the least of a product
    precision = "ieee" if torch.version.hip else "tf32x3"
    with torch.cuda.device_of(queries):
        _best_keys[triton.cdiv(q, block_q),](
            queries, keys, scores, ids, q, len(keys), *queries.stride(), *keys.stride(),
            z=z, k=k, most=triton.next_power_of_2(k), precision=precision, block_q=block_q, block_n=block_n,
            block_z=block_z, num_warps=4,
        )  # fmt: skip
    return scores, ids


def best_sums(scores_a: Tensor, scores_b: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `top_k` largest `scores_a[i] + scores_b[j]` of descending scores (q, k_a) and (q, k_b), and their i and j."""
    return _BestSums.apply(scores_a, scores_b, top_k)


class _BestSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_a: Tensor, scores_b: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k_a, k_b = len(scores_a), scores_a.shape[1], scores_b.shape[1]
        scores = scores_a.new_empty(q, k)
        at_a, at_b = (torch.empty(q, k, dtype=torch.int64, device=scores.device) for _ in range(2))
        pairs = _pairs(k_a, k_b, k, scores.device)
        block_q = _SUMMED
        if scores.numel():
            with torch.cuda.device_of(scores):
                _best_sums[triton.cdiv(q, block_q),](
                    scores_a.contiguous(), scores_b.contiguous(), pairs, scores, at_a, at_b, q, k_a, k_b,
                    pairs.shape[1], k=k, block_q=block_q, block_p=triton.next_power_of_2(pairs.shape[1]), num_warps=4,
                )  # fmt: skip
        ctx.save_for_backward(at_a, at_b)
        ctx.sizes = k_a, k_b
        ctx.mark_non_differentiable(at_a, at_b)
        return scores, at_a, at_b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad = grad.contiguous()
        of_a, of_b = (
            _to_their_places(grad, at, size) if needed else None
            for at, size, needed in zip(ctx.saved_tensors, ctx.sizes, ctx.needs_input_grad[:2], strict=True)
        )
        return of_a, of_b, None


def _to_their_places(grad: Tensor, at: Tensor, size: int) -> Tensor:
    """Adds grad (q, k) where it came from, `at` (q, k), in the same order each time: (q, size)."""
    q, k = grad.shape
    out = grad.new_empty(q, size)
    if out.numel():
        block_q = 64
        with torch.cuda.device_of(grad):
            _places[triton.cdiv(q, block_q),](
                grad, at, out, q, size, k=k, block_q=block_q, block=triton.next_power_of_2(size), num_warps=4
            )
    return out


@functools.cache
def _pairs(k_a: int, k_b: int, k: int, device: torch.device) -> Tensor:
    """Which can be among the k best of descending scores (2, pairs) int32: see `best_sums` of the layer."""
    pairs = [(i, j) for i in range(k_a) for j in range(min(k // (i + 1), k_b))]
    return torch.tensor(pairs, dtype=torch.int32, device=device).T.contiguous()


@triton.jit
def _ordered(scores):
    """32-bit integers in the order of float32 scores; the smallest is that of none."""
    scores = tl.where(scores == 0, 0.0, scores)  # of two signs
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.where(scores == scores, bits, 0x7FFFFFFF)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # larger magnitudes of negative numbers are smaller


@triton.jit
def _scores(ordered):
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _best(found, ids):
    """The largest of each row, and of equal ones the smallest id."""
    best = tl.max(found, 1)
    return best, tl.min(tl.where(found == best[:, None], ids, 0x7FFFFFFF), 1)


@triton.jit
def _worst(found, ids):
    """The smallest of each row, and of equal ones the largest id."""
    worst = tl.min(found, 1)
    return worst, tl.max(tl.where(found == worst[:, None], ids, -0x7FFFFFFF), 1)


@triton.jit(do_not_specialize=["num_queries"])
def _best_keys(
    queries, keys, out_scores, out_ids, num_queries, num_keys, query_stride, query_step, key_stride, key_step,
    z: tl.constexpr, k: tl.constexpr, most: tl.constexpr, precision: tl.constexpr,
    block_q: tl.constexpr, block_n: tl.constexpr, block_z: tl.constexpr,
):  # fmt: skip
    """Some queries, all keys. While any query's best score of a block is better than the worst that it kept, all
    queries' best scores take the place of their worst, where they are better: after the first blocks few are. Ids
    ascend, so that what is kept is better than what comes later with the same score."""
    nothing: tl.constexpr = -0x80000000  # below -inf
    query = tl.program_id(0).to(tl.int64) * block_q + tl.arange(0, block_q)
    asked = query < num_queries
    place = tl.arange(0, most)[None, :]
    kept = tl.full((block_q, most), nothing, tl.int32)
    ids = tl.zeros((block_q, most), tl.int32) - 1 - place  # of none, each another
    worst, worst_id = _worst(kept, ids)
    for first in range(0, num_keys, block_n):
        key = first + tl.arange(0, block_n)
        real = key < num_keys
        scores = tl.zeros((block_q, block_n), tl.float32)
        for at in range(0, z, block_z):
            feature = at + tl.arange(0, block_z)
            inside = feature < z
            left = tl.load(
                queries + query[:, None] * query_stride + feature[None, :] * query_step,
                asked[:, None] & inside[None, :], 0,
            )  # fmt: skip
            right = tl.load(
                keys + key[None, :].to(tl.int64) * key_stride + feature[:, None] * key_step,
                real[None, :] & inside[:, None], 0,
            )  # fmt: skip
            scores = tl.dot(left, right, scores, input_precision=precision)
        found = tl.where(real[None, :] & asked[:, None], _ordered(scores), nothing)
        best, best_id = _best(found, key[None, :])
        while tl.max((best > worst).to(tl.int32), 0) > 0:
            taken = (best > worst)[:, None] & (kept == worst[:, None]) & (ids == worst_id[:, None])
            kept = tl.where(taken, best[:, None], kept)
            ids = tl.where(taken, best_id[:, None], ids)
            found = tl.where(key[None, :] == best_id[:, None], nothing, found)
            worst, worst_id = _worst(kept, ids)
            best, best_id = _best(found, key[None, :])
    for t in range(k):
        best, best_id = _best(kept, ids)
        tl.store(out_scores + query * k + t, _scores(best), asked)
        tl.store(out_ids + query * k + t, best_id, asked)
        kept = tl.where(ids == best_id[:, None], nothing, kept)


@triton.jit(do_not_specialize=["num_queries"])
def _best_sums(
    scores_a, scores_b, pairs, out_scores, out_a, out_b, num_queries, k_a, k_b, num_pairs,
    k: tl.constexpr, block_q: tl.constexpr, block_p: tl.constexpr,
):  # fmt: skip
    """Some queries, all pairs."""
    nothing: tl.constexpr = -0x80000000
    query = tl.program_id(0).to(tl.int64) * block_q + tl.arange(0, block_q)
    asked = query < num_queries
    pair = tl.arange(0, block_p)
    real = pair < num_pairs
    i = tl.load(pairs + pair, real, 0)
    j = tl.load(pairs + num_pairs + pair, real, 0)
    both = asked[:, None] & real[None, :]
    a = tl.load(scores_a + query[:, None] * k_a + i[None, :], both, 0)
    b = tl.load(scores_b + query[:, None] * k_b + j[None, :], both, 0)
    found = tl.where(real[None, :], _ordered(a + b), nothing)
    for t in range(k):
        best, which = _best(found, pair[None, :])
        to = query * k + t
        tl.store(out_scores + to, _scores(best), asked)
        tl.store(out_a + to, tl.load(pairs + which, asked, 0), asked)
        tl.store(out_b + to, tl.load(pairs + num_pairs + which, asked, 0), asked)
        found = tl.where(pair[None, :] == which[:, None], nothing, found)


@triton.jit(do_not_specialize=["num_queries"])
def _places(grad, at, out, num_queries, size, k: tl.constexpr, block_q: tl.constexpr, block: tl.constexpr):
    query = tl.program_id(0).to(tl.int64) * block_q + tl.arange(0, block_q)
    asked = query < num_queries
    place = tl.arange(0, block)
    total = tl.zeros((block_q, block), tl.float32)
    for t in range(k):
        to = tl.load(at + query * k + t, asked, 0)
        value = tl.load(grad + query * k + t, asked, 0)
        total += tl.where(to[:, None] == place[None, :], value[:, None], 0.0)
    tl.store(out + query[:, None] * size + place[None, :], total, asked[:, None] & (place < size)[None, :])
