"""Kinds of knowledge modules: where each has its class, and which can be active together."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from growlm.errors import ConfigError
from growlm.modules.contract import KnowledgeModule
from growlm.modules.shapes import parted_kind

KINDS = {
    "blocks": "growlm.modules.blocks:Blocks",
    "experts": "growlm.modules.experts:Experts",
    "peer": "growlm.modules.peer:Peer",
    "lora": "growlm.modules.lora:Lora",
    "recall": "growlm.modules.recall:Recall",
}


def kind_of(name: str) -> type[KnowledgeModule]:
    """The class of a module kind, with or without text.

    Raises:
        ConfigError: no such kind.
    """
    home, _, cls = KINDS[parted_kind(name)[0]].partition(":")
    return getattr(importlib.import_module(home), cls)


def check_together(named: Sequence[tuple[str, type[KnowledgeModule]]]) -> None:
    """Checks that modules, by what to call them and their class, can be active in one request.

    Raises:
        ConfigError: one of several is of a kind that runs alone, or two are of different kinds.
    """
    if len(named) < 2:
        return
    combining = " or ".join(kind for kind in KINDS if kind_of(kind).combines)
    first, kind = named[0]
    for name, other in named:
        if not other.combines:
            raise ConfigError(
                f"{name} is of kind {other.kind}, and such modules cannot be active together with others; name one "
                f"module alone, or learn them with --kind {combining}"
            )
        if other is not kind:
            raise ConfigError(
                f"{first} is of kind {kind.kind} and {name} of kind {other.kind}: modules of different kinds cannot be "
                "active together; leave out one of them"
            )
