"""Calls: how the decoder layers of the installed transformers want to be called, read from their signatures.

The names of arguments change between releases; what is not understood is an error before anything runs.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from torch import nn

from growlm.errors import BaseModelError
from growlm.requirements import range_of

_CACHE = ("cache", "past_key_values", "layer_past")  # what the argument for keys and values is or was called
_KNOWN = ("attention_mask", "position_ids", "position_embeddings", "use_cache", *_CACHE)


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a class of decoder layers, besides the hidden states.

    Attributes:
        cache: the name of that for keys and values.
        names: all that growlm can give.
    """

    cache: str
    names: frozenset[str]

    @classmethod
    def of(cls, layer: nn.Module, where: str) -> LayerCall:
        """
        Raises:
            BaseModelError: the layer's call is not understood; `where` names the base in the message.
        """
        _, _, *parameters = inspect.signature(type(layer).forward).parameters.values()  # after self and hidden states
        names = [p.name for p in parameters]
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
        cache = next((name for name in _CACHE if name in names), None)
        needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        unknown = [name for name in needed if name not in _KNOWN]
        if cache is None or unknown:
            problem = (
                f"needs an argument {unknown[0]!r}" if unknown else f"has none of the arguments {', '.join(_CACHE)}"
            )
            raise BaseModelError(
                f"{where}: {type(layer).__name__} of transformers {metadata.version('transformers')} {problem}, so "
                "growlm cannot run it; it was tested with transformers "
                f"{range_of('transformers')}: install one of these"
            )
        given = _KNOWN if open_ended else names
        return cls(cache, frozenset(name for name in given if name not in _CACHE) | {cache})

    def arguments(self, **values: Any) -> dict[str, Any]:
        """Those of `values` that are given and that the layer takes; `cache` under the layer's own name for it."""
        named = {self.cache if name == "cache" else name: value for name, value in values.items()}
        return {name: value for name, value in named.items() if name in self.names and value is not None}
