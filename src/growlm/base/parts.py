"""Parts: what our own language model takes over from transformers' layers, in one place."""

from __future__ import annotations

from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.utils.generic import can_return_tuple

__all__ = [
    "ACT2FN", "GradientCheckpointingLayer", "LlamaRMSNorm", "LlamaRotaryEmbedding", "apply_rotary_pos_emb",
    "can_return_tuple",
]  # fmt: skip
