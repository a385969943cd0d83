"""Registration: lets transformers' Auto classes find the growlm model, without importing transformers for it.

Importing growlm changes one thing outside of it, and this is it: a finder on `sys.meta_path` that waits for the two
files of transformers that hold the tables, and adds a row to each once it has been read. Where they have been read
already, the rows are added at once. The finder finds nothing itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _register_config(module: Any) -> None:
    from growlm.model.configuration import GrowlmConfig

    module.AutoConfig.register("growlm", GrowlmConfig, exist_ok=True)


def _register_model(module: Any) -> None:
    modeling = sys.modules.get("growlm.model.modeling")
    if modeling is not None and not hasattr(modeling, "GrowlmForCausalLM"):
        return  # it is being read, which is why transformers' file is: `model_is_ready` comes at its end
    from growlm.model.configuration import GrowlmConfig
    from growlm.model.modeling import GrowlmForCausalLM, GrowlmModel

    module.AutoModel.register(GrowlmConfig, GrowlmModel, exist_ok=True)
    module.AutoModelForCausalLM.register(GrowlmConfig, GrowlmForCausalLM, exist_ok=True)


_TABLES = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}


def model_is_ready() -> None:
    """Called at the end of `modeling.py`."""
    if (module := sys.modules.get("transformers.models.auto.modeling_auto")) is not None:
        _register_model(module)


class _Watcher(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _TABLES:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Registering(spec.loader)
                return spec
        return None


class _Registering(Loader):
    """Reads a file as its own loader does, then adds our row."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _TABLES[module.__name__](module)


def install() -> None:
    """Registers now what is read already, and the rest when it is read. Calling it again does nothing."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
    for name, register in _TABLES.items():
        module = sys.modules.get(name)
        if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
            register(module)
