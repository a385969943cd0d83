"""Sizes of tensors. Imports nothing heavy: a store is opened with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors. (`parameters()` yields a tied weight once.)"""
    return sum(t.nbytes for t in tensors)
