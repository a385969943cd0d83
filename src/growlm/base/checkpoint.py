"""Checkpoint: a base on disk. Its folder, identity, size in bytes, and how it is loaded.

Knows transformers' folder layout and the hub's; knows nothing of modules or stores.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from growlm.base import tensor_bytes
from growlm.base.anatomy import FAMILIES, anatomy_of
from growlm.base.gguf_file import is_gguf
from growlm.base.settings import (
    check_generation_config,
    config_settings,
    foreign,
    read_object,
    require_read_settings,
)
from growlm.base.tokenizer import read_tokenizer
from growlm.disk.files import sha256_file
from growlm.errors import BaseModelError, shortened
from growlm.progress import phase

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Keys that say how a config was written, not what the model computes.
_VOLATILE = ("transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype", "use_cache")
_MAX_HEADER = 100_000_000  # bytes; the format allows no longer one
_ROWS = 4096  # of two weights, compared at a time


class _Entry(NamedTuple):
    """What a header says of a tensor."""

    file: Path
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]


def resolve(base: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a base: a local path, or a hub id, which is downloaded once into the hub's own cache.

    Args:
        revision: of a hub id: a commit, tag or branch; by default what its owner last published.

    Raises:
        BaseModelError: neither exists.
    """
    folder = Path(base).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            other = next((f", or the GGUF file {file.name}" for file in sorted(folder.glob("*.gguf"))), "")
            raise BaseModelError(f"{folder}: no config.json in it; give the folder of a transformers checkpoint{other}")
        return folder
    text = str(base)
    if folder.exists():
        if is_gguf(folder):
            raise BaseModelError(
                f'{text}: is a GGUF file; make a checkpoint folder of it first, with "growlm convert {text} FOLDER"'
            )
        raise BaseModelError(f"{text}: is a file; give the folder of a transformers checkpoint")
    if is_gguf(folder):
        raise BaseModelError(f"{text}: no such file; give a GGUF file or the folder of a transformers checkpoint")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or text.startswith((".", "/")):
        raise BaseModelError(f"{text}: no such folder; give the folder of a transformers checkpoint, or a hub id")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            text, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = f"revision {revision[:12]}" if revision else "it"
        raise BaseModelError(f"{text}: no such folder, and the hub did not give {what} ({reason})") from None
    return Path(found)


