"""Language models that are trained from scratch: a transformers model whose layers choose their parts.

`import growlm` is enough for AutoConfig and AutoModel to find it: `registration.py`.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "GrowlmConfig": "growlm.model.configuration",
    "GrowlmForCausalLM": "growlm.model.modeling",
    "GrowlmModel": "growlm.model.modeling",
}
__all__ = ["GrowlmConfig", "GrowlmForCausalLM", "GrowlmModel"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'growlm.model' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
