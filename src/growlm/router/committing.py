"""Committing: a module enters the store, then the router learns of it: a kill in between loses neither."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from growlm.router.evidence import VECTORS
from growlm.router.fitting import add_domain

if TYPE_CHECKING:
    from torch import Tensor

    from growlm.modules import KnowledgeModule
    from growlm.store import Store, StoredModule


def commit_and_route(
    store: Store,
    name: str,
    module: KnowledgeModule,
    training: dict[str, Any],
    files: Mapping[str, Mapping[str, Tensor]],
    old: StoredModule | None,
    *,
    made_from: int | None = None,
    evidence_of: StoredModule | None = None,
) -> StoredModule:
    """Saves a module as the next version of `name`, and gives the router its evidence, where `files` hold any.

    Args:
        old: the version that it replaces for the router.
        made_from, evidence_of: as in `Store.commit`.

    Raises:
        StoreError: as `Store.commit`.
    """
    saved = store.commit(name, module, training, files, made_from=made_from, evidence_of=evidence_of)
    if VECTORS in files:
        add_domain(store, saved, old)
    return saved
