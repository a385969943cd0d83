"""Registration: lets transformers' Auto classes find the growlm model, without importing transformers for it.

Importing growlm changes one thing outside of it, and this is it: a finder on `sys.meta_path` that waits for the file of
transformers that holds the table of configs, and adds our row once it has been read. Where it has been read already,
the row is added at once. The finder finds nothing itself. The model follows with the first config: whoever asks for a
model has one, and transformers' own files, which our layers need, have all been read by then.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CONFIGS = "transformers.models.auto.configuration_auto"


def _register_config(module: Any) -> None:
    from growlm.model.configuration import GrowlmConfig

    module.AutoConfig.register("growlm", GrowlmConfig, exist_ok=True)


@functools.cache
def register_model() -> None:
    """Adds the model's row to the tables of AutoModel and AutoModelForCausalLM, once."""
    from transformers import AutoModel, AutoModelForCausalLM

    from growlm.model.configuration import GrowlmConfig
    from growlm.model.modeling import GrowlmForCausalLM, GrowlmModel

    AutoModel.register(GrowlmConfig, GrowlmModel, exist_ok=True)
    AutoModelForCausalLM.register(GrowlmConfig, GrowlmForCausalLM, exist_ok=True)


class _Watcher(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _CONFIGS:
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
        _register_config(module)


def install() -> None:
    """Registers the config now, or when its table is read. Calling it again does nothing."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
    module = sys.modules.get(_CONFIGS)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        _register_config(module)
