"""PEER: a pool of tiny experts, a few hidden neurons each, found by product keys; and product-key memory.

`f(x) = sum over heads, over the retrieved experts i of g_i act(u_i . x) v_i`. A step costs what it retrieves and
nothing that grows with the pool but the sub-keys' scores: gradients of the tables are sparse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growlm.layers.product_keys import ProductKeys, QueryNorm, Retrieval, note
from growlm.layers.rows import Choices, row_products, weighted_rows
from growlm.layers.tables import new_table, require_room_for_rows

# n tokens, d hidden size, h heads, k experts of a head, N experts, f neurons of an expert

Scores = Literal["softmax", "sigmoid"]
_MEAN_SQUARE = 0.42  # of gelu on a unit normal; other activations are near enough


class KeyOptions(TypedDict, total=False):
    """Of the product keys of a pool.

    Attributes:
        key_size: width of a whole key, by default d / 2.
        query_norm, sub_keys, num_open: see `ProductKeys`.
        query_dropout: of the queries, in training.
    """

    key_size: int | None
    query_norm: QueryNorm
    query_dropout: float
    sub_keys: tuple[int, int] | None
    num_open: int | None


class PEER(nn.Module):
    """Parameter-efficient expert retrieval, (batch, tokens, d) -> (batch, tokens, d).

    Initialisation, for inputs of unit variance: `up` has std d^-1/2, hence unit pre-activations; `down` is scaled so
    that the output has an RMS of `output_rms`, the gates then being about 1 / k (softmax) or 1 (sigmoid; a half to
    one). The default is about what a dense feed-forward of width 4 d and std 0.02 gives at d 256. Keys and queries:
    see `ProductKeys`.

    Args:
        scores: gates are the `softmax` of a head's retrieved scores, or the `sigmoid` of each.
        neurons_per_expert: hidden neurons, f.
        gated: the activation of one half of an expert's 2 f products multiplies the other half (as SwiGLU).
        dropout: of the hidden neurons, in training.
        dtype: of the tables' rows, by default torch's.
        keys: see `KeyOptions`.

    Attributes:
        up: (N, f d), or (N, 2 f d) if gated; row i holds the u of expert i, one after the other.
        down: (N, f d), the v. Both get sparse gradients: train them with `growlm.training.optim.make_optimizer`.

    Raises:
        ValueError: sizes that cannot be.
        MemoryError: the tables do not fit into free memory; nothing was allocated.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 65_536,
        num_heads: int = 8,
        top_k: int = 16,
        *,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        scores: Scores = "softmax",
        neurons_per_expert: int = 1,
        gated: bool = False,
        dropout: float = 0.0,
        output_rms: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **keys: Unpack[KeyOptions],
    ) -> None:
        super().__init__()
        _check(scores, neurons_per_expert, dropout)
        width = neurons_per_expert * hidden_size
        widths = (width * 2 if gated else width, width)
        require_room_for_rows(num_experts, sum(widths), device, dtype)
        self.keys = _product_keys(hidden_size, num_experts, num_heads, top_k, device, **keys)
        self.scores, self.activation, self.dropout = scores, activation, dropout
        self.neurons_per_expert, self.gated, self.output_rms = neurons_per_expert, gated, output_rms
        self.up = nn.Parameter(new_table(num_experts, widths[0], device=device, dtype=dtype))
        self.down = nn.Parameter(new_table(num_experts, widths[1], device=device, dtype=dtype))
        self.reset_tables()

    def reset_tables(self) -> None:
        keys = self.keys
        neurons = _gates_square(keys, self.scores) * self.neurons_per_expert * _MEAN_SQUARE
        nn.init.normal_(self.up, std=keys.hidden_size**-0.5)
        nn.init.normal_(self.down, std=self.output_rms * neurons**-0.5)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """(..., d) -> (..., d). `mask` (...) is true for real tokens; padding counts for nothing in the statistics of
        the queries."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        retrieval = self.retrieve(tokens, None if mask is None else mask.flatten())
        return self.apply_to(tokens, retrieval).view(hidden.shape).to(hidden.dtype)

    def retrieve(self, tokens: Tensor, mask: Tensor | None = None) -> Retrieval:
        """The experts for tokens (n, d)."""
        return _retrieve(self.keys, self.scores, tokens, mask)

    def apply_to(self, tokens: Tensor, retrieval: Retrieval) -> Tensor:
        """The retrieved experts' sum for tokens (n, d), in the dtype of the tables."""
        return self.combine(tokens, self.up, self.down, retrieval.experts, retrieval.gates)

    def combine(self, tokens: Tensor, up: Tensor, down: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        """As `apply_to`, with rows from other tables, which `experts` (n, h, k) number."""
        choices = Choices(experts.flatten(1))
        inner = self.activate(row_products(tokens, up, choices).to(gates.dtype))  # (n, h k, f)
        inner = F.dropout(inner, self.dropout, self.training)
        return weighted_rows(inner * gates.flatten(1)[..., None], down, choices)

    def activate(self, inner: Tensor) -> Tensor:
        """Products, (n, h k, f) or gated (n, h k, 2 f) -> hidden neurons (n, h k, f)."""
        if not self.gated:
            return self.activation(inner)
        left, right = inner.chunk(2, -1)
        return self.activation(left) * right

    def extra_repr(self) -> str:
        gated = ", gated" if self.gated else ""
        return f"neurons_per_expert={self.neurons_per_expert}, scores={self.scores}{gated}"


class ProductKeyMemory(nn.Module):
    """Product-key memory, PEER's baseline: `sum of g_i v_i`, values that are looked up, without a neuron.

    Arguments, mask and errors as those of `PEER`; `values` (N, d) start so that the output has an RMS of `output_rms`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 65_536,
        num_heads: int = 8,
        top_k: int = 16,
        *,
        scores: Scores = "softmax",
        dropout: float = 0.0,
        output_rms: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **keys: Unpack[KeyOptions],
    ) -> None:
        super().__init__()
        _check(scores, 1, dropout)
        require_room_for_rows(num_experts, hidden_size, device, dtype)
        self.keys = _product_keys(hidden_size, num_experts, num_heads, top_k, device, **keys)
        self.scores, self.dropout, self.output_rms = scores, dropout, output_rms
        self.values = nn.Parameter(new_table(num_experts, hidden_size, device=device, dtype=dtype))
        self.reset_tables()

    def reset_tables(self) -> None:
        nn.init.normal_(self.values, std=self.output_rms * _gates_square(self.keys, self.scores) ** -0.5)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """(..., d) -> (..., d)."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        found = _retrieve(self.keys, self.scores, tokens, None if mask is None else mask.flatten())
        gates = F.dropout(found.gates, self.dropout, self.training)
        out = weighted_rows(gates.flatten(1)[..., None], self.values, Choices(found.experts.flatten(1)))
        return out.view(hidden.shape).to(hidden.dtype)


def _product_keys(
    hidden_size: int,
    num_experts: int,
    num_heads: int,
    top_k: int,
    device: torch.device | str | None,
    *,
    key_size: int | None = None,
    query_dropout: float = 0.0,
    **others: Any,
) -> ProductKeys:
    width = max(hidden_size // 4 * 2, 2) if key_size is None else key_size
    return ProductKeys(
        hidden_size, num_experts, num_heads, top_k, key_size=width, dropout=query_dropout, device=device, **others
    )


def _retrieve(keys: ProductKeys, kind: Scores, tokens: Tensor, mask: Tensor | None) -> Retrieval:
    scores, experts = keys(tokens, mask)
    if kind == "sigmoid":
        gates = scores.sigmoid()
    else:
        # A head that finds nothing but keys of score -inf contributes nothing.
        nothing = scores[..., :1] == -torch.inf
        gates = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    return note(Retrieval(experts, scores, gates))


def _gates_square(keys: ProductKeys, kind: Scores) -> float:
    """Sum of a token's squared gates at the start."""
    chosen = keys.num_heads * keys.top_k
    return chosen / keys.top_k**2 if kind == "softmax" else chosen


def _check(scores: str, neurons_per_expert: int, dropout: float) -> None:
    if scores not in ("softmax", "sigmoid"):
        raise ValueError(f"scores {scores!r} is not one of softmax, sigmoid")
    if neurons_per_expert < 1:
        raise ValueError(f"neurons_per_expert is {neurons_per_expert}, expected at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, expected 0 to below 1")
