"""Recall: the module kind that is nothing but a domain's own text, mixed into the next token's distribution.

It acts behind the last layer, so that all that the base computes is shared, keys and values included. Every other kind
may carry such a memory beside its layers (`growlm.recall.memory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor

from growlm.base import Base, LayerToRun
from growlm.modules.contract import KnowledgeModule
from growlm.modules.shapes import RecallConfig
from growlm.modules.vocabulary import VocabularyRows


class Recall(KnowledgeModule):
    """A module that is nothing but a memory of text. See `RecallConfig`."""

    kind = "recall"
    combines = True
    trains = False
    exports = False
    Config = RecallConfig
    config: RecallConfig

    def __init__(self, base: Base, config: RecallConfig, rows: VocabularyRows) -> None:
        super().__init__(base, config, rows)
        self.fork = base.num_layers

    @classmethod
    def create(cls, base: Base, config: RecallConfig, row_ids: Tensor | None = None) -> Self:
        return cls(base, config, VocabularyRows()).to(base.device)

    def extend(self, layers: Sequence[LayerToRun]) -> list[LayerToRun]:
        return list(layers)

    def extended_config(self, config: Any) -> Any:
        return config
