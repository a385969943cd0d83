"""Decoder layers of the from-scratch model: attention and feed-forward, each behind a norm and beside the residual
stream. What a layer's routers decided is returned, never kept; what product keys find, `growlm.layers.retrievals` sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growlm.base.parts import ACT2FN, GradientCheckpointingLayer, LlamaRMSNorm, apply_rotary_pos_emb
from growlm.base.segments import SegmentMask
from growlm.layers.experts import AttentionExperts, SparseFeedForward
from growlm.layers.peer import PEER, ProductKeyMemory
from growlm.layers.stickbreaking import check_shapes, stickbreaking_attention
from growlm.model.configuration import GrowlmConfig

# b batch, t new tokens, s tokens seen so far and new ones, d hidden size, h heads, g heads of keys, w head width


@dataclass(frozen=True)
class Decision:
    """What one router decided for all tokens of a batch."""

    logits: Tensor  # (b t, e)
    experts: Tensor  # (b t, k)


def new_norm(config: GrowlmConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return LlamaRMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


def _router(config: GrowlmConfig) -> dict[str, Any]:
    return {
        "kind": config.router,
        "size": config.router_size,
        "gates": config.router_gates,
        "num_sampled": config.num_sampled_experts,
        "dropout": config.router_dropout,
    }


class GrowlmAttention(nn.Module):
    """Attention of one layer: (b, t, d) -> (b, t, d), and what its router decided."""

    def __init__(self, config: GrowlmConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.kind = config.attention_of(layer_idx)
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.k_proj: nn.Linear | None = None
        self.v_proj: nn.Linear | None = None
        if config.shared_key_value:
            self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.key_value_bias)
            self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.key_value_bias)
        self.experts: AttentionExperts | None = None
        if num_experts := config.attention_experts_of(layer_idx):
            self.experts = AttentionExperts(
                config.hidden_size,
                width,
                num_experts,
                config.attention_experts_per_tok,
                bias=config.expert_bias,
                **_router(config),
            )
        else:
            self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
            self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden: Tensor,
        *,
        mask: Tensor | SegmentMask | None = None,
        documents: Tensor | None = None,
        cache: Any = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Decision | None]:
        """
        Args:
            mask: broadcastable to (b, 1, t, s), False where a key is not to be seen; or to be added, below zero there;
                or which tokens are of one text, where b is 1.
            documents: (b, s); attention stays within a document.
            rotary: cosines and sines, for softmax attention.
        """
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            mask = mask >= 0
        b, t, _ = hidden.shape
        key = self._split(hidden if self.k_proj is None else self.k_proj(hidden))
        value = self._split(hidden if self.v_proj is None else self.v_proj(hidden))
        decision, routing, dispatch = None, None, None
        if self.experts is None:
            query = self.q_proj(hidden)[:, :, None]
        else:
            tokens = hidden.flatten(0, 1)
            routing = self.experts.router(tokens)
            query, dispatch = self.experts.queries(tokens, routing)
            decision = Decision(routing.logits, routing.experts)
        # (b, t, k, g, h/g, w) -> (b, g k h/g, t, w): heads that share keys stand together
        query = query.view(b, t, -1, self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        inner = query.shape[2:]
        query = query.permute(0, 3, 2, 4, 1, 5).flatten(1, 3)
        if self.kind == "softmax":
            assert rotary is not None
            query, key = apply_rotary_pos_emb(query, key, *rotary)
        if cache is not None:
            key, value = _joined(cache, key, value, self.layer_idx)
            mask = mask[..., : key.shape[2]] if isinstance(mask, Tensor) else mask
        attention = softmax_attention if self.kind == "softmax" else stickbreaking_attention
        if isinstance(mask, SegmentMask):
            out = mask.attend_each(query, attention)
        else:
            out = attention(query, key, value, mask=mask, documents=documents)
        out = out.view(b, self.kv_heads, inner[0], inner[2], t, self.head_dim).permute(0, 4, 2, 1, 3, 5)
        if self.experts is None:
            return self.o_proj(out.reshape(b, t, -1)), None
        assert routing is not None
        assert dispatch is not None
        heads = out.reshape(b * t, inner[0], -1)
        return self.experts.outputs(heads, routing, dispatch).view(b, t, -1).to(hidden.dtype), decision

    def _split(self, hidden: Tensor) -> Tensor:
        return hidden.view(*hidden.shape[:2], self.kv_heads, self.head_dim).transpose(1, 2)


def _joined(cache: Any, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
    """Keys and values of all tokens so far. A cache of fixed size returns the room that is left as well."""
    seen = cache.get_seq_length(layer_idx) if getattr(cache, "is_compileable", False) else None
    total = None if seen is None else int(seen) + key.shape[2]
    key, value = cache.update(key, value, layer_idx)
    return key[:, :, :total], value[:, :, :total]


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, documents: Tensor | None = None
) -> Tensor:
    """Causal softmax attention with the arguments of `stickbreaking_attention`; masks are whole (t, s) tensors.

    Raises:
        ValueError: shapes that do not fit one another.
    """
    check_shapes(query, key, value, mask, documents)
    t, s = query.shape[2], key.shape[2]
    if mask is None and documents is None and (t == s or t == 1):
        return F.scaled_dot_product_attention(query, key, value, is_causal=t > 1, enable_gqa=True)
    seen = torch.ones(t, s, dtype=torch.bool, device=query.device).tril(s - t)[None, None]
    itself = torch.eye(s, dtype=torch.bool, device=query.device)[s - t :]
    if mask is not None:
        seen = seen & mask | itself  # a query of padding sees itself, so that its softmax is defined
    if documents is not None:
        seen = seen & (documents[:, None, s - t :, None] == documents[:, None, None, :])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)


class GrowlmMLP(nn.Module):
    """Dense feed-forward: (b, t, d) -> (b, t, d)."""

    def __init__(self, config: GrowlmConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False) if config.gated else None
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(hidden)))
        return self.down_proj(self.activation(self.gate_proj(hidden)) * self.up_proj(hidden))


class GrowlmExperts(nn.Module):
    """Routed feed-forward of one layer."""

    def __init__(self, config: GrowlmConfig, layer_idx: int) -> None:
        super().__init__()
        self.experts = SparseFeedForward(
            config.hidden_size,
            config.intermediate_size,
            config.experts_of(layer_idx),
            config.num_experts_per_tok,
            activation=ACT2FN[config.hidden_act],
            gated=config.gated,
            bias=config.expert_bias,
            **_router(config),
        )

    def forward(self, hidden: Tensor) -> tuple[Tensor, Decision]:
        out, routing = self.experts(hidden)
        return out, Decision(routing.logits, routing.experts)


def _feed_forward(config: GrowlmConfig, layer_idx: int) -> nn.Module:
    match config.feed_forward_of(layer_idx):
        case "experts":
            return GrowlmExperts(config, layer_idx)
        case "peer":
            return PEER(**config.product_keys_of(layer_idx), activation=ACT2FN[config.hidden_act])
        case "memory":
            return ProductKeyMemory(**config.product_keys_of(layer_idx))
    return GrowlmMLP(config)


@contextmanager
def _buffers_kept(module: nn.Module, keep: bool) -> Iterator[None]:
    """Undoes what a pass changes in the running statistics, if it is to be undone."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()] if keep else []
    try:
        yield
    finally:  # a pass that computes gradients anew is left by an exception, as soon as it has all it needs
        for buffer, value in before:
            buffer.copy_(value)


