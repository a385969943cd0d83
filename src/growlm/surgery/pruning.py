"""Pruning: a growlm model without the experts that a domain does not use (ModuleFormer, section 5.3 and appendix D.2).

The result is a smaller ordinary checkpoint. Dropping whole layers is here as the baseline of the paper. Modules of a
store are pruned in `module_pruning.py`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growlm.base import Base, tensor_bytes
from growlm.base.checkpoint import load_model, load_tokenizer, resolve, save_model, stored_dtype
from growlm.base.placement import find_device
from growlm.disk.files import checkpoint_folder, refuse_existing
from growlm.errors import BaseModelError, ConfigError
from growlm.layers.experts import per_expert
from growlm.model.configuration import GrowlmConfig
from growlm.model.modeling import GrowlmForCausalLM
from growlm.modules import ModuleSet
from growlm.surgery.choosing import Candidates, check_share, choose
from growlm.usage.usage import Place, Usage, count_usage

LAYER_ORDERS = ("top", "uniform")
_PARTS = {"attention": "self_attn.experts", "feed_forward": "mlp.experts"}


def prune(
    source: str | Path,
    out: str | Path,
    data: Sequence[str | Path],
    *,
    keep: float,
    normalise: str = "max",
    tokens: int | None = None,
    separator: str | None = None,
    text_key: str = "text",
    format: str = "auto",
    device: str | torch.device = "auto",
) -> dict[str, Any]:
    """Writes a growlm model without its least used experts on a text, and returns what was kept.

    Every expert's count is divided by the largest count at its place (`max`) or by their sum (`sum`); the experts of
    the whole model are then taken in that order until the share `keep` of its parameters is reached. Every layer keeps
    as many experts as a token uses.

    Args:
        source: folder of a growlm model, or a hub id.
        data: text of the domain.
        keep: share of all parameters that stays.
        tokens: of the text at most.
        device: where the text is read.

    Raises:
        BaseModelError: not a growlm model with experts.
        ConfigError: a share that cannot be reached without emptying a layer; says which is possible. Or no such device.
        StoreError: `out` exists and is not empty, or the disk is full.
    """
    out = Path(out).expanduser()
    refuse_existing(out)
    check_share(keep, normalise)
    found = find_device(device)
    folder = resolve(source)
    model = load_growlm(folder)
    tokenizer = load_tokenizer(folder)
    base = Base(model, str(folder))
    base.model.to(found)
    usage = count_usage(
        ModuleSet(base), tokenizer, {"text": data}, tokens=tokens, separator=separator, text_key=text_key, format=format
    )
    if not usage.places:
        raise ConfigError(
            f"{folder}: its experts are found by product keys; pools can be pruned in a store's module (--module), "
            "not in a model"
        )
    base.model.to("cpu")
    kept = choose_experts(model, usage, "text", keep=keep, normalise=normalise)
    smaller = without_experts(model, usage.places, kept)
    experts = [{"place": p.name, "kept": k, "of": p.num_experts} for p, k in zip(usage.places, kept, strict=True)]
    return {**_written(model, smaller, tokenizer, out), "experts": experts}


def prune_layers(source: str | Path, out: str | Path, *, keep: float, order: str) -> dict[str, Any]:
    """Writes a growlm model without some of its layers, and returns which were kept: the baseline, no text is read.

    Args:
        source: folder of a growlm model, or a hub id.
        keep: share of the layers that stays.
        order: as `drop_layers`.

    Raises:
        BaseModelError: not a growlm model.
        ConfigError: no layer would be left.
        StoreError: `out` exists and is not empty, or the disk is full.
    """
    out = Path(out).expanduser()
    refuse_existing(out)
    folder = resolve(source)
    model = load_growlm(folder)
    tokenizer = load_tokenizer(folder)
    smaller = drop_layers(model, keep, order)
    depth = model.config.num_hidden_layers
    layers = {"kept": layers_kept(depth, keep, order), "of": depth}
    return {**_written(model, smaller, tokenizer, out), "layers": layers}


def _written(model: GrowlmForCausalLM, smaller: GrowlmForCausalLM, tokenizer: Any, out: Path) -> dict[str, Any]:
    with checkpoint_folder(out, tensor_bytes(smaller.parameters())) as work:
        save_model(smaller, work)
        tokenizer.save_pretrained(work)
    before, after = model.num_parameters(), smaller.num_parameters()
    return {"path": str(out), "parameters_before": before, "parameters": after, "kept": after / before}


def load_growlm(folder: Path) -> GrowlmForCausalLM:
    """
    Raises:
        BaseModelError: the checkpoint is of another family.
    """
    model = load_model(folder, stored_dtype(folder))
    if not isinstance(model, GrowlmForCausalLM):
        raise BaseModelError(
            f"{folder}: is of the family {model.config.model_type!r}; only growlm models can be pruned"
        )
    return model


def choose_experts(
    model: GrowlmForCausalLM, usage: Usage, domain: str, *, keep: float, normalise: str
) -> list[list[int]]:
    """Experts that stay, ascending, for each place.

    Raises:
        ConfigError: fewer parameters than every layer needs.
    """
    routers = [
        Candidates(counts, 0, _expert_size(model, place), _top_k(model.config, place))
        for place, counts in zip(usage.places, usage.counts[domain], strict=True)
    ]
    return choose(routers, total=model.num_parameters(), keep=keep, normalise=normalise)


def without_experts(
    model: GrowlmForCausalLM, places: Sequence[Place], kept: Sequence[Sequence[int]]
) -> GrowlmForCausalLM:
    """A model with the experts `kept` at each place, and everything else as it is."""
    config = copy.deepcopy(model.config)
    numbers: dict[str, list[int]] = {
        "attention": [config.attention_experts_of(i) for i in range(config.num_hidden_layers)],
        "feed_forward": [config.experts_of(i) for i in range(config.num_hidden_layers)],
    }
    tensors: dict[str, Tensor] = dict(model.state_dict())
    for place, experts in zip(places, kept, strict=True):
        numbers[place.part][place.layer] = len(experts)
        rows = torch.tensor(experts, device=model.device)
        for name, tensor in _per_expert(model, place).items():
            tensors[name] = tensor.detach()[rows]
    config.num_attention_experts, config.num_experts = numbers["attention"], numbers["feed_forward"]
    return _made(config, tensors, model)


def drop_layers(model: GrowlmForCausalLM, keep: float, order: str) -> GrowlmForCausalLM:
    """The baseline: a model with the share `keep` of its layers, the `top` ones dropped or `uniform`ly spread ones.

    Raises:
        ConfigError: no layer would be left.
    """
    chosen = layers_kept(model.config.num_hidden_layers, keep, order)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(chosen)
    for name in ("attention", "feed_forward", "num_experts", "num_attention_experts", "peer_num_experts"):
        if isinstance(setting := getattr(config, name), list):
            setattr(config, name, [setting[i] for i in chosen])
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if found is None:
            tensors[name] = tensor
        elif int(found[1]) in chosen:
            tensors[f"model.layers.{chosen.index(int(found[1]))}.{found[2]}"] = tensor
    return _made(config, tensors, model)


def layers_kept(depth: int, keep: float, order: str) -> list[int]:
    """Of `depth` layers those that `drop_layers` keeps."""
    if order not in LAYER_ORDERS:
        raise ConfigError(f"order {order!r} is not one of {', '.join(LAYER_ORDERS)}")
    if not 0 < keep <= 1:
        raise ConfigError(f"keep is {keep}; it is a share of the layers, above 0 and at most 1")
    number = round(keep * depth)
    if number < 1:
        raise ConfigError(f"keep is {keep} of {depth} layers, which leaves none")
    if order == "top":
        return list(range(number))
    return [round(i * (depth - 1) / max(number - 1, 1)) for i in range(number)]


def _made(config: GrowlmConfig, tensors: Mapping[str, Tensor], model: GrowlmForCausalLM) -> GrowlmForCausalLM:
    config.check()
    made: Any = GrowlmForCausalLM(config)
    made.to(model.dtype)
    made.load_state_dict({k: v.clone() for k, v in tensors.items()})
    return made.eval()


def _top_k(config: GrowlmConfig, place: Place) -> int:
    return config.attention_experts_per_tok if place.part == "attention" else config.num_experts_per_tok


def _expert_size(model: GrowlmForCausalLM, place: Place) -> int:
    """Parameters that one expert takes: both maps and its row of the router."""
    return sum(tensor[0].numel() for tensor in _per_expert(model, place).values())


def _per_expert(model: GrowlmForCausalLM, place: Place) -> dict[str, Tensor]:
    """By their names in the model, the tensors at a place that have one row an expert."""
    where = f"model.layers.{place.layer}.{_PARTS[place.part]}"
    layer: Any = model.get_submodule(where)
    return {f"{where}.{name}": tensor for name, tensor in per_expert(layer).items()}
