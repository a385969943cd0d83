"""Anatomy: where each model family keeps the parts that a knowledge module touches.

One explicit entry per family, read as a table. Knows names only: nothing here runs a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from growlm.errors import BaseModelError


@dataclass(frozen=True)
class Anatomy:
    """Attribute names of one family, as transformers spells them.

    `zeroed` lists the parameters of a decoder layer that make it the identity when set to the given value: the
    projections that write into the residual stream, or, where a norm stands behind those (post-norm), that norm's
    gain: a zero fed into a norm would blow its gradient up.
    """

    decoder: str  # the stack, inside the causal language model
    embedding: str  # inside the decoder, as are the next two
    layers: str
    norm: str
    head: str  # inside the causal language model
    attention: str  # inside a layer, as is the next
    feed_forward: str
    zeroed: tuple[tuple[str, float], ...]
    positions: str | None = None  # learned position embeddings, inside the decoder; None: rotary
    sliding_everywhere: bool = False  # config.sliding_window, where set, holds for every layer
    per_layer_settings: tuple[str, ...] = ("layer_types",)  # settings that may be lists with one entry a layer
    masks_padding_only: bool = False  # attention is causal by itself: a mask (b, 1, 1, s) says what is padded
    unbounded: bool = False  # attention without positions: no text is too long
    scaled_embedding: bool = False  # the embedding multiplies its rows by sqrt(hidden_size)
    rotary_by_pattern: bool = False  # each attention pattern turns by frequencies of its own


_PRE_NORM = (
    ("self_attn.o_proj.weight", 0.0),
    ("self_attn.o_proj.bias", 0.0),
    ("mlp.down_proj.weight", 0.0),
    ("mlp.down_proj.bias", 0.0),
)
# Behind the projections: the gain of this family's RMSNorm is 1 + weight.
_GEMMA_NORMS = (("post_attention_layernorm.weight", -1.0), ("post_feedforward_layernorm.weight", -1.0))
_LLAMA: dict[str, Any] = {
    "decoder": "model",
    "embedding": "embed_tokens",
    "layers": "layers",
    "norm": "norm",
    "head": "lm_head",
    "attention": "self_attn",
    "feed_forward": "mlp",
}

FAMILIES: dict[str, Anatomy] = {
    "llama": Anatomy(**_LLAMA, zeroed=_PRE_NORM),
    "qwen2": Anatomy(**_LLAMA, zeroed=_PRE_NORM),
    "qwen3": Anatomy(**_LLAMA, zeroed=_PRE_NORM),
    "mistral": Anatomy(**_LLAMA, zeroed=_PRE_NORM, sliding_everywhere=True),
    "gemma2": Anatomy(**_LLAMA, zeroed=_GEMMA_NORMS, scaled_embedding=True),
    "gemma3_text": Anatomy(**_LLAMA, zeroed=_GEMMA_NORMS, scaled_embedding=True, rotary_by_pattern=True),
    "gpt_neox": Anatomy(
        decoder="gpt_neox",
        embedding="embed_in",
        layers="layers",
        norm="final_layer_norm",
        head="lm_head",
        attention="attention",
        feed_forward="mlp",
        zeroed=(
            ("attention.dense.weight", 0.0),
            ("attention.dense.bias", 0.0),
            ("mlp.dense_4h_to_h.weight", 0.0),
            ("mlp.dense_4h_to_h.bias", 0.0),
        ),
    ),
    "olmo2": Anatomy(
        **_LLAMA,
        zeroed=(("post_attention_layernorm.weight", 0.0), ("post_feedforward_layernorm.weight", 0.0)),
    ),
    "phi3": Anatomy(**_LLAMA, zeroed=_PRE_NORM, sliding_everywhere=True),
    "smollm3": Anatomy(**_LLAMA, zeroed=_PRE_NORM, per_layer_settings=("layer_types", "no_rope_layers")),
    "gpt2": Anatomy(
        decoder="transformer",
        embedding="wte",
        layers="h",
        norm="ln_f",
        head="lm_head",
        attention="attn",
        feed_forward="mlp",
        zeroed=(
            ("attn.c_proj.weight", 0.0),
            ("attn.c_proj.bias", 0.0),
            ("mlp.c_proj.weight", 0.0),
            ("mlp.c_proj.bias", 0.0),
        ),
        positions="wpe",
    ),
    "growlm": Anatomy(
        **_LLAMA,
        zeroed=(
            ("self_attn.o_proj.weight", 0.0),
            ("self_attn.experts.output.weight", 0.0),
            ("self_attn.experts.bias", 0.0),
            ("mlp.down_proj.weight", 0.0),
            ("mlp.experts.down.weight", 0.0),
            ("mlp.experts.bias", 0.0),
            ("mlp.down", 0.0),
            ("mlp.values", 0.0),
        ),
        per_layer_settings=("attention", "feed_forward", "num_experts", "num_attention_experts", "peer_num_experts"),
        masks_padding_only=True,
        unbounded=True,
    ),
}


def anatomy_of(config: Any, where: str) -> Anatomy:
    """The entry of a transformers config.

    Raises:
        BaseModelError: the family is not in the table, or uses a variant that modules cannot attach to. `where` names
            the base in the message.
    """
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise BaseModelError(f"{where}: model family {family!r} is not supported; supported are {known}")
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise BaseModelError(
            f"{where}: scale_attn_by_inverse_layer_idx ties a layer's weights to its position, so that none can be "
            "inserted; use a base without it"
        )
    if getattr(config, "add_cross_attention", False):
        raise BaseModelError(f"{where}: cross-attention is not supported; use a decoder-only base")
    if getattr(config, "use_bidirectional_attention", False):
        raise BaseModelError(f"{where}: its attention looks ahead, as an embedding model's; use one that writes text")
    return FAMILIES[family]
