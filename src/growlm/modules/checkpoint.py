"""Checkpoint: a base on disk. Its folder, identity, size in bytes, and how it is loaded.

Knows transformers' folder layout and the hub's; knows nothing of modules or stores.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from growlm.errors import BaseModelError
from growlm.files import sha256_file
from growlm.modules.anatomy import anatomy_of

DTYPES = ("float32", "bfloat16", "float16")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Keys that say how a config was written, not what the model computes.
_VOLATILE = ("transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype", "use_cache")


def resolve(base: str | Path) -> Path:
    """The folder of a base: a local path, or a hub id, which is downloaded once into the hub's own cache.

    Raises:
        BaseModelError: neither exists.
    """
    folder = Path(base).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BaseModelError(f"{folder}: no config.json in it; give the folder of a transformers checkpoint")
        return folder
    text = str(base)
    if folder.exists():
        raise BaseModelError(f"{text}: is a file; give the folder of a transformers checkpoint")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or text.startswith((".", "/")):
        raise BaseModelError(f"{text}: no such folder; give the folder of a transformers checkpoint, or a hub id")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(f"{text}: no such folder, and the hub did not give it ({reason})") from None
    return Path(found)


def read_config(folder: Path) -> Any:
    """The transformers config of a checkpoint folder.

    Raises:
        BaseModelError: unreadable, or of a family that is not supported.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    try:
        family = json.loads(path.read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise BaseModelError(f"{path}: not a readable config ({error})") from None
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        anatomy_of(_Named(family), str(folder))  # an unknown family has a better message of our own
        raise BaseModelError(f"{path}: {str(error).splitlines()[0]}") from None
    anatomy_of(config, str(folder))
    return config


class _Named:
    def __init__(self, model_type: str | None) -> None:
        self.model_type = model_type


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order.

    Raises:
        BaseModelError: there are none, or an index names one that is missing.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "adapter_config.json").exists():
        raise BaseModelError(f"{folder}: holds an adapter, which transformers would load too; merge it or move it away")
    if index.is_file() and not (folder / "model.safetensors").is_file():  # as transformers chooses
        try:
            names = sorted({str(Path(v).name) for v in json.loads(index.read_text())["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BaseModelError(f"{index}: not a readable index ({error})") from None
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
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        kept = {k: v for k, v in config.items() if k not in _VOLATILE}
    except (OSError, ValueError, AttributeError) as error:
        raise BaseModelError(f"{path}: not a readable config ({error})") from None
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
    for entry in _entries(folder):
        counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + math.prod(entry["shape"])
    most = max(counts, key=lambda k: counts[k])
    return {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(most, "float32")


def loaded_bytes(folder: Path, dtype: str) -> int:
    """Bytes that the weights take when loaded as `dtype`, from the files' headers alone."""
    size = 4 if dtype == "float32" else 2
    return sum(math.prod(entry["shape"]) * size for entry in _entries(folder))


def num_parameters(folder: Path) -> int:
    """Parameters of a checkpoint, from the files' headers alone."""
    return sum(math.prod(entry["shape"]) for entry in _entries(folder))


def _entries(folder: Path) -> list[dict[str, Any]]:
    entries = []
    for file in weight_files(folder):
        with open(file, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            if not 0 < size < os.path.getsize(file):
                raise BaseModelError(f"{file}: truncated or not a safetensors file")
            try:
                header = json.loads(f.read(size))
                header.pop("__metadata__", None)
            except (ValueError, AttributeError) as error:
                raise BaseModelError(f"{file}: not a safetensors file ({error})") from None
        entries += list(header.values())
    return entries


def load_model(folder: Path, dtype: str) -> Any:
    """The transformers model of a checkpoint folder, weights as `dtype`.

    Raises:
        BaseModelError: a family that is not supported, missing or unfit weights.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    config = read_config(folder)
    weight_files(folder)
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
        )
    except Exception as error:
        raise BaseModelError(f"{folder}: cannot be loaded ({str(error).strip().splitlines()[0]})") from None
    model, report = loaded
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        raise BaseModelError(f"{folder}: its weights lack {missing[0]!r} and {len(missing) - 1} more")
    return model


def save_model(model: Any, folder: Path) -> None:
    """Writes a transformers checkpoint, without a progress bar of its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a checkpoint folder.

    Raises:
        BaseModelError: there is none that can be read.
    """
    from transformers import AutoTokenizer

    tokenizer_fingerprint(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise BaseModelError(f"{folder}: its tokenizer cannot be read ({str(error).splitlines()[0]})") from None
