"""Blocks: whole decoder layers of the base's own family, learned for one domain (IP-LLM, section 4; equation 3).

Placed after the base's last layer, as the paper has it, or interleaved with its layers, as block expansion does.
A new layer starts as a copy of the base layer before it whose writes into the residual stream are zeroed: the identity,
yet with attention patterns and features that already fit the base.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from growlm.base import Base, LayerToRun
from growlm.base.anatomy import anatomy_of
from growlm.errors import IntegrityError
from growlm.modules.contract import KnowledgeModule, numbered
from growlm.modules.shapes import BlocksConfig
from growlm.modules.vocabulary import VocabularyRows


class Blocks(KnowledgeModule):
    """`num_layers` decoder layers beside a frozen base. See `BlocksConfig`."""

    kind = "blocks"
    Config = BlocksConfig
    config: BlocksConfig

    def __init__(self, base: Base, config: BlocksConfig, rows: VocabularyRows) -> None:
        super().__init__(base, config.resolve(base.num_layers), rows)
        # Own input rows change the input of layer 0.
        self.fork = 0 if rows.input is not None else self.config.after[0]
        self._attention = base.anatomy.attention
        self._patterns = [base.attention_pattern(s) for s in self.config.sources]
        self.layers = nn.ModuleList()
        for slot, source in enumerate(self.config.sources, start=base.num_layers):
            layer = type(base.layers[source])(base.config, layer_idx=source)
            # Slots of the key-value cache are labels: new layers take those behind the base's, wherever they run.
            getattr(layer, self._attention).layer_idx = slot
            self.layers.append(layer.eval())

    @classmethod
    def create(cls, base: Base, config: BlocksConfig, row_ids: Tensor | None = None) -> Self:
        module = cls(base, config, VocabularyRows.create(base, config.vocabulary, row_ids))
        with torch.no_grad():
            for layer, source in zip(module.layers, module.config.sources, strict=True):
                layer.load_state_dict(base.layers[source].state_dict())
                parameters = dict(layer.named_parameters())
                for name, value in base.anatomy.zeroed:
                    if name in parameters:
                        parameters[name].fill_(value)
        return module.float().to(base.device)

    @classmethod
    def restore(cls, base: Base, config: BlocksConfig, tensors: dict[str, Tensor], where: str) -> Self:
        config = config.resolve(base.num_layers)
        if not config.fits(base.num_layers):
            raise IntegrityError(f"{where}: its config places layers that a base of {base.num_layers} does not have")
        return super().restore(base, config, tensors, where)

    @classmethod
    def stage_of(cls, base: Base, config: BlocksConfig, name: str) -> int | None:
        number = numbered("layers", name)
        return None if number is None else dict(enumerate(config.resolve(base.num_layers).after)).get(number)

    def extend(self, layers: Sequence[LayerToRun]) -> list[LayerToRun]:
        return between(layers, self.layers, self._patterns, self.config.after)

    def extended_config(self, config: Any) -> Any:
        extended = copy.deepcopy(config)
        depth = config.num_hidden_layers
        order: list[int] = []  # per layer of the deeper model, the base layer whose settings it has
        start = 0
        for after, source in zip(self.config.after, self.config.sources, strict=True):
            order += [*range(start, after), source]
            start = after
        order += range(start, depth)
        for name in anatomy_of(config, "base").per_layer_settings:
            setting = getattr(config, name, None)
            if isinstance(setting, list | tuple):
                setattr(extended, name, [setting[i] for i in order])
        extended.num_hidden_layers = len(order)
        return extended


def between(
    layers: Sequence[LayerToRun], new: Iterable[nn.Module], patterns: Sequence[Any], after: Sequence[int]
) -> list[LayerToRun]:
    """All layers to run: new layer i, which attends in `patterns[i]`, where `after[i]` of the others have run."""
    extended: list[LayerToRun] = []
    start = 0
    for layer, pattern, place in zip(new, patterns, after, strict=True):
        extended += [*layers[start:place], LayerToRun(layer, pattern)]
        start = place
    return [*extended, *layers[start:]]
