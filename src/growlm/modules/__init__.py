"""Knowledge modules: new parameters beside a frozen base. `contract.py` is what every kind keeps."""

from growlm.modules.attach import attach, attached, detach
from growlm.modules.contract import KnowledgeModule, ModuleConfig, assign
from growlm.modules.kinds import KINDS, check_together, kind_of
from growlm.modules.module_set import ModuleSet

__all__ = [
    "KINDS", "KnowledgeModule", "ModuleConfig", "ModuleSet", "assign", "attach", "attached", "check_together", "detach",
    "kind_of",
]  # fmt: skip
