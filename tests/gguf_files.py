"""Tiny GGUF files, as llama.cpp's converter writes them: models of `tiny.py`, and tokenizers made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from tokenizers import pre_tokenizers

from tiny import make_model

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
FAMILIES = list(ARCHITECTURES)
# What a file cannot say is as in all published models.
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "gemma3_text": {
        "sliding_window_pattern": 6,
        "num_hidden_layers": 7,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        },
    },
}
CONTROL, USER_DEFINED = 3, 4
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_pairs(pre: str = "smollm") -> dict[str, Any]:
    """Pairs of bytes, with words and numbers among the merges."""
    merges = [("2", "0"), ("20", "2"), ("202", "4"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "a"), ("Ċ", "Ċ")]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += ["".join(merge) for merge in merges]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [CONTROL] * 3 + [USER_DEFINED] + [1] * (len(tokens) - 4),
        "merges": [" ".join(merge) for merge in merges],
        "bos_token_id": 0,
        "eos_token_id": 2,
        "chat_template": TEMPLATE,
    }


def pieces() -> dict[str, Any]:
    """Pieces with scores, the earlier the better, and every byte."""
    learned = ["▁t", "he", "▁the", "in", "ing", "▁a", "at", "▁c", "▁cat", "▁▁", "an", "▁an", "and", "▁and"]
    letters = ["▁", *"etaoinshrdlucmfwypvbgkjqxz"]
    special = ["<unk>", "<s>", "</s>", "<turn>", "</turn>", "\n\n"]
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), *learned, *letters]
    return {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2, CONTROL, CONTROL, CONTROL, CONTROL, USER_DEFINED, *[6] * 256, *[1] * (len(tokens) - 262)],
        "scores": [0.0] * 262 + [-1.0 - i for i in range(len(learned) + len(letters))],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "eot_token_id": 4,
        "unknown_token_id": 0,
    }


def settle(model: Any) -> Any:
    """Gives a model weights that are the same on every machine, and that a norm keeps when one is added to it."""
    with torch.no_grad():
        for number, (_, p) in enumerate(model.named_parameters()):
            pattern = (torch.arange(p.numel()) * 7919 + number * 104_729) % 1009
            values = (pattern.float() / 1009 - 0.5) * 0.5
            p.copy_(((values + 1) - 1).view_as(p))
    return model


def model_of(family: str, num_tokens: int, **changes: Any) -> Any:
    return settle(make_model(family, **{**CHANGES.get(family, {}), "vocab_size": num_tokens, **changes}))


def write_gguf(
    path: Path,
    family: str = "llama",
    tokenizer: Mapping[str, Any] | None = None,
    *,
    kind: Kind = Kind.F32,
    values: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    **changes: Any,
) -> Any:
    """Writes a file and returns the model that it holds: where weights are quantised, with those that can be read.

    Args:
        tokenizer: keys of `tokenizer.ggml`; by default pairs of bytes.
        values: more of the file's keys, or others; None takes one away.
        tensors: likewise.
    """
    tokenizer = byte_pairs() if tokenizer is None else tokenizer
    model = model_of(family, max(len(tokenizer.get("tokens", [])), 8), **changes)
    named = _tensors(model, family, kind)
    named |= tensors or {}
    writer = gguf.GGUFWriter(path, ARCHITECTURES[family])
    every = _values(model.config, ARCHITECTURES[family])
    every |= {f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}": v for key, v in tokenizer.items()}
    every |= values or {}
    for key, value in every.items():
        if key == "general.architecture":
            writer.kv_data[0][key].value = value
        elif value is not None:
            writer.add_key_value(key, value, *_type_of(key, value))
    for name, tensor in named.items():
        if tensor is not None:
            quantised = tensor.dtype == np.uint8
            writer.add_tensor(name, tensor, raw_dtype=kind if quantised else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _type_of(key: str, value: Any) -> tuple[Any, ...]:
    types = gguf.GGUFValueType
    inner = value[0] if isinstance(value, list) else value
    if isinstance(inner, bool):
        found = types.BOOL
    elif isinstance(inner, int):
        found = types.INT32 if key.endswith("token_type") else types.UINT32
    else:
        found = types.FLOAT32 if isinstance(inner, float) else types.STRING
    return (types.ARRAY, found) if isinstance(value, list) else (found,)


def _values(config: Any, name: str) -> dict[str, Any]:
    if name == "gpt2":
        found = {
            "context_length": config.n_positions,
            "embedding_length": config.n_embd,
            "feed_forward_length": 4 * config.n_embd,
            "block_count": config.n_layer,
            "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
        return {f"{name}.{key}": value for key, value in found.items()}
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": width,
    }
    if name in ("qwen3", "gemma2", "gemma3"):
        found |= {"attention.key_length": width, "attention.value_length": width}
    if getattr(config, "sliding_window", None) is not None:
        found["attention.sliding_window"] = config.sliding_window
    for what in ("attn", "final"):
        if cap := getattr(config, f"{what}_logit_softcapping", None):
            found[f"{what}_logit_softcapping"] = cap
    if rope["rope_type"] == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    return {f"{name}.{key}": value for key, value in found.items()}


def _tensors(model: Any, family: str, kind: Kind) -> dict[str, np.ndarray]:
    architecture = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[family])
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    found = {}
    for parameter, tensor in model.named_parameters():
        name, _, suffix = parameter.rpartition(".")
        key, array = f"{names.get_name(name)}.{suffix}", tensor.detach().numpy()
        if kind is not Kind.F32 and array.ndim == 2 and "attn_output" not in key:
            quantised = quantize(array, kind)
            tensor.data.copy_(torch.from_numpy(dequantize(quantised, kind)))
            array = quantised
        if family == "llama" and (".attn_q." in key or ".attn_k." in key):
            config = model.config
            heads = config.num_attention_heads if ".attn_q." in key else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if family.startswith("gemma") and "norm" in key:
            array = array + 1
        if family == "gpt2" and array.ndim == 2 and key.startswith("blk"):
            array = np.ascontiguousarray(array.T)
        found[key] = np.ascontiguousarray(array)
    return found
