"""Attach: makes a transformers model itself run with one module, and undoes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from growlm.base import Base
from growlm.base.anatomy import anatomy_of
from growlm.errors import BaseModelError, ConfigError
from growlm.modules.contract import KnowledgeModule, base_shape


class _HeadWithRows(nn.Module):
    def __init__(self, head: nn.Module, rows: nn.Module) -> None:
        super().__init__()
        self.inner, self.rows = head, rows

    @property
    def weight(self) -> Tensor:
        return self.inner.weight  # type: ignore[return-value]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.rows.add_to(self.inner(hidden), hidden)  # type: ignore[operator]


class _EmbeddingWithRows(nn.Module):
    def __init__(self, embedding: nn.Module, rows: nn.Module, scale: float) -> None:
        super().__init__()
        self.inner, self.rows, self.scale = embedding, rows, scale

    @property
    def weight(self) -> Tensor:
        return self.inner.weight  # type: ignore[return-value]

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.rows.add_to(self.inner(input_ids), input_ids, self.scale)  # type: ignore[operator]


def attach(model: Any, module: KnowledgeModule) -> None:
    """Makes a transformers model run with `module`: its own `forward`, `generate` and cache work on.

    Changes the model in place, for one module at a time; `detach` gives it back as it was. The engine does not use
    this: it runs any number of modules beside one base that nobody changes.

    Raises:
        ConfigError: a module is attached already, or this one recalls text, for which a model of transformers has no
            place.
        BaseModelError: the family is not supported.
    """
    if module.memory is not None and module.memory.active:
        raise ConfigError("a module that recalls text cannot be attached to a transformers model; use growlm's Engine")
    if hasattr(model, "_growlm_detached"):
        raise ConfigError("this model has a module attached already; detach it first")
    base = Base(model, freeze=False)
    if module.shape != base_shape(base):
        raise BaseModelError(f"a module made for a base of shape {module.shape} cannot be attached to this model")
    anatomy, decoder = base.anatomy, base.decoder
    layers = [run.layer for run in module.extend(base.layers_to_run())]
    state = {
        "config": model.config,
        "layers": getattr(decoder, anatomy.layers),
        "indices": [getattr(layer, anatomy.attention).layer_idx for layer in layers],
        "extended": layers,
        "head": base.head,
        "embedding": base.embedding,
    }
    setattr(decoder, anatomy.layers, nn.ModuleList(layers))
    _number(layers, anatomy.attention, range(len(layers)))
    _set_config(model, decoder, module.extended_config(model.config))
    if module.rows.head is not None:
        setattr(model, anatomy.head, _HeadWithRows(base.head, module.rows.head))
    if module.rows.input is not None:
        wrapped = _EmbeddingWithRows(base.embedding, module.rows.input, base.embedding_scale)
        setattr(decoder, anatomy.embedding, wrapped)
    model._growlm_detached = state


def detach(model: Any) -> None:
    """Undoes `attach`: the model's layers, config, head and embedding are the same objects as before.

    Raises:
        ConfigError: nothing is attached.
    """
    state = model.__dict__.pop("_growlm_detached", None)
    if state is None:
        raise ConfigError("this model has no module attached")
    anatomy = anatomy_of(state["config"], "base")
    decoder = getattr(model, anatomy.decoder)
    _number(state["extended"], anatomy.attention, state["indices"])
    setattr(decoder, anatomy.layers, state["layers"])
    setattr(decoder, anatomy.embedding, state["embedding"])
    setattr(model, anatomy.head, state["head"])
    _set_config(model, decoder, state["config"])


@contextmanager
def attached(model: Any, module: KnowledgeModule) -> Iterator[Any]:
    """`attach` for the length of a `with` block."""
    attach(model, module)
    try:
        yield model
    finally:
        detach(model)


def _number(layers: Sequence[nn.Module], attention: str, indices: Sequence[int]) -> None:
    for layer, index in zip(layers, indices, strict=True):
        getattr(layer, attention).layer_idx = index


def _set_config(model: Any, decoder: Any, config: Any) -> None:
    model.config = decoder.config = config
