"""Derived files: what a router keeps that can be made anew from the modules' own files, read if it is whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from growlm.disk.tensors import require_kinds
from growlm.errors import IntegrityError

if TYPE_CHECKING:
    from growlm.store import Store


def read_derived(store: Store, name: str, kinds: Mapping[str, tuple[torch.dtype, int]]) -> dict[str, Tensor] | None:
    """The tensors that are kept under a name; None where there are none, or where they are damaged or others than these
    kinds: made anew then."""
    try:
        tensors = store.router_files(name).read()
        if tensors is not None:
            require_kinds(name, tensors, kinds)
        return tensors
    except IntegrityError:
        return None
