"""Routing (ModuleFormer, section 3.1; equation 1): which experts a token goes to, and with what gates.

What a router decides is returned, never kept on a module: layers are re-entrant, and losses and counts are computed
from it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growlm.layers.collecting import Collector

# n tokens, d hidden size, e experts, k experts of a token, z width of the router

RouterKind = Literal["mlp", "linear", "cosine"]
Gates = Literal["probabilities", "renormalised"]


@dataclass(frozen=True)
class Routing:
    """What a router decided for n tokens."""

    logits: Tensor  # (n, e), float32
    experts: Tensor  # (n, k) int64: those from the top, the largest gate first, then those that were drawn
    gates: Tensor  # (n, k), float32


_decisions: Collector[Routing] = Collector("routings")


def watched() -> AbstractContextManager[list[Routing]]:
    """Within it, every router's decision is added to the list that this yields, in the order of the forward pass."""
    return _decisions.open()


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
        return _decisions.add(Routing(logits, experts, gates))
