"""Plan: which modules are to be learned from which text, with which settings, as a YAML file says it.

    defaults: {kind: lora, tokens: 100k}
    modules:
      law: {data: statutes/, epochs: 3}
      medicine: {data: [pubmed.jsonl, notes/], text_key: abstract}

Paths are relative to the file's folder. All that is wrong with a plan is told at once, before anything is begun.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from growlm.errors import ConfigError, GrowlmError, settings_written
from growlm.modules.shapes import SHAPES
from growlm.store.stored_module import is_name
from growlm.training.config import LearnConfig

_HUB = "hub:"
_OWN = ("data", "update")  # what a module has besides settings
# Options of `growlm learn` alone.
_OF_ONE = {"devices", "shard_base", "restart", "report", "samples", "dry_run", "json"}


@dataclass(frozen=True)
class Learning:
    """One module of a plan.

    Attributes:
        data: paths, or `hub:owner/name`.
        settings: of `LearnConfig`.
        update: whether it is the next version of a module that exists.
    """

    name: str
    data: tuple[str, ...]
    settings: Mapping[str, Any]
    update: bool = False

    @property
    def config(self) -> LearnConfig:
        """
        Raises:
            ConfigError: a setting that there is not, or that cannot be.
        """
        return LearnConfig(**self.settings)


class _Strict(yaml.SafeLoader):
    """YAML in which a key stands once."""


def _once(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in found:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: {key} stands there twice; keep one")
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _once)


def read_plan(path: Path) -> list[Learning]:
    """
    Raises:
        ConfigError: the file cannot be read, or what it asks for cannot be: every fault on a line of its own.
    """
    try:
        plan = yaml.load(path.read_text(encoding="utf-8"), _Strict)
    except (OSError, UnicodeDecodeError) as error:
        told = getattr(error, "strerror", None) or "is not UTF-8"
        raise ConfigError(f"{path}: {told}; give a plan, as growlm learn-all --help shows one") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no YAML: {' '.join(str(error).split())[:200]}") from None
    modules = plan.get("modules") if isinstance(plan, dict) else None
    if not isinstance(modules, dict) or not modules:
        raise ConfigError(f"{path}: names no modules; write them under `modules:`, each with its `data:`")
    faults = [
        f"{key} is not known; a plan has defaults and modules" for key in plan if key not in ("defaults", "modules")
    ]
    defaults = plan.get("defaults") or {}
    if not isinstance(defaults, dict):
        raise ConfigError(f"{path}: defaults are settings by name")
    found = []
    for name, asked in modules.items():
        learning, wrong = _learning(name, defaults, asked, path.parent)
        faults += wrong
        if learning is not None:
            found.append(learning)
    if faults:
        raise ConfigError(f"{path}: " + f"\n{path}: ".join(faults))
    return found


def _learning(name: Any, defaults: Mapping[str, Any], asked: Any, folder: Path) -> tuple[Learning | None, list[str]]:
    """A module, and all that is wrong with it."""
    if not isinstance(name, str) or not is_name(name):
        return None, [f"{name} is no name of a module: small letters, digits, dots, - and _"]
    if not isinstance(asked, dict) or not asked.get("data"):
        return None, [f"{name}: says no data; give it files or folders as `data:`"]
    given, faults = asked["data"], []
    items = given if isinstance(given, list) else [given]
    data = []
    for item in items:
        if not isinstance(item, str):
            faults.append(f"{name}: data {item!r} is no path")
        elif item.startswith(_HUB):
            data.append(item)
        else:
            place = folder / Path(item).expanduser()
            data.append(str(place))
            if not place.exists():
                faults.append(f"{name}: {place}: no such file")
    for key in sorted((defaults.keys() | asked.keys()) & _OF_ONE):
        faults.append(f"{name}: {key} is an option of growlm learn alone; leave it out of the plan")
    settings = {**_of_kind(defaults, asked), **{key: value for key, value in asked.items() if key not in _OWN}}
    settings = {key: value for key, value in settings.items() if key not in _OF_ONE}
    update = asked.get("update", False)
    if not isinstance(update, bool):
        faults.append(f"{name}: update is {update!r}; it is true or false")
    learning = Learning(name, tuple(data), settings, bool(update))
    faults += [f"{name}: {told}" for told in _all_wrong(learning)]
    return learning, faults


def _all_wrong(learning: Learning) -> list[str]:
    """What is told of settings that cannot be: of what is left each time without the one that was told of."""
    rest, found = dict(learning.settings), []
    while told := _wrong(replace(learning, settings=rest)):
        found.append(told)
        for key in sorted(rest, key=lambda key: (key == "kind", str(key) not in told)):
            fewer = {name: value for name, value in rest.items() if name != key}
            if _wrong(replace(learning, settings=fewer)) != told:
                rest = fewer
                break
        else:
            break
    return found


def _wrong(learning: Learning) -> str | None:
    """What is told of settings that cannot be; of several the first."""
    try:
        with settings_written(str):
            _ = learning.config
    except (GrowlmError, TypeError) as error:
        return str(error)
    return None


def _of_kind(defaults: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults; of a module that names another kind, without those that are of a kind alone."""
    if asked.get("kind", defaults.get("kind")) == defaults.get("kind"):
        return dict(defaults)
    of_all = {field.name for field in fields(LearnConfig)}
    of_a_kind = {"kind"}.union(*(shape.settings() for shape in SHAPES.values())) - of_all
    return {key: value for key, value in defaults.items() if key not in of_a_kind | {"kind"}}


def taken(plan: Sequence[Learning], existing: Mapping[str, Any]) -> list[str]:
    """What is wrong with a plan for a store, whose modules are given."""
    missing = [one.name for one in plan if one.update and one.name not in existing]
    return [f"{name}: there is no such module to update" for name in missing]
