"""Conversion of checkpoints: published layouts into ours, ours back into MoLM's, and GGUF files into folders.

Which layout a folder has is read from its config. What the tensors are called is known to `model/convert.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from growlm.base import gguf, tensor_bytes
from growlm.base.checkpoint import resolve, weight_files
from growlm.base.settings import read_object
from growlm.disk.files import checkpoint_folder, refuse_existing
from growlm.disk.tensors import read_tensors, write_tensors
from growlm.errors import BaseModelError, ConfigError
from growlm.model import convert
from growlm.model.configuration import GrowlmConfig
from growlm.model.modeling import GrowlmForCausalLM

LAYOUTS = ("growlm", "molm")
_CARRIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "generation_config*")


def convert_checkpoint(source: str | Path, out: str | Path, *, to: str | None = None) -> tuple[Path, str, str]:
    """Writes a checkpoint in another layout, tokenizer files included; weights keep their dtype and bits. Returns
    where, the model type that was read, and the layout that was written.

    Args:
        source: a folder or hub id: MoLM (model type `moduleformer`), JetMoE, or ours; or a GGUF file, of which an
            ordinary checkpoint of its family is made, with weights in float32.
        to: `growlm` or `molm`; by default ours, and MoLM's for a checkpoint of ours. Not for a GGUF file.

    Raises:
        BaseModelError: an unknown layout, or tensors that are missing, unexpected or of another shape (named).
        ConfigError: a setting that cannot be, or that the other layout cannot express.
        StoreError: `out` exists and is not empty, or the disk is full.
    """
    out = Path(out).expanduser()
    refuse_existing(out)
    if gguf.is_gguf(source):
        if to is not None:
            raise ConfigError(f"{source}: a GGUF file becomes a checkpoint of its own family; leave out --to {to}")
        with checkpoint_folder(out) as work:
            return out, "gguf", gguf.write_checkpoint(Path(source).expanduser(), work)
    folder = resolve(source)
    where = str(folder)
    settings = read_object(folder / "config.json")
    family = settings.get("model_type")
    if family not in ("growlm", "moduleformer", "jetmoe"):
        raise BaseModelError(f"{where}: model type {family!r}; known layouts are growlm, moduleformer and jetmoe")
    wanted = to or ("molm" if family == "growlm" else "growlm")
    if wanted not in LAYOUTS:
        raise BaseModelError(f"layout {wanted!r} is not one of {', '.join(LAYOUTS)}")
    if (wanted == "growlm") == (family == "growlm"):
        raise BaseModelError(f"{where}: has model type {family!r}; {wanted} cannot be made of it")
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors |= read_tensors(file)
    if family == "growlm":
        try:
            config = GrowlmConfig.from_pretrained(folder)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
        written = convert.to_molm_config(config, where)
        check_tensors(tensors, config, where)
        renamed = convert.to_molm(tensors, config, where)
    else:
        name = convert.molm_config if family == "moduleformer" else convert.jetmoe_config
        config = name(settings, where)
        rename = convert.from_molm if family == "moduleformer" else convert.from_jetmoe
        renamed = rename(tensors, config, where)
        called = partial(convert.molm_name, config=config, where=where) if family == "moduleformer" else str
        check_tensors(renamed, config, where, called)
        dtype = next(iter(renamed.values())).dtype
        written = config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    with checkpoint_folder(out, tensor_bytes(renamed.values())) as work:
        (work / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
        write_tensors(work / "model.safetensors", renamed)
        for pattern in _CARRIED:
            for file in folder.glob(pattern):
                shutil.copyfile(file, work / file.name)
    return out, str(family), wanted


def check_tensors(
    tensors: Mapping[str, Tensor], config: GrowlmConfig, where: str, called: Callable[[str], str] = str
) -> None:
    """
    Args:
        called: what the file that they come from calls a tensor.

    Raises:
        BaseModelError: tensors that are not those of a model of this config; names them.
    """
    with torch.device("meta"):
        model = GrowlmForCausalLM(config)
    wanted = {name: p.shape for name, p in model.named_parameters()}
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if config.tie_word_embeddings:
        unexpected = [name for name in unexpected if name != "lm_head.weight"]
    more = f" and {max(len(missing), len(unexpected)) - 3} others" if max(len(missing), len(unexpected)) > 3 else ""
    if missing:
        raise BaseModelError(
            f"{where}: tensors that its config describes are missing: {', '.join(map(called, missing[:3]))}{more}; get "
            "the checkpoint again"
        )
    if unexpected:
        named = ", ".join(map(called, unexpected[:3]))
        raise BaseModelError(f"{where}: tensors that its config does not describe, unexpected: {named}{more}")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            found = tuple(tensors[name].shape)
            raise BaseModelError(f"{where}: tensor {called(name)} has shape {found}, its config says {tuple(shape)}")