class GrowlmDecoderLayer(GradientCheckpointingLayer):
    """One layer; called as transformers' own decoder layers are."""

    def __init__(self, config: GrowlmConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = new_norm(config)
        self.self_attn = GrowlmAttention(config, layer_idx)
        self.post_attention_layernorm = new_norm(config)
        self.mlp = _feed_forward(config, layer_idx)
        self.dropout = config.dropout

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            kwargs["passes"] = []
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | SegmentMask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Any = None,
        document_ids: Tensor | None = None,
        output_routings: bool = False,
        real_tokens: Tensor | None = None,
        passes: list[None] | None = None,
        **_: Any,
    ) -> Any:
        """Hidden states (b, t, d); with `output_routings` also the logits and choices of both routers, or None.

        Args:
            cache: or `past_key_values`, under the name that the installed transformers drops it by, where gradient
                checkpointing has no use for it.
            real_tokens: (b, t), false for padding, which then counts for nothing in statistics over the batch.
            passes: of gradient checkpointing: grows by one with every pass over the same input, of which only the
                first counts.
        """
        again = bool(passes)
        if passes is not None:
            passes.append(None)
        attended, attention = self.self_attn(
            self.input_layernorm(hidden_states),
            mask=attention_mask,
            documents=document_ids,
            cache=past_key_values if cache is None else cache,
            rotary=position_embeddings,
        )
        hidden_states = hidden_states + F.dropout(attended, self.dropout, self.training)
        normed = self.post_attention_layernorm(hidden_states)
        feed_forward = None
        if isinstance(self.mlp, GrowlmExperts):
            added, feed_forward = self.mlp(normed)
        elif isinstance(self.mlp, PEER | ProductKeyMemory):
            with _buffers_kept(self.mlp, again):
                added = self.mlp(normed, real_tokens)
        else:
            added = self.mlp(normed)
        hidden_states = hidden_states + F.dropout(added, self.dropout, self.training)
        if not output_routings:
            return hidden_states
        flat = [x for d in (attention, feed_forward) for x in ((d.logits, d.experts) if d else (None, None))]
        return (hidden_states, *flat)
