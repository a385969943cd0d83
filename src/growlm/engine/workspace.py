"""Workspace: what a pass takes besides weights, keys and values, found by watching what smaller ones take.

Knows tensors as they come and go; not what is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from growlm.base import Base
from growlm.base.rooms import Rooms
from growlm.engine.runner import Runner, Work
from growlm.modules import ModuleSet

# v vocabulary

_FEW, _MORE = 32, 96  # tokens of the passes that are watched; what is computed grows with them in a straight line
_MIXED = 3  # copies of logits in float32 while a text is mixed in, or a token is drawn


class Watch(TorchDispatchMode):
    """Watches what is allocated within a `with` block.

    Attributes:
        peak: the most bytes of new tensors that there were at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_number(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (number := _number(leaf)) not in given:
                self._add(number, leaf)
        return out

    def _add(self, number: int, tensor: Tensor) -> None:
        before = self._live.get(number)
        if before is not None and not before[0].expired():
            return
        storage = tensor.untyped_storage()
        self._live[number] = StorageWeakRef(storage), storage.nbytes()
        self._now += storage.nbytes() - (before[1] if before is not None else 0)
        if self._now > self.peak:
            self._live = {number: held for number, held in self._live.items() if not held[0].expired()}
            self._now = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._now)


def _number(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def workspace_bytes(base: Base, tokens: int, rows: int) -> int:
    """Bytes of a pass over so many tokens, and of the logits (rows, v) after it."""
    runner, modules = Runner(base), ModuleSet(base)

    def of_pass(many: int) -> int:
        rooms = Rooms()
        with Watch() as watch:
            runner.run([Work(modules, torch.zeros(many, dtype=torch.long, device=base.device), 0, rooms.new())])
        return watch.peak - rooms.num_bytes()

    of_pass(1)  # what is measured once a process
    few, more = of_pass(_FEW), of_pass(_MORE)
    slope = max(more - few, 0) / (_MORE - _FEW)
    return int(few + slope * max(tokens - _FEW, 0)) + rows * row_bytes(base)


def row_bytes(base: Base) -> int:
    """Bytes of the logits (v,) of one row while a token is drawn from them."""
    return _MIXED * base.vocab_size * torch.float32.itemsize