def hub_revision(folder: Path) -> str | None:
    """The commit of a folder that the hub's cache holds; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def read_config(folder: Path) -> Any:
    """The transformers config of a checkpoint folder.

    Raises:
        BaseModelError: unreadable, or of a family that is not supported.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    with foreign(path):
        config_settings(path, FAMILIES)
        config = AutoConfig.from_pretrained(folder)
        require_read_settings(path, config)
    anatomy_of(config, str(folder))
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order.

    Raises:
        BaseModelError: there are none, or an index names one that is missing or lies elsewhere.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "adapter_config.json").exists():
        raise BaseModelError(f"{folder}: holds an adapter, which transformers would load too; merge it or move it away")
    if index.is_file() and not (folder / "model.safetensors").is_file():  # as transformers chooses
        try:
            names = sorted(set(read_object(index)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise BaseModelError(f"{index}: not a readable index ({error})") from None
        for name in names:
            if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\0" in name:
                raise BaseModelError(f"{index}: names {shortened(name)}, which is no file beside it; restore the index")
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            other = sorted(p.name for p in folder.glob("*.bin"))
            hint = f"; {other[0]} holds pickled weights, which are never read: convert it" if other else ""
            raise BaseModelError(f"{folder}: {name} is missing{hint}")
    return [folder / name for name in names]


def fingerprint(folder: Path, sha256: Callable[[Path], str] = sha256_file) -> str:
    """Identity of a base: hash of its config, less what does not change the computation, and of its weights."""
    kept = {k: v for k, v in read_object(folder / "config.json").items() if k not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for file in weight_files(folder):
        digest.update(f"\n{file.name} {sha256(file)}".encode())
    return digest.hexdigest()


def tokenizer_fingerprint(folder: Path) -> str:
    """Identity of a tokenizer: hash of the files that decide which ids a text gets.

    Raises:
        BaseModelError: the folder holds no tokenizer.
    """
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise BaseModelError(f"{folder}: no tokenizer in it; save the base's tokenizer beside its weights")
    files += [folder / name for name in _TOKENIZER_SETTINGS if (folder / name).is_file()]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def stored_dtype(folder: Path) -> str:
    """The dtype that most of a checkpoint's values are stored in."""
    counts: dict[str, int] = {}
    for entry in _entries(folder).values():
        counts[entry.dtype] = counts.get(entry.dtype, 0) + math.prod(entry.shape)
    most = max(counts, key=lambda k: counts[k], default="F32")
    return {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(most, "float32")


def loaded_bytes(folder: Path, dtype: str) -> int:
    """Bytes that `load_model` will take with `dtype`, buffers included. Reads no weights but those that may be tied.

    Raises:
        BaseModelError: a family that is not supported, missing or malformed weights.
    """
    model = _outline(folder, dtype)
    return tensor_bytes(model.parameters()) + tensor_bytes(model.buffers())


def num_parameters(folder: Path) -> int:
    """Parameters of the model that a checkpoint holds, tied ones counted once.

    Raises:
        BaseModelError: a family that is not supported, missing or malformed weights.
    """
    return sum(p.numel() for p in _outline(folder, "float32").parameters())


def check(folder: Path) -> list[str]:
    """Looks for what would keep a checkpoint from being loaded, reading no weights.

    Returns:
        What is unusual in it and keeps nothing from working, a line each.

    Raises:
        BaseModelError: truncated files, weights that are missing or do not fit the config, an unreadable tokenizer.
    """
    rows = _check_weights(folder)
    tokens = 1 + max(load_tokenizer(folder).get_vocab().values(), default=-1)
    if tokens <= rows:
        return []
    return [
        f"{folder}: its tokenizer knows {tokens:,} tokens, the model has rows for {rows:,}: text with a token beyond "
        "those is refused"
    ]


def _check_weights(folder: Path) -> int:
    """Compares names and shapes in the files' headers with what the config asks for, before anything is made of it.
    Returns the vocabulary's size."""
    model, stored = _outline(folder, "float32"), _entries(folder)
    tied = model.all_tied_weights_keys
    for name, parameter in model.named_parameters():
        found = _find(stored, name, model)
        if found is None and name not in tied and name not in tied.values():
            raise BaseModelError(f"{folder}: its weights lack {name!r}; give a whole checkpoint")
        if found is not None and stored[found[1]].shape != tuple(parameter.shape):
            raise BaseModelError(
                f"{folder}: {name!r} has shape {stored[found[1]].shape}, its config asks for {tuple(parameter.shape)}; "
                "give a checkpoint whose config is its own"
            )
    check_generation_config(folder, model.config.vocab_size)
    return model.config.vocab_size


def _outline(folder: Path, dtype: str) -> Any:
    """The model that `load_model` makes, with shapes and dtypes but without values or memory for them."""
    with phase("looking at the base"):
        return _made_empty(folder, dtype)


def _made_empty(folder: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    config, stored = read_config(folder), _entries(folder)
    path = folder / "config.json"
    if config.num_hidden_layers > len(stored):  # before so many are made
        raise BaseModelError(
            f"{path}: asks for {config.num_hidden_layers} layers, the weights have {len(stored)} tensors in all; give "
            "a checkpoint whose config is its own"
        )
    with foreign(path), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    # What the config ties but the files hold twice and not alike is loaded twice.
    for copy, original in model.all_tied_weights_keys.items():
        held = [_find(stored, name, model) for name in (copy, original)]
        if held[0] and held[1] and not _alike(held[0], held[1], getattr(torch, dtype)):
            owner, _, name = copy.rpartition(".")
            untied = torch.nn.Parameter(torch.empty_like(model.get_parameter(original)))
            setattr(model.get_submodule(owner), name, untied)
    return model


def _find(stored: Mapping[str, _Entry], name: str, model: Any) -> tuple[Path, str] | None:
    """The file of a parameter and its name there: files may leave out the prefix of the model's inner part, or use a
    name that the family had before (`embed_out` of gpt_neox), which transformers translates as it loads."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    inner = name.removeprefix(f"{model.base_model_prefix}.")
    if found := next((n for n in (name, inner) if n in stored), None):
        return stored[found].file, found
    for renaming in get_model_conversion_mapping(model):
        if type(renaming) is WeightRenaming:
            (target,) = renaming.target_patterns
            for source in renaming.source_patterns:
                for old in stored:
                    if re.sub(source, target, old) == name:
                        return stored[old].file, old
    return None


def _alike(left: tuple[Path, str], right: tuple[Path, str], dtype: torch.dtype) -> bool:
    """Whether two stored tensors are the same once loaded as `dtype`; some rows of them are in memory at a time."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(left[0], "pt") as one, safe_open(right[0], "pt") as other:
            a, b = one.get_slice(left[1]), other.get_slice(right[1])
            if a.get_shape() != b.get_shape():
                return False
            pieces = (slice(at, at + _ROWS) for at in range(0, a.get_shape()[0], _ROWS))
            return all(bool((a[rows].to(dtype) == b[rows].to(dtype)).all()) for rows in pieces)
    except SafetensorError as error:
        raise BaseModelError(f"{left[0]}: not a safetensors file ({error})") from None


def _entries(folder: Path) -> dict[str, _Entry]:
    """The tensors of a checkpoint by name, from the files' headers."""
    entries: dict[str, _Entry] = {}
    for file in weight_files(folder):
        with open(file, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            if not 0 < size < min(os.path.getsize(file), _MAX_HEADER):
                raise BaseModelError(f"{file}: truncated or not a safetensors file")
            try:
                header = json.loads(f.read(size))
                header.pop("__metadata__", None)
                entries |= {name: _entry(file, e) for name, e in header.items()}
                end = max((e["data_offsets"][1] for e in header.values()), default=0)
            except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
                raise BaseModelError(f"{file}: not a safetensors file ({error})") from None
            if 8 + size + end > os.path.getsize(file):
                raise BaseModelError(f"{file}: truncated ({os.path.getsize(file):,} of {8 + size + end:,} bytes)")
    return entries


def _entry(file: Path, described: Mapping[str, Any]) -> _Entry:
    dtype, shape, (start, stop) = described["dtype"], described["shape"], described["data_offsets"]
    if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
        raise ValueError(f"a tensor {shortened(described)}")
    return _Entry(file, dtype, tuple(shape))


def load_model(folder: Path, dtype: str) -> Any:
    """The transformers model of a checkpoint folder, weights as `dtype`.

    Raises:
        BaseModelError: a family that is not supported, missing or unfit weights.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    _check_weights(folder)
    config = read_config(folder)
    logging.disable_progress_bar()
    with foreign(folder, "cannot be loaded: "), phase("loading the base"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
        )
    model, report = loaded
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        raise BaseModelError(f"{folder}: its weights lack {missing[0]!r} and {len(missing) - 1} more")
    return model


def save_model(model: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Writes a transformers checkpoint, without a progress bar of its own.

    Args:
        weights: by the names of the model's own, which are written by default.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    with phase("writing the checkpoint"):
        model.save_pretrained(folder, state_dict=weights)
    for file in folder.glob("*.safetensors"):
        # safetensors lets their owner alone read them; they are as public as the folder that they are in.
        file.chmod(0o666 & (folder.stat().st_mode | 0o600))


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a checkpoint folder.

    Raises:
        BaseModelError: there is none that can be read.
    """
    tokenizer_fingerprint(folder)
    with phase("loading the tokenizer"):
        return read_tokenizer(folder, _TOKENIZER_FILES, _TOKENIZER_SETTINGS)
