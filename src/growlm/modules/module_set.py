"""Module set: the modules that are active for a request, as the layers and projections to run."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from growlm.base import Base, LayerToRun
from growlm.errors import BaseModelError, ConfigError
from growlm.modules.contract import KnowledgeModule, base_shape
from growlm.modules.kinds import check_together
from growlm.modules.vocabulary import VocabularyRows
from growlm.recall.contexts import Contexts
from growlm.recall.memory import Memory


class Stage(NamedTuple):
    """What runs where one of the base's layers does: the modules' own layers before it, and the layer, changed or as it
    is; None behind the last one."""

    beside: tuple[LayerToRun, ...]
    base: LayerToRun | None


class ModuleSet:
    """The modules active for a request (none: the base itself), as the layers and projections to run.

    Several run in the order of their identities, whatever order they are given in: sums of floating-point numbers
    depend on it, and the digest says nothing of an order. What their vocabulary rows add is added up.

    Attributes:
        layers: all that run, in order.
        stages: the same, by the base's layers, of which each has one, and one more behind them.

    Raises:
        ConfigError: modules that cannot be active together, or one that is given twice.
        BaseModelError: a module that was made for a base of another shape.
    """

    def __init__(self, base: Base, modules: Sequence[KnowledgeModule] = ()) -> None:
        modules = sorted(modules, key=lambda m: m.identity)
        check_together([(_called(m), type(m)) for m in modules])
        for one, next_one in itertools.pairwise(modules):
            if one.identity == next_one.identity:
                raise ConfigError(f"{_called(one)} is given twice; give it once")
        for module in modules:
            if module.shape != base_shape(base):
                raise BaseModelError(f"a module made for a base of shape {module.shape} cannot run on {base.where}")
        self.base = base
        self.modules = tuple(modules)
        self.fork = min((m.fork for m in modules), default=base.num_layers)
        layers = base.layers_to_run()
        for module in modules:
            layers = module.extend(layers)
        self.layers = layers
        self.stages = _stages(layers, base.num_layers)
        self.rows = VocabularyRows.joined([m.rows for m in modules])
        self.memories: list[Memory] = [m.memory for m in modules if m.memory is not None and m.memory.active]
        self.cache_slots = max((m.cache_slots(base) for m in modules), default=base.num_layers)
        names = "\n".join(m.identity for m in modules)
        self.digest = hashlib.sha256(names.encode()).hexdigest() if modules else "base"

    def arrive(self, stage: int | None = None) -> None:
        """As `KnowledgeModule.arrive`, of all of them. Whoever runs `stages` or `layers` by himself calls it before."""
        for module in self.modules:
            module.arrive(stage)

    def embed(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        return self.rows.embed(self.base, hidden, input_ids)

    def project(self, hidden: Tensor, contexts: Contexts | None = None) -> Tensor:
        """Logits (..., v) from the last layer's output (..., d).

        Args:
            contexts: (...) the tokens up to each of them; asked for where `memories` are active.
        """
        normed = self.base.norm(hidden)
        return self.finish(self.base.head(normed), normed, contexts)

    def finish(self, plain: Tensor, normed: Tensor, contexts: Contexts | None = None) -> Tensor:
        """As `project` where the base's norm and head have made `normed` (..., d) and `plain` (..., v) already."""
        logits = self.rows.finish(self.base, plain, normed)
        for memory in self.memories:
            assert contexts is not None
            logits = memory.mix(logits, contexts)
        return logits

    def contexts(self, seen: Tensor, count: int) -> Contexts | None:
        """What `project` is to be given for the newest `count` tokens of rows (b, s), which are below 0 where a row has
        none: (b, count), if anything."""
        return Contexts.of(seen, count) if self.memories else None

    def hidden(self, input_ids: Tensor, *, visible: Tensor | None = None) -> Tensor:
        """The last layer's output (b, t, d), before the final norm, without a cache."""
        self.arrive()
        hidden, shared = self.base.begin(input_ids, visible=visible)
        hidden = self.base.embed_positions(self.embed(hidden, input_ids), shared.positions)
        return self.base.run(hidden, self.layers, shared)

    def logits(self, input_ids: Tensor, *, visible: Tensor | None = None) -> Tensor:
        """Logits (b, t, v) of `input_ids` (b, t), without a cache."""
        seen = input_ids if visible is None else input_ids.masked_fill(~visible, -1)
        contexts = self.contexts(seen, input_ids.shape[1])
        return self.project(self.hidden(input_ids, visible=visible), contexts)


def _stages(layers: Sequence[LayerToRun], depth: int) -> list[Stage]:
    stages, beside = [], []
    for run in layers:
        if run.number is None:
            beside.append(run)
        else:
            stages.append(Stage(tuple(beside), run))
            beside = []
    assert [stage.base.number for stage in stages if stage.base] == list(range(depth))
    return [*stages, Stage(tuple(beside), None)]


def _called(module: KnowledgeModule) -> str:
    name, at, _ = module.identity.partition("@")
    return name if at else "a module"
