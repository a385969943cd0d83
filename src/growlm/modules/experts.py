"""Experts: routed experts in the layers of a frozen base, learned for one domain (ModuleFormer, section 4.3).

Where a layer of the base has experts, new ones join them and are chosen by the same router, whose old rows stay as they
are (equation 9). Where it has a dense feed-forward, the experts stand beside it with a router of their own, and the
dense part stays always on. Several such modules can be active together.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from growlm.base import Base, LayerToRun
from growlm.errors import ConfigError
from growlm.layers.around import variant
from growlm.layers.experts import AttentionExperts, SparseFeedForward
from growlm.layers.insertion import AttentionUnion, Beside, FeedForwardUnion, NewExperts
from growlm.layers.losses import routing_regularisation
from growlm.modules.contract import KnowledgeModule, numbered
from growlm.modules.shapes import ExpertsConfig
from growlm.modules.vocabulary import VocabularyRows


class _LayerExperts(nn.Module):
    """What one layer gets."""

    def __init__(self, feed_forward: SparseFeedForward | NewExperts, attention: NewExperts | None) -> None:
        super().__init__()
        self.feed_forward = feed_forward
        self.attention = attention


class Experts(KnowledgeModule):
    """Experts in the layers of a frozen base. See `ExpertsConfig`."""

    kind = "experts"
    combines = True
    exports = False
    Config = ExpertsConfig
    config: ExpertsConfig

    def __init__(self, base: Base, config: ExpertsConfig, rows: VocabularyRows) -> None:
        super().__init__(base, config, rows)
        config.check(base.num_layers, base.where)
        # Own input rows change the input of layer 0.
        self.fork = 0 if rows.input is not None else config.first_layer
        self._anatomy = base.anatomy
        self.layers = nn.ModuleList(
            _new(layer, base, config, index) for index, layer in enumerate(base.layers[config.first_layer :])
        )

    @classmethod
    def create(cls, base: Base, config: ExpertsConfig, row_ids: Tensor | None = None) -> Self:
        module = cls(base, config, VocabularyRows.create(base, config.vocabulary, row_ids))
        with torch.no_grad():
            for part in module.layers:
                assert isinstance(part, _LayerExperts)
                if isinstance(part.feed_forward, SparseFeedForward):
                    part.feed_forward.down.weight.zero_()  # beside a dense feed-forward: adds exactly nothing yet
        return module.float().to(base.device)

    def enable_new_experts(self) -> None:
        """New experts of a layer that has some are chosen from now on."""
        for part in self.modules():
            if isinstance(part, NewExperts):
                part.enable_new_experts()

    def regularisation(self) -> Tensor:
        """`||A'||^2` over all layers (equation 10).

        Raises:
            ConfigError: the base's routers compare directions, for which the length of rows means nothing.
        """
        total = torch.zeros(())
        for part in self.modules():
            if isinstance(part, NewExperts):
                if part.compares_directions:
                    raise ConfigError(
                        "--routing-regularisation makes the rows of new experts short, and the cosine routers of this "
                        "base look at directions only; leave it out"
                    )
                total = total.to(part.embeddings.device) + routing_regularisation(part.embeddings)
            elif isinstance(part, SparseFeedForward):
                total = total.to(part.down.weight.device) + routing_regularisation(part.router.embeddings)
        return total

    @classmethod
    def stage_of(cls, base: Base, config: ExpertsConfig, name: str) -> int | None:
        number = numbered("layers", name)
        return None if number is None else config.first_layer + number

    def extend(self, layers: Sequence[LayerToRun]) -> list[LayerToRun]:
        first = self.config.first_layer
        changed = [
            run._replace(layer=_with(run.layer, part, self._anatomy))
            for run, part in zip(layers[first:], self.layers, strict=True)
        ]
        return [*layers[:first], *changed]

    def extended_config(self, config: Any) -> Any:
        return copy.deepcopy(config)


def _new(layer: nn.Module, base: Base, config: ExpertsConfig, index: int) -> _LayerExperts:
    num_experts, num_attention_experts = config.experts_of(index), config.attention_experts_of(index)
    feed_forward = getattr(layer, base.anatomy.feed_forward)
    inner = getattr(feed_forward, "experts", None)
    made: SparseFeedForward | NewExperts
    if isinstance(inner, SparseFeedForward):
        made = NewExperts(inner.router, inner.up, inner.down, num_experts)
    else:
        if config.num_experts_per_tok > num_experts:
            raise ConfigError(
                f"num_experts_per_tok is {config.num_experts_per_tok}; it must be at most num_experts, {num_experts}"
            )
        made = SparseFeedForward(
            base.hidden_size,
            config.expert_size or max(base.hidden_size // 2, 1),
            num_experts,
            config.num_experts_per_tok,
            size=config.router_size,
        )
    attention = None
    old = getattr(getattr(layer, base.anatomy.attention), "experts", None)
    if isinstance(old, AttentionExperts) and num_attention_experts:
        attention = NewExperts(old.router, old.query, old.output, num_attention_experts)
    return _LayerExperts(made, attention)


def _with(layer: nn.Module, part: nn.Module, anatomy: Any) -> nn.Module:
    """A layer that runs as `layer` does with `part` added. The base's own layer is not touched: the variant is a
    shallow copy that shares all its parameters, with other objects in the place of its feed-forward and attention."""
    assert isinstance(part, _LayerExperts)
    original: nn.Module = layer.__dict__.get("_growlm_original", layer)
    added: tuple[_LayerExperts, ...] = (*layer.__dict__.get("_growlm_added", ()), part)
    feed_forward = getattr(original, anatomy.feed_forward)
    new: nn.Module
    if isinstance(part.feed_forward, NewExperts):
        union = FeedForwardUnion(feed_forward.experts, [p.feed_forward for p in added])  # type: ignore[misc]
        new = variant(feed_forward, {"experts": union})
    else:
        new = Beside(feed_forward, [p.feed_forward for p in added])  # type: ignore[misc]
    made = variant(original, {anatomy.feed_forward: new})
    attending = [p.attention for p in added if p.attention is not None]
    if attending:
        attention = getattr(original, anatomy.attention)
        heads = AttentionUnion(attention.experts, attending)
        made._modules[anatomy.attention] = variant(attention, {"experts": heads})
    made.__dict__["_growlm_original"], made.__dict__["_growlm_added"] = original, added
    return made
