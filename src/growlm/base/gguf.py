"""GGUF: a base that comes as one file of llama.cpp's, written as a checkpoint folder.

The `gguf` package unpacks the tensors. All else is made here from what the file says, so that every release of
transformers finds the same folder and the same fingerprints: their own readers differ, and leave out what they do not
know. Knows which architectures go by which family, and how their tensors were changed; knows no stores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from growlm.base.gguf_file import GGUFFile, is_gguf, read_gguf
from growlm.base.gguf_tokenizer import GGUFTokenizer, tokenizer_of
from growlm.base.settings import foreign
from growlm.disk.tensors import write_tensors
from growlm.errors import BaseModelError, shortened
from growlm.progress import phase, track

__all__ = ["FILES", "is_gguf", "write_checkpoint"]

# What a folder that was made of a file consists of.
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

# The family of each architecture that is read.
_FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
_WITH_HEAD_DIM = ("llama", "qwen3", "gemma2", "gemma3")
# The largest models of these two divide attention scores by another width than a head's; no file says so, and all
# that read them know them by their depth.
_LARGEST = {"gemma2": 46, "gemma3": 62}
_LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_ROPE_FACTORS = "rope_freqs.weight"


def write_checkpoint(path: Path, folder: Path) -> str:
    """Writes the files of a checkpoint, weights in float32, into a folder that exists. Returns the family.

    Raises:
        BaseModelError: no GGUF file, cut short, of an architecture, a part or a tokenizer that is not known, or with
            tensors that its architecture does not have.
        StoreError: no room on the disk.
    """
    with phase(f"looking at {path.name}"):
        file = read_gguf(path)
        _require_model(file)
        architecture = file.values["general.architecture"]
        context = file.number(f"{architecture}.context_length")
        tokenizer = tokenizer_of(file, context)
        settings = _settings(file, architecture, tokenizer)
        with foreign(path):
            names = _names(file, architecture, settings)
    with foreign(path, "cannot be read: "):
        weights = _read_weights(file, architecture, settings, names)
    version = {"transformers_version": metadata.version("transformers")}  # which some releases ask for
    generation = {"bos_token_id": tokenizer.ids.get("bos"), "eos_token_id": _one_or_all(tokenizer.ends)}
    generation["pad_token_id"] = tokenizer.ids.get("pad")
    _write(folder / "config.json", settings | version)
    _write(folder / "generation_config.json", generation | version)
    _write(folder / "tokenizer.json", tokenizer.vocabulary, sort=False)
    _write(folder / "tokenizer_config.json", tokenizer.settings)
    write_tensors(folder / "model.safetensors", weights)
    return str(settings["model_type"])


def _one_or_all(tokens: list[int]) -> int | list[int] | None:
    return tokens if len(tokens) > 1 else tokens[0] if tokens else None


def _write(path: Path, content: Mapping[str, Any], *, sort: bool = True) -> None:
    """
    Args:
        sort: the keys. Those of a vocabulary stand in the order of their ids.
    """
    text = json.dumps(content, ensure_ascii=False, indent=None if not sort else 2, sort_keys=sort)
    path.write_text(text + "\n", encoding="utf-8")


def _require_model(file: GGUFFile) -> None:
    """
    Raises:
        BaseModelError: the file holds something else than one whole model of a family that is known.
    """
    parts = file.get("split.count", int, 0)
    if parts > 1:
        number = file.get("split.no", int, 0) + 1
        raise BaseModelError(
            f"{file.path}: part {number} of {parts} of a split model (split.count); join them first, with llama.cpp's "
            '"llama-gguf-split --merge"'
        )
    architecture, kind = file.get("general.architecture", str, ""), file.get("general.type", str, "model")
    if architecture == "clip" or kind == "mmproj":
        raise BaseModelError(f"{file.path}: a vision projector, no language model; give the file of the model itself")
    if kind != "model":
        raise BaseModelError(f"{file.path}: of type {shortened(kind)}, no model; give the file of a language model")
    if architecture not in _FAMILIES:
        raise BaseModelError(
            f"{file.path}: architecture {shortened(architecture)} is not supported as GGUF; supported are "
            f"{', '.join(_FAMILIES)}"
        )


def _settings(file: GGUFFile, name: str, tokenizer: GGUFTokenizer) -> dict[str, Any]:
    """The config, in transformers' words."""
    if "token_embd.weight" not in file.tensors:
        raise BaseModelError(f"{file.path}: no tensor token_embd.weight in it; give the file of a language model")
    hidden, heads = file.number(f"{name}.embedding_length"), file.number(f"{name}.attention.head_count")
    layers = file.number(f"{name}.block_count")
    width = file.number(f"{name}.attention.key_length", file.number(f"{name}.rope.dimension_count", hidden // heads))
    for key in ("rope.dimension_count", "attention.value_length"):
        if (found := file.number(f"{name}.{key}", width)) != width:
            raise BaseModelError(
                f"{file.path}: {name}.{key} is {found}, expected the width of a head, {width}; give the model as a "
                "checkpoint folder"
            )
    if name not in _WITH_HEAD_DIM and width * heads != hidden:
        raise BaseModelError(
            f"{file.path}: {heads} heads of width {width} make {heads * width}, expected the hidden size, {hidden}; "
            "give the model as a checkpoint folder"
        )
    common = {
        "model_type": _FAMILIES[name],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": tokenizer.ids.get("bos"),
        "eos_token_id": tokenizer.ids.get("eos"),
        "pad_token_id": tokenizer.ids.get("pad"),
    }
    if name == "gpt2":
        return common | {
            "n_embd": hidden,
            "n_head": heads,
            "n_layer": layers,
            "n_positions": file.number("gpt2.context_length"),
            "n_inner": file.number("gpt2.feed_forward_length"),
            "layer_norm_epsilon": _epsilon(file, "gpt2.attention.layer_norm_epsilon"),
        }
    settings = common | {
        "hidden_size": hidden,
        "intermediate_size": file.number(f"{name}.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": file.number(f"{name}.attention.head_count_kv"),
        "max_position_embeddings": file.number(f"{name}.context_length"),
        "rms_norm_eps": _epsilon(file, f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file, name, width),
    }
    if name in _WITH_HEAD_DIM:
        settings["head_dim"] = width
    if name in ("gemma2", "gemma3", "phi3"):
        settings["sliding_window"] = file.get(f"{name}.attention.sliding_window", int, 0) or None
    if name in _LARGEST:
        largest = layers == _LARGEST[name]
        settings["query_pre_attn_scalar"] = hidden // heads if largest else width
        every = 2 if name == "gemma2" else file.number("gemma3.attention.sliding_window_pattern", 6)
        slides = settings["sliding_window"] is not None
        settings["layer_types"] = [
            "sliding_attention" if slides and (i + 1) % every else "full_attention" for i in range(layers)
        ]
        for what in ("attn", "final"):
            cap = file.get(f"{name}.{what}_logit_softcapping", float, 0.0)
            settings[f"{what}_logit_softcapping"] = cap or None
    if name == "gemma3":
        local = {"rope_type": "default", "rope_theta": file.get("gemma3.rope.freq_base_swa", float, 10_000.0)}
        settings["rope_parameters"] = {"full_attention": settings["rope_parameters"], "sliding_attention": local}
    return settings


def _epsilon(file: GGUFFile, key: str) -> float:
    """What norms add to a variance."""
    found = file.get(key, float, 0.0)
    if not 0 < found < 1:
        raise BaseModelError(f"{file.path}: {key} is {shortened(found)}, expected a number between 0 and 1")
    return found


def _rope(file: GGUFFile, name: str, width: int) -> dict[str, Any]:
    """How positions turn, and how they were stretched."""
    theta = file.get(f"{name}.rope.freq_base", float, 10_000.0)
    kind = file.get(f"{name}.rope.scaling.type", str, "none")
    factor = file.get(f"{name}.rope.scaling.factor", float, 1.0)
    if kind not in ("none", "linear") or f"{name}.rope.scale_linear" in file.values or factor <= 0 or theta <= 0:
        raise BaseModelError(
            f"{file.path}: positions that are stretched in a way that is not read from GGUF ({name}.rope.scaling.type "
            f"is {shortened(kind)}); give the model as a checkpoint folder"
        )
    plain = {"rope_type": "default", "rope_theta": theta}
    if _ROPE_FACTORS in file.tensors and name == "llama":
        return _llama3(file, plain, width)
    return plain if kind == "none" or factor == 1 else {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def _llama3(file: GGUFFile, plain: dict[str, Any], width: int) -> dict[str, Any]:
    """The settings by which each frequency is divided by the file's factor for it."""
    stored = file.tensors[_ROPE_FACTORS]
    if stored.kind != "F32" or stored.shape != (width // 2,):
        raise BaseModelError(f"{file.path}: {_ROPE_FACTORS} is {stored.kind} {stored.shape}; get the file again")
    found = np.fromfile(file.path, "<f4", width // 2, offset=stored.offset).astype(float)
    factor, low, high = round(float(found.max()), 3), *(_LLAMA3_BANDS[f"{end}_freq_factor"] for end in ("low", "high"))
    original = _LLAMA3_BANDS["original_max_position_embeddings"]
    turns = original / (2 * math.pi * plain["rope_theta"] ** (np.arange(0, width, 2) / width))
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise BaseModelError(
            f"{file.path}: {_ROPE_FACTORS} stretches positions in a way that is not known; give the model as a "
            "checkpoint folder"
        )
    if factor == 1:
        return plain
    return {**plain, "rope_type": "llama3", "factor": factor, **_LLAMA3_BANDS}


def _names(file: GGUFFile, architecture: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """What transformers calls each tensor.

    Raises:
        BaseModelError: tensors that the model has and the file has not, or the other way round, or of another shape.
    """
    import torch
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, model.config.num_hidden_layers)
    wanted, shapes = {}, {}
    for parameter, tensor in model.state_dict().items():
        name, _, suffix = parameter.rpartition(".")
        if found := names.get_name(name):  # that of a head which is always tied has none
            wanted[f"{found}.{suffix}"], shapes[f"{found}.{suffix}"] = parameter, tuple(tensor.shape)
    if settings["tie_word_embeddings"]:
        wanted.pop("output.weight", None)
    missing = sorted(wanted.keys() - file.tensors.keys())
    unread = sorted(file.tensors.keys() - wanted.keys() - {_ROPE_FACTORS})
    if missing or unread:
        told = f"lacks the tensor {missing[0]}" if missing else f"has a tensor that is not read, {unread[0]}"
        more = len(missing or unread) - 1
        raise BaseModelError(
            f"{file.path}: {told}{f' and {more} others' if more else ''}: no model of the family "
            f"{settings['model_type']} as growlm runs it; give the model as a checkpoint folder"
        )
    for name in wanted:
        stored, shape = file.tensors[name].shape, shapes[name]
        if sorted(stored) != sorted(shape):  # some are stored turned
            raise BaseModelError(f"{file.path}: tensor {name} has shape {stored}, expected {shape}; get the file again")
    return wanted


def _read_weights(file: GGUFFile, architecture: str, settings: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    """The model's parameters in float32, by transformers' names."""
    import torch
    from gguf import GGMLQuantizationType, dequantize

    content = np.memmap(file.path, np.uint8, "r")
    weights = {}
    for name in track(names, f"reading {file.path.name}", "tensors"):
        stored = file.tensors[name]
        rows = content[stored.offset : stored.offset + stored.bytes].reshape(*stored.shape[:-1], -1)
        values = dequantize(rows, GGMLQuantizationType[stored.kind])
        values = np.require(_restored(values, name, architecture, settings), requirements=["C", "W"])
        weights[names[name]] = torch.from_numpy(values)
    return weights


def _restored(values: np.ndarray, name: str, architecture: str, settings: Mapping[str, Any]) -> np.ndarray:
    """A tensor as it was before llama.cpp's converter changed it."""
    if architecture == "llama" and name.endswith((".attn_q.weight", ".attn_k.weight")):
        # There the two values that a position turns together lie side by side, in transformers half a head apart.
        heads = settings["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
        return values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values - 1  # transformers adds one
    if architecture == "gpt2" and values.ndim == 2 and name.startswith("blk."):
        return values.T
    return values
