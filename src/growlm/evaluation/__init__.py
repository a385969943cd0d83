"""Evaluation: what a store knows, whether its router finds it, and whether anything was forgotten.

The public names are imported on first use, so that the command line knows the settings without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from growlm.evaluation.config import EvalConfig
    from growlm.evaluation.measure import EvalResult, evaluate

__all__ = ["EvalConfig", "EvalResult", "evaluate"]

_HOMES = {"EvalConfig": "config", "EvalResult": "measure", "evaluate": "measure"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'growlm.evaluation' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"growlm.evaluation.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
