"""Base: the frozen model, and all that touches the internals of transformers' layers and caches. See `base.py`.

Names that need torch are imported on first use, so that a store is opened, and an error of a user told, without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from growlm.base.sizes import tensor_bytes

if TYPE_CHECKING:
    from growlm.base.base import Base, LayerToRun, Pass

__all__ = ["Base", "LayerToRun", "Pass", "tensor_bytes"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'growlm.base' has no attribute {name!r}")
    value = getattr(importlib.import_module("growlm.base.base"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
