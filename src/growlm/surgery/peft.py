"""PEFT: LoRA adapters in the format of Hugging Face's PEFT, read as modules of kind `lora` and written back.

Reads JSON and safetensors and nothing else, and needs no PEFT. What an adapter says that a module would not compute is
an error and never left out in silence.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from growlm.base import Base
from growlm.base.settings import read_object
from growlm.disk.files import write_atomic
from growlm.disk.tensors import read_tensors, write_tensors
from growlm.errors import BaseModelError, ConfigError, IntegrityError
from growlm.modules.lora import Lora, matrices_of, matrix_of
from growlm.modules.shapes import LoraConfig, is_called

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.default)?(\.weight)?")
_NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude_vector": "magnitude"}
# Settings that are read here, that follow from the tensors, and that say how an adapter was trained and where.
_READ = (
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
)  # fmt: skip
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # they begin with a part of the base's own matrices
_CONVERSION = (
    "save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes a plain LoRA "
    "adapter of it"
)

Place = tuple[int, str]  # a layer, and the path of a projection in it


def read_adapter(folder: str | Path, base: Base) -> Lora:
    """The adapter in a folder as a module for `base`, in float32.

    Raises:
        IntegrityError: the folder holds a pickle or a link, or files are damaged or missing.
        ConfigError: it is no LoRA adapter, changes nothing, or does something that modules do not.
        BaseModelError: it was made for another model.
    """
    folder = Path(folder).expanduser()
    _check_folder(folder)
    try:
        said = _settings(folder / CONFIG)
        found = _by_place(read_tensors(folder / WEIGHTS), base, str(folder))
        config = _shape(said, found, base, folder / CONFIG)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        reason = str(error).splitlines()[0]
        raise IntegrityError(
            f"{folder / CONFIG}: a setting is none that PEFT writes ({reason}); save the adapter again"
        ) from None
    tensors = {
        f"layers.{index}.{path}.{_NAMES[part]}": tensor.float()
        for (index, path), parts in found.items()
        for part, tensor in parts.items()
    }
    module = Lora.restore(base, config, tensors, str(folder))
    if not any(bool(adapter.lora_B.weight.any()) for _, _, adapter in module.adapters()):
        raise ConfigError(f"{folder}: all lora_B are zero, so that it changes nothing; give a trained adapter")
    return module


def write_adapter(module: Lora, base: Base, folder: Path, *, called: str) -> None:
    """Writes a module as an adapter into an existing folder.

    Args:
        called: how the adapter names the model that it belongs to.

    Raises:
        ConfigError: it has vocabulary rows of its own, for which the format has no place.
    """
    if module.rows.head is not None or module.rows.input is not None:
        raise ConfigError(
            "vocabulary rows of a module's own have no place in a PEFT adapter; export it as a checkpoint (--as "
            "checkpoint), or learn it with --vocabulary none"
        )
    prefix, config = _layers_of(base), module.config
    adapters = {f"{prefix}.{index}.{path}": adapter for index, path, adapter in module.adapters()}
    alphas = {f"{prefix}.{index}.{path}": config.alpha_of(f"{index}.{path}") for index, path, _ in module.adapters()}
    all_layers = config.layers == tuple(range(base.num_layers))
    told = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": called,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(type(p).__name__ == "Conv1D" for _, p in matrices_of(base, config.layers[0])),  # type: ignore[index]
        "target_modules": sorted(_targets(module, base)),
        "layers_to_transform": None if all_layers else list(config.layers or ()),
        "rank_pattern": {
            re.escape(name): a.lora_A.out_features for name, a in adapters.items() if a.lora_A.out_features != config.r
        },
        "alpha_pattern": {re.escape(name): alpha for name, alpha in alphas.items() if alpha != config.lora_alpha},
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    tensors: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        parts = {"lora_A.weight": adapter.lora_A.weight, "lora_B.weight": adapter.lora_B.weight}
        if adapter.magnitude is not None:
            parts["lora_magnitude_vector"] = adapter.magnitude
        tensors |= {f"{_PREFIX}{name}.{part}": tensor.detach() for part, tensor in parts.items()}
    write_tensors(folder / WEIGHTS, tensors)
    write_atomic(folder / CONFIG, json.dumps(told, indent=1).encode())


def _check_folder(folder: Path) -> None:
    """Before anything in it is read."""
    if not folder.is_dir():
        raise IntegrityError(f"{folder}: no such folder; give the folder of a PEFT adapter")
    if not (folder / CONFIG).exists():
        raise IntegrityError(f"{folder}: there is no {CONFIG} in it; give the folder of a PEFT adapter")
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise IntegrityError(f"{path}: is a link; copy the adapter's own files to a folder, and give that one")
        if path.suffix.lower() in _PICKLES:
            raise IntegrityError(
                f"{path}: may be a pickle, which can run code; give a folder with {CONFIG} and {WEIGHTS} alone"
            )
    if not (folder / WEIGHTS).is_file():
        raise IntegrityError(f"{folder}: there is no {WEIGHTS} in it; give the folder of a PEFT adapter")


def _settings(path: Path) -> dict[str, Any]:
    said = read_object(path)
    if (kind := said.get("peft_type")) != "LORA":
        raise ConfigError(f"{path}: peft_type is {kind!r}; only LORA adapters become modules")
    begun = said.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGE_THE_BASE):
        raise ConfigError(f"{path}: init_lora_weights is {begun!r}, which takes a part of the base away; {_CONVERSION}")
    if (bias := said.get("bias", "none")) != "none":
        raise ConfigError(f"{path}: bias is {bias!r}; biases are the base's, and a module leaves them as they are")
    if saved := said.get("modules_to_save"):
        raise ConfigError(
            f"{path}: modules_to_save are {', '.join(map(str, saved))}: whole layers of the base, which no module "
            "replaces; train the adapter without them"
        )
    for name, value in said.items():
        if name not in _READ and value:
            raise ConfigError(f"{path}: {name} is {value!r}, which modules of kind lora do not do; train it without")
    return said


def _by_place(tensors: Mapping[str, Tensor], base: Base, where: str) -> dict[Place, dict[str, Tensor]]:
    """The tensors of an adapter, by the projection that they belong to."""
    prefix = _layers_of(base)
    found: dict[Place, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name = key
        while name.startswith(_PREFIX):  # some savers write it twice
            name = name.removeprefix(_PREFIX)
        head = base.anatomy.head
        if ".lora_embedding_" in key or name.startswith(
            (f"{head}.", f"{base.anatomy.decoder}.{base.anatomy.embedding}.")
        ):
            raise ConfigError(
                f"{where}: {key} belongs to the embedding or the head, which are one matrix in many models; modules "
                "adapt layers only: train the adapter without it"
            )
        split = _PART.fullmatch(name)
        if split is None:
            raise ConfigError(f"{where}: {key} is no matrix of a LoRA adapter; train the adapter without it")
        inside = split["path"].removeprefix(f"{prefix}.")
        index, _, path = inside.partition(".")
        if inside == split["path"] or not index.isdigit() or not path:
            raise BaseModelError(
                f"{where}: {key} is of no layer of {base.where}, whose layers are called {prefix}.0 and so on; it is "
                "an adapter for another model"
            )
        found.setdefault((int(index), path), {})[split["part"]] = tensor
    if not found:
        raise ConfigError(f"{where}: holds no matrices, so that it changes nothing; give a trained adapter")
    return found


def _shape(said: Mapping[str, Any], found: Mapping[Place, Mapping[str, Tensor]], base: Base, path: Path) -> LoraConfig:
    """What the tensors are, in the terms of a module."""
    dora, prefix = bool(said.get("use_dora")), _layers_of(base)
    wanted = {"lora_A", "lora_B", *(("lora_magnitude_vector",) if dora else ())}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for (index, at), parts in sorted(found.items()):
        name = f"{prefix}.{index}.{at}"
        if parts.keys() != wanted:
            odd = sorted(parts.keys() ^ wanted)[0]
            raise IntegrityError(
                f"{path.parent}: {name}: {odd} is {'missing' if odd in wanted else 'too many'}; save it again"
            )
        matrix = dict(matrices_of(base, index)).get(at) if index < base.num_layers else None
        if matrix is None:
            raise BaseModelError(f"{path.parent}: {base.where} has no {name}; it is an adapter for another model")
        if parts["lora_A"].ndim != 2 or parts["lora_B"].ndim != 2:
            raise IntegrityError(f"{path.parent}: {name}: lora_A or lora_B is no matrix; save the adapter again")
        (num_out, num_in), (rank, width) = matrix_of(matrix).shape, parts["lora_A"].shape
        if (
            width != num_in
            or [*parts["lora_B"].shape] != [num_out, rank]
            or (dora and [*parts["lora_magnitude_vector"].shape] != [num_out])
        ):
            raise BaseModelError(
                f"{path.parent}: {name} goes from {parts['lora_A'].shape[-1]} to {parts['lora_B'].shape[0]}, that of "
                f"{base.where} from {num_in} to {num_out}; it is an adapter for another model"
            )
        told = _by_pattern(said.get("rank_pattern"), name, said.get("r", 8))
        if rank != told:
            raise IntegrityError(
                f"{path.parent}: {name} has rank {rank}, adapter_config.json says {told}; save the adapter again"
            )
        ranks[f"{index}.{at}"] = rank
        alphas[f"{index}.{at}"] = float(_by_pattern(said.get("alpha_pattern"), name, said.get("lora_alpha", 8)))
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    every = {f"{i}.{at}" for i in {index for index, _ in found} for at, _ in matrices_of(base, i)}
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        layers=tuple(sorted({index for index, _ in found})),
        target_modules=tuple(_shortest(set(ranks), every)),
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
        use_rslora=bool(said.get("use_rslora")),
        use_dora=dora,
    )


def _targets(module: Lora, base: Base) -> list[str]:
    layers = module.config.layers or ()
    every = {f"{index}.{path}" for index in layers for path, _ in matrices_of(base, index)}
    return _shortest({f"{index}.{path}" for index, path, _ in module.adapters()}, every)


def _shortest(names: set[str], every: set[str]) -> list[str]:
    """Names of projections that fit all of `names` and nothing else of `every`: their last parts where that will do."""
    last = sorted({name.rpartition(".")[2] for name in names})
    called = {name for name in every if any(is_called(name, key) for key in last)}
    return last if called == names else sorted(names)


def _by_pattern(patterns: Any, name: str, usual: Any) -> Any:
    """What a name is given by PEFT's patterns: expressions that a name is or ends with, the first that fits."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return usual


def _layers_of(base: Base) -> str:
    """What a transformers model calls its layers, without their number."""
    return f"{base.anatomy.decoder}.{base.anatomy.layers}"
