"""Knowledge modules: new parameters beside a frozen base. `contract.py` is what every kind keeps.

The public names are imported on first use, so that the command line knows the settings of kinds (`shapes.py`) without
importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from growlm.modules.attachment import attach, attached, detach
    from growlm.modules.contract import KnowledgeModule, assign
    from growlm.modules.kinds import KINDS, check_together, kind_of
    from growlm.modules.module_set import ModuleSet
    from growlm.modules.shapes import ModuleConfig

__all__ = [
    "KINDS", "KnowledgeModule", "ModuleConfig", "ModuleSet", "assign", "attach", "attached", "check_together", "detach",
    "kind_of",
]  # fmt: skip

_HOMES = {
    "KINDS": "kinds", "KnowledgeModule": "contract", "ModuleConfig": "shapes", "ModuleSet": "module_set",
    "assign": "contract", "attach": "attachment", "attached": "attachment", "check_together": "kinds",
    "detach": "attachment", "kind_of": "kinds",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'growlm.modules' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"growlm.modules.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
