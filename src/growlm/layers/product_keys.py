"""Product keys: the k best of N = n_a n_b keys, found by comparing a query with n_a + n_b sub-keys (PEER).

Exact: the k best by the sum of both halves' scores, as if all N keys had been compared. What was retrieved is returned,
never kept on a module.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from growlm.layers import kernels
from growlm.layers.collecting import Collector
from growlm.layers.rows import Choices, table_gradient, weighted_sum
from growlm.layers.tables import require_room

# n tokens, d hidden size, h heads, k retrieved by a head, z key width, a and b sub-keys of the two sides

QueryNorm = Literal["batch", "layer", "none"]
_LOPSIDED = 8  # times 2 sqrt(N) sub-keys are refused: searching would no longer be cheap
_MOST = 1 << 40  # experts of a pool: factors of larger numbers would take long to find
_HELD = 1 << 20  # scores held at a time: they stay in the cache until the best have been taken


@dataclass(frozen=True)
class Retrieval:
    """What was found for n tokens."""

    experts: Tensor  # (n, h, k) int64; a head's best first
    scores: Tensor  # (n, h, k) float32
    gates: Tensor  # (n, h, k) float32


_found: Collector[Retrieval] = Collector("retrievals")


def retrievals() -> AbstractContextManager[list[Retrieval]]:
    """Within it, what every layer of product keys finds is added to the list that this yields, in the order of the
    forward pass."""
    return _found.open()


def note(retrieval: Retrieval) -> Retrieval:
    """Adds it to the list of `retrievals`, if that is open."""
    return _found.add(retrieval)


def sub_key_counts(num_experts: int) -> tuple[int, int]:
    """The factors (a, b) of `num_experts` that are nearest to each other, a <= b.

    Raises:
        ValueError: they are far apart, as those of a prime are; says which numbers nearby will do.
    """
    if not 1 <= num_experts <= _MOST:
        raise ValueError(f"num_experts is {num_experts}, expected 1 to {_MOST}")
    a = _smaller_factor(num_experts)
    if not _usable(num_experts):
        below = next(n for n in range(num_experts - 1, 0, -1) if _usable(n))
        above = next(n for n in range(num_experts + 1, 4 * num_experts) if _usable(n))
        raise ValueError(
            f"num_experts is {num_experts}, at best {a} x {num_experts // a} sub-keys, which are too unequal to search "
            f"quickly; use {below} or {above}, or give sub_keys=(a, b)"
        )
    return a, num_experts // a


def _smaller_factor(number: int) -> int:
    return next(a for a in range(math.isqrt(number), 0, -1) if number % a == 0)


def _usable(number: int) -> bool:
    a = _smaller_factor(number)
    return (a + number // a) ** 2 <= _LOPSIDED**2 * number


class ProductKeys(nn.Module):
    """Finds the `top_k` of `num_experts` keys with the largest products `query . key`, for each of `num_heads` queries
    of a token. Key i = a n_b + b is [c_a ; c'_b]; heads have queries of their own and share all keys.

    Initialisation: queries are of unit variance for inputs of unit variance, sub-keys have std key_size^-1/2, hence
    scores have unit variance.

    Args:
        num_experts: keys; any number with two factors that are not too unequal.
        sub_keys: (n_a, n_b) instead of the nearest factors.
        key_size: width of a whole key.
        query_norm: `batch` makes the use of experts even: each feature of the queries is normalised over the real
            tokens of a training batch; in evaluation by the running statistics, so that a token's result does not
            depend on what else is in the batch. `layer` normalises every head's query by itself.
        dropout: of the queries, in training.
        num_open: rows of side a that can be found, by default all. Side a grows by appending rows, which renumbers
            nothing; as long as they are not open, everything is computed as without them, to the bit.

    Raises:
        ValueError: sizes that cannot be; says what was given and what is possible.
        MemoryError: the queries do not fit into free memory; nothing was allocated.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_heads: int,
        top_k: int,
        *,
        key_size: int = 128,
        query_norm: QueryNorm = "batch",
        dropout: float = 0.0,
        sub_keys: tuple[int, int] | None = None,
        num_open: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("num_heads", num_heads)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if key_size < 2 or key_size % 2:
            raise ValueError(f"key_size is {key_size}, expected an even number: half for each sub-key")
        if query_norm not in ("batch", "layer", "none"):
            raise ValueError(f"query_norm {query_norm!r} is not one of batch, layer, none")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, expected 0 to below 1")
        a, b = sub_keys if sub_keys is not None else sub_key_counts(num_experts)
        if min(a, b) < 1 or a * b != num_experts:
            raise ValueError(f"sub_keys are {a} x {b} = {a * b} keys, expected num_experts, {num_experts}")
        self.num_open = a if num_open is None else num_open
        if not 1 <= self.num_open <= a:
            raise ValueError(f"num_open is {num_open}, expected 1 to the rows of side a, {a}")
        if not 1 <= top_k <= self.num_open * b:
            raise ValueError(f"top_k is {top_k}, expected 1 to the experts that can be found, {self.num_open * b}")
        self.hidden_size, self.num_experts, self.num_heads, self.top_k = hidden_size, num_experts, num_heads, top_k
        self.key_size, self.dropout = key_size, dropout
        cure = "use fewer heads or a smaller key_size"
        require_room(f"the queries of {num_heads} heads", hidden_size * num_heads * key_size, cure, device, None)
        self.query = nn.Linear(hidden_size, num_heads * key_size, bias=False, device=device)
        self.norm: nn.Module | None = None
        if query_norm == "batch":
            self.norm = MaskedBatchNorm(num_heads * key_size, device=device)
        elif query_norm == "layer":
            self.norm = nn.LayerNorm(key_size, device=device)
        self.keys_a = nn.Parameter(torch.empty(a, key_size // 2, device=device))
        self.keys_b = nn.Parameter(torch.empty(b, key_size // 2, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.query.weight, std=self.hidden_size**-0.5)
        for keys in (self.keys_a, self.keys_b):
            nn.init.normal_(keys, std=self.key_size**-0.5)

    def queries(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(n, d), and which tokens are real (n,) -> (n, h, z), float32."""
        queries = self.query(tokens)
        if queries.dtype != torch.float64:
            queries = queries.float()
        if isinstance(self.norm, MaskedBatchNorm):
            queries = self.norm(queries, mask)
        queries = queries.unflatten(-1, (self.num_heads, self.key_size))
        if isinstance(self.norm, nn.LayerNorm):
            queries = F.layer_norm(
                queries, (self.key_size,), self.norm.weight.to(queries), self.norm.bias.to(queries), self.norm.eps
            )
        return F.dropout(queries, self.dropout, self.training)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (n, d), and which are real (n,) -> scores (n, h, k), the largest first, and experts (n, h, k)."""
        return self.search(self.queries(tokens, mask))

    @torch.compiler.disable
    def search(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (n, h, z) -> scores and experts (n, h, k)."""
        half_a, half_b = queries.flatten(0, 1).chunk(2, -1)
        with torch.autocast(queries.device.type, enabled=False):
            scores_a, a = best_keys(half_a, self.keys_a[: self.num_open].to(queries.dtype), self.top_k)
            scores_b, b = best_keys(half_b, self.keys_b.to(queries.dtype), self.top_k)
        scores, at_a, at_b = best_sums(scores_a, scores_b, self.top_k)
        experts = a.gather(-1, at_a) * len(self.keys_b) + b.gather(-1, at_b)
        shape = (len(queries), self.num_heads, self.top_k)
        return scores.view(shape), experts.view(shape)

    def extra_repr(self) -> str:
        a, b = len(self.keys_a), len(self.keys_b)
        opened = "" if self.num_open == a else f", {self.num_open} rows open"
        return f"{self.num_experts} experts = {a} x {b}, {self.num_heads} heads, top_k={self.top_k}{opened}"


def best_keys(queries: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The largest min(top_k, N) of `queries @ keys.T`, in descending order, and where: (m, z), (N, z) -> (m, k) twice.

    The backward pass reads and writes the chosen keys alone; all scores exist for a part of the queries only.
    """
    return _BestKeys.apply(queries, keys, min(top_k, len(keys)))


class _BestKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if fast := _kernels(k, queries, keys):
            scores, ids = fast.best_keys(queries, keys, k)
        else:
            scores = queries.new_empty(len(queries), k)
            ids = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
            size = max(_HELD // len(keys), 1)
            for at in range(0, len(queries), size):
                part = slice(at, at + size)
                torch.topk(queries[part] @ keys.T, k, -1, out=(scores[part], ids[part]))
        ctx.save_for_backward(queries, keys, ids)
        ctx.mark_non_differentiable(ids)
        return scores, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        queries, keys, ids = ctx.saved_tensors
        grad = grad.contiguous()[..., None]
        for_queries = weighted_sum(grad, keys, ids) if ctx.needs_input_grad[0] else None
        for_keys = None
        if ctx.needs_input_grad[1]:
            for_keys = table_gradient(grad, queries.contiguous(), keys, Choices(ids), False)
        return for_queries, for_keys, None


def best_sums(scores_a: Tensor, scores_b: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `top_k` largest `scores_a[i] + scores_b[j]` of descending scores (m, k_a) and (m, k_b), and their i and j.

    The sum at (i, j) is no larger than the (i+1)(j+1) sums at or before it, so that only pairs with (i+1)(j+1) <= k
    are compared: 50 of 256 for k = 16.
    """
    if fast := _kernels(top_k, scores_a, scores_b):
        return fast.best_sums(scores_a, scores_b, top_k)
    pairs = [(i, j) for i in range(scores_a.shape[1]) for j in range(min(top_k // (i + 1), scores_b.shape[1]))]
    i, j = torch.tensor(pairs, device=scores_a.device).T
    scores, best = (scores_a[:, i] + scores_b[:, j]).topk(top_k, -1)
    return scores, i[best], j[best]


def _kernels(top_k: int, *tensors: Tensor) -> ModuleType | None:
    """The same in Triton, where it can take them."""
    if not kernels.available(tensors[0].device):
        return None
    from growlm.layers.kernels import product_keys

    return product_keys if product_keys.fits(top_k, *tensors) else None


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch norm over the real tokens of a batch; over running statistics in evaluation, or for a lone token."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(n, features) and (n,), true where a token is real -> (n, features)."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        # Copies: what a later pass changes in the statistics is nothing to the gradient of this one.
        mean, var = self.running_mean.to(x.dtype, copy=True), self.running_var.to(x.dtype, copy=True)
        if not self.training:
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        if mask is None and len(x) > 1:  # the same as below, with nothing but x kept for the backward pass
            out = F.batch_norm(x, mean, var, weight, bias, True, self.momentum, self.eps)
            self._keep(mean, var)
            return out
        if mask is None:
            mask = torch.ones(len(x), dtype=torch.bool, device=x.device)
        real = mask.bool()[:, None]
        x = x.masked_fill(~real, 0)
        count = real.sum()
        lone = count < 2  # has no variance
        of_batch = x.sum(0) / count.clamp(min=1)
        deviation = ((x - of_batch).square() * real).sum(0)
        with torch.no_grad():
            rate = self.momentum * (~lone).to(x.dtype)
            self._keep(mean.lerp(of_batch, rate), var.lerp(deviation / (count - 1).clamp(min=1), rate))
        mean = torch.where(lone, mean, of_batch)
        var = torch.where(lone, var, deviation / count.clamp(min=1))
        return (x - mean) * (var + self.eps).rsqrt() * weight + bias

    @torch.no_grad()
    def _keep(self, mean: Tensor, var: Tensor) -> None:
        """As the running statistics."""
        assert self.running_mean is not None
        assert self.running_var is not None
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
