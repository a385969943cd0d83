"""growlm: a language model that grows.

A frozen base, and beside it knowledge modules: learned one by one, kept on disk, chosen by a router, loaded when a
prompt needs them. The public names below are imported on first use, so that `import growlm` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

from growlm.model.registration import install as _install

__version__ = "0.1.0"

_HOMES = {
    "Engine": "growlm.engine",
    "GrowConfig": "growlm.training.config",
    "GrowlmConfig": "growlm.model",
    "GrowlmError": "growlm.errors",
    "GrowlmForCausalLM": "growlm.model",
    "GrowlmWarning": "growlm.errors",
    "LearnConfig": "growlm.training.config",
    "PretrainConfig": "growlm.training.config",
    "Store": "growlm.store",
    "attach": "growlm.modules",
    "detach": "growlm.modules",
    "evaluate": "growlm.evaluation",
    "export": "growlm.surgery.export",
    "grow": "growlm.training.grow",
    "import_adapter": "growlm.training.importing",
    "learn": "growlm.training.learn",
    "pretrain": "growlm.training.pretrain",
    "take_back": "growlm.training.grow",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'growlm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


_install()
