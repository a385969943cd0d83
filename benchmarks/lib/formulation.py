"""ModuleFormer as it was published, operation for operation: what this package's layers are measured against.

Stick-breaking weights are sigmoid times the exponential of a cumulative sum, which is a product with a t x t matrix
(O(t^3)); every head of every chosen expert has its t x t matrices in memory. Experts are a loop over slices of sorted
tokens whose sizes are read back from the device. Runs on the weights of a growlm model with stick-breaking attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from growlm.layers.routing import ExpertRouter
from growlm.model import GrowlmForCausalLM

# b batch, t tokens, d hidden size, e experts, k of a token, g heads of keys, w head width


def states(model: GrowlmForCausalLM, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states after the final norm (b, t, d), and the config's auxiliary loss (mutual information or none)."""
    config = model.config
    assert config.auxiliary_loss in ("mutual_information", "none"), config.auxiliary_loss
    hidden = model.model.embed_tokens(input_ids)
    t = input_ids.shape[1]
    auxiliary = torch.zeros(())
    for layer in model.model.layers:
        assert layer.self_attn.kind == "stickbreaking"
        mask = torch.ones(t, t).triu(1).bool()  # anew in every layer
        cumulative = torch.ones(t, t).tril(-1)
        added, balance = attention(layer.self_attn, layer.input_layernorm(hidden), mask, cumulative)
        hidden = hidden + added
        added, other = feed_forward(layer.mlp, layer.post_attention_layernorm(hidden))
        hidden = hidden + added
        if config.auxiliary_loss != "none":
            auxiliary = auxiliary + config.auxiliary_loss_weight * (balance + other)
    return model.model.norm(hidden), auxiliary


def attention(layer: Any, hidden: Tensor, mask: Tensor, cumulative: Tensor) -> tuple[Tensor, Tensor]:
    """Mixture of attention heads, or ordinary ones: (b, t, d) -> (b, t, d), and its router's balance loss."""
    b, t, _ = hidden.shape
    g, w = layer.kv_heads, layer.head_dim
    assert layer.heads == g
    key = (hidden if layer.k_proj is None else layer.k_proj(hidden)).view(b, t, g, w)
    value = (hidden if layer.v_proj is None else layer.v_proj(hidden)).view(b, t, g, w)
    if layer.experts is None:
        query = layer.q_proj(hidden).view(b, t, 1, g, w)
        out = attend(query, key, value, mask, cumulative)
        return layer.o_proj(out.reshape(b, t, g * w)), torch.zeros(())
    tokens = hidden.reshape(b * t, -1)
    experts, gates, balance = route(layer.experts.router, tokens)
    order, sizes, k = sort(experts, layer.experts.router.num_experts)
    sorted_queries = loop(tokens[order // k], sizes, layer.experts.query.weight)
    query = torch.zeros(b * t * k, g * w, dtype=sorted_queries.dtype).index_add(0, order, sorted_queries)
    out = attend(query.view(b, t, k, g, w), key, value, mask, cumulative)
    result = loop(out.reshape(b * t * k, g * w)[order], sizes, layer.experts.output.weight)
    result = result * gates.flatten()[order][:, None].to(result.dtype)
    return torch.zeros(b * t, result.shape[1], dtype=result.dtype).index_add(0, order // k, result).view_as(
        hidden
    ), balance


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, cumulative: Tensor) -> Tensor:
    """(b, t, k, g, w), (b, t, g, w) twice -> (b, t, k, g, w)."""
    logits = torch.einsum("btkgw,bsgw->bkgts", query, key) / math.sqrt(query.shape[-1])
    stay = F.logsigmoid(-logits).masked_fill(mask, 0.0)
    beta = torch.sigmoid(logits).masked_fill(mask, 0.0)
    weights = beta * torch.einsum("bkgts,sr->bkgtr", stay, cumulative.to(stay.dtype)).exp()
    return torch.einsum("bkgts,bsgw->btkgw", weights, value.to(weights.dtype))


def feed_forward(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    experts = layer.experts
    tokens = hidden.reshape(-1, hidden.shape[-1])
    chosen, gates, balance = route(experts.router, tokens)
    order, sizes, k = sort(chosen, experts.router.num_experts)
    inner = experts.activation(loop(tokens[order // k], sizes, experts.up.weight))
    out = loop(inner, sizes, experts.down.weight) * gates.flatten()[order][:, None].to(inner.dtype)
    return torch.zeros(len(tokens), out.shape[1], dtype=out.dtype).index_add(0, order // k, out).view_as(
        hidden
    ), balance


def route(router: ExpertRouter, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Experts (n, k), gates (n, k) and the mutual-information loss (equations 1, 2 and 7)."""
    assert router.kind == "mlp"
    logits = F.linear(F.gelu(router.project(tokens)), router.embeddings)  # type: ignore[misc]
    probabilities = logits.float().softmax(-1)
    gates, experts = probabilities.topk(router.top_k, dim=-1)
    mean = probabilities.mean(0)
    balance = (mean * (mean + 1e-8).log()).sum() - (probabilities * (probabilities + 1e-8).log()).sum(-1).mean()
    return experts, gates, balance


def sort(experts: Tensor, num_experts: int) -> tuple[Tensor, list[int], int]:
    """The order of choices by expert, how many each has, and k."""
    flat = experts.flatten()
    return flat.sort(stable=True).indices, torch.bincount(flat, minlength=num_experts).tolist(), experts.shape[-1]


def loop(rows: Tensor, sizes: list[int], weights: Tensor) -> Tensor:
    return torch.cat([part @ weight for part, weight in zip(rows.split(sizes), weights, strict=True)])
