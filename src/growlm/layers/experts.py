"""Routed experts (ModuleFormer, section 3.1; equation 2): a feed-forward, and attention heads, of many experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growlm.layers.grouped import Dispatch, GroupedLinear
from growlm.layers.routing import ExpertRouter, Routing

# n tokens, d hidden size, e experts, k experts of a token, f width of an expert


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
