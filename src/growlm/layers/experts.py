"""Routed experts (ModuleFormer, section 3.1; equations 1 and 2): router, grouped products, feed-forward, heads.

A token's result depends on that token alone: no capacity, no token is dropped, whatever else is in the batch. What the
router decided is returned, never kept on a module: layers are re-entrant, and losses and counts are computed from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# n tokens, d hidden size, e experts, k experts of a token, f width of an expert, z width of the router

RouterKind = Literal["mlp", "linear", "cosine"]
Gates = Literal["probabilities", "renormalised"]


@dataclass(frozen=True)
class Routing:
    """What a router decided for n tokens."""

    logits: Tensor  # (n, e), float32
    experts: Tensor  # (n, k) int64: those from the top, the largest gate first, then those that were drawn
    gates: Tensor  # (n, k), float32


_watching: ContextVar[list[Routing] | None] = ContextVar("watching", default=None)


@contextmanager
def watched() -> Iterator[list[Routing]]:
    """Within it, every router's decision is added to the list that this yields, in the order of the forward pass. It
    holds for this thread or task alone, and nothing is kept on the layers."""
    found: list[Routing] = []
    token = _watching.set(found)
    try:
        yield found
    finally:
        _watching.reset(token)


class ExpertRouter(nn.Module):
    """Chooses `top_k` experts for every token by `softmax(A . act(B x))`.

    Args:
        kind: `mlp` as published (A: `embeddings`, B: `project`), `linear` (A alone), or `cosine` (directions compared,
            with a learned temperature).
        size: width between B and A.
        gates: `probabilities` are those of the softmax over all experts and are not renormalised (equation 1);
            `renormalised` is a softmax over the chosen ones' logits.
        num_sampled: of the k, so many are drawn by probability in training instead of taken from the top.
        dropout: of what A reads, in training.

    Raises:
        ValueError: more experts chosen than there are, or more drawn than chosen.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        kind: RouterKind = "mlp",
        size: int = 256,
        gates: Gates = "probabilities",
        num_sampled: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}, expected 1 to num_experts, {num_experts}")
        if not 0 <= num_sampled <= top_k:
            raise ValueError(f"num_sampled is {num_sampled}, expected 0 to top_k, {top_k}")
        if kind not in ("mlp", "linear", "cosine"):
            raise ValueError(f"router kind {kind!r} is not one of mlp, linear, cosine")
        if gates not in ("probabilities", "renormalised"):
            raise ValueError(f"gates {gates!r} is not one of probabilities, renormalised")
        self.num_experts, self.top_k, self.kind, self.gates = num_experts, top_k, kind, gates
        self.num_sampled, self.dropout = num_sampled, dropout
        width = hidden_size if kind == "linear" else size
        self.project = None if kind == "linear" else nn.Linear(hidden_size, size, bias=kind == "mlp")
        self.embeddings = nn.Parameter(torch.empty(num_experts, width))
        self.temperature = nn.Parameter(torch.zeros(1)) if kind == "cosine" else None
        nn.init.normal_(self.embeddings, std=width**-0.5)

    def features(self, hidden: Tensor) -> Tensor:
        """What experts' embeddings are compared with: (n, d) -> (n, z)."""
        if self.project is None:
            return hidden
        features = self.project(hidden)
        if self.kind == "cosine":
            return F.normalize(features, dim=-1)
        return F.dropout(F.gelu(features), self.dropout, self.training)

    def logits(self, features: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """(n, z) -> (n, e) in float32, for these experts or for others' `embeddings` (e', z)."""
        embeddings = self.embeddings if embeddings is None else embeddings
        if self.kind == "cosine":
            assert self.temperature is not None
            return F.linear(features, F.normalize(embeddings, dim=-1)).float() * self.temperature.float().exp()
        return F.linear(features, embeddings.to(features.dtype)).float()

    def forward(self, hidden: Tensor) -> Routing:
        """Routes tokens (n, d)."""
        return self.choose(self.logits(self.features(hidden)))

    def choose(self, logits: Tensor) -> Routing:
        """The choice by logits (n, e)."""
        probabilities = logits.softmax(-1)
        drawn = self.num_sampled if self.training else 0
        gates, experts = probabilities.topk(self.top_k - drawn, dim=-1)
        if drawn:
            left = (probabilities.detach() + 1e-9).scatter(-1, experts, 0.0)
            experts = torch.cat([experts, torch.multinomial(left, drawn)], -1)
            gates = probabilities.gather(-1, experts)
        if self.gates == "renormalised":
            gates = logits.gather(-1, experts).softmax(-1)
        routing = Routing(logits, experts, gates)
        if (found := _watching.get()) is not None:
            found.append(routing)
        return routing


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
    """Whether torch's grouped product takes them: rows of a multiple of 16 bytes, and some of them."""
    return all(m.shape[-1] * m.element_size() % 16 == 0 and len(m) for m in matrices)


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


class SparseFeedForward(nn.Module):
    """Feed-forward experts: `y = sum over the chosen e of g(e|x) W_down[e] act(W_up[e] x)` (SMoE).

    Args:
        gated: the activation of one half of the hidden units multiplies the other half (as SwiGLU).
        bias: a vector added to the result.
        router: settings of `ExpertRouter`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        gated: bool = False,
        bias: bool = False,
        **router: object,
    ) -> None:
        super().__init__()
        self.router = ExpertRouter(hidden_size, num_experts, top_k, **router)  # type: ignore[arg-type]
        self.up = GroupedLinear(num_experts, hidden_size, intermediate_size * (2 if gated else 1))
        self.down = GroupedLinear(num_experts, intermediate_size, hidden_size)
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None
        self.activation, self.gated = activation, gated

    def forward(self, hidden: Tensor) -> tuple[Tensor, Routing]:
        """(..., d) -> (..., d), and how its tokens were routed."""
        tokens = hidden.flatten(0, -2)
        routing = self.router(tokens)
        out = self.apply_to(tokens, routing)
        return out.view(hidden.shape).to(hidden.dtype), routing

    def apply_to(self, tokens: Tensor, routing: Routing) -> Tensor:
        """The chosen experts' sum for tokens (n, d)."""
        dispatch = Dispatch.of(routing.experts, self.router.num_experts)
        inner = self.activate(self.up(dispatch.spread(tokens), dispatch.ends))
        out = dispatch.combine(self.down(inner, dispatch.ends), routing.gates)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def activate(self, inner: Tensor) -> Tensor:
        """Hidden units, (rows, f) or gated (rows, 2 f) -> (rows, f)."""
        if not self.gated:
            return self.activation(inner)
        left, right = inner.chunk(2, -1)
        return self.activation(left) * right


class AttentionExperts(nn.Module):
    """Mixture of attention heads: query and output projections differ by expert, keys and values are shared.

    `queries` and `outputs` are the two halves of one routed layer; attention runs between them.

    Args:
        width: of all heads of one expert together.
    """

    def __init__(
        self, hidden_size: int, width: int, num_experts: int, top_k: int, *, bias: bool = False, **router: object
    ) -> None:
        super().__init__()
        self.router = ExpertRouter(hidden_size, num_experts, top_k, **router)  # type: ignore[arg-type]
        self.query = GroupedLinear(num_experts, hidden_size, width)
        self.output = GroupedLinear(num_experts, width, hidden_size)
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None

    def queries(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Dispatch]:
        """Queries of every chosen expert (n, k, width) of tokens (n, d)."""
        dispatch = Dispatch.of(routing.experts, self.router.num_experts)
        return dispatch.unsort(self.query(dispatch.spread(tokens), dispatch.ends)), dispatch

    def outputs(self, heads: Tensor, routing: Routing, dispatch: Dispatch) -> Tensor:
        """What the chosen experts saw (n, k, width) -> (n, d)."""
        out = dispatch.combine(self.output(dispatch.sort(heads), dispatch.ends), routing.gates)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def per_expert(layer: SparseFeedForward | AttentionExperts) -> dict[str, nn.Parameter]:
    """By name, the tensors of a layer that have one row an expert: both linear maps, and what its router compares
    tokens with."""
    names = ("up", "down") if isinstance(layer, SparseFeedForward) else ("query", "output")
    maps = {f"{name}.weight": getattr(layer, name).weight for name in names}
    return {"router.embeddings": layer.router.embeddings, **maps}
