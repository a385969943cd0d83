"""Host tier: modules' weights in main memory, between the disk and a GPU: what leaves the GPU is back in a moment.

It has a budget of bytes of its own, in which what was used last stays. A module lies there in one piece of page-locked
memory, from which the GPU copies by itself (`arrival`). Knows tensors by the hash of their file; nothing of modules.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from growlm.engine.arrival import Arrival, StageOf, copied_beside, pieces_of

Tensors = dict[str, Tensor]
_ALIGNED = 16  # bytes: what a GPU reads at once, and torch's grouped product refuses less


class HostTier:
    """Of one GPU.

    Args:
        num_bytes: at the most; 0 keeps nothing, and what is read goes on to the GPU.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self._device, self._room = device, num_bytes
        self._kept: OrderedDict[str, Tensors] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Of main memory that it takes."""
        with self._lock:
            return sum(map(_size, self._kept.values()))

    def bring(self, digest: str, read: Callable[[], Tensors], stage_of: StageOf) -> tuple[Tensors, Arrival | None]:
        """The tensors of a file on the GPU, or on their way there.

        Args:
            digest: of the file.
            read: gives them in main memory, views of one buffer.
            stage_of: of their names.

        Returns:
            Them, of which those of no stage are there, and what to wait for before the others are read.
        """
        with self._lock:
            found = self._kept.get(digest)
            if found is not None:
                self._kept.move_to_end(digest)
        if found is None:
            found = self._keep(digest, aligned(read()))
        if not found:
            return {}, None
        buffer = _buffer(found)
        there, arrival = copied_beside(buffer, pieces_of(found, buffer.data_ptr(), stage_of), self._device)
        return _views(found, buffer, there), arrival

    def _keep(self, digest: str, tensors: Tensors) -> Tensors:
        size = _size(tensors)
        if not size or size > self._room:
            return tensors
        with self._lock:
            while self._kept and sum(map(_size, self._kept.values())) + size > self._room:
                self._kept.popitem(last=False)
        try:
            locked = page_locked(tensors)
        except RuntimeError:  # the system gives no more of such memory
            return tensors
        with self._lock:
            self._kept[digest] = locked
        return locked


def aligned(tensors: Tensors) -> Tensors:
    """The same, each where a GPU's kernels want it to begin. A file packs its tensors as close as their dtypes allow;
    where one of them does not happen to fit, all are copied."""
    if not tensors:
        return tensors
    start = _buffer(tensors).data_ptr()
    if all((tensor.data_ptr() - start) % _ALIGNED == 0 for tensor in tensors.values() if tensor.numel()):
        return tensors
    ends = itertools.accumulate(-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors.values())
    starts = [0, *ends]
    buffer, found = torch.empty(starts.pop(), dtype=torch.uint8), {}
    for (name, tensor), at in zip(tensors.items(), starts, strict=True):
        found[name] = buffer[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return found


def page_locked(tensors: Tensors) -> Tensors:
    """The same in memory that the GPU reads by itself."""
    buffer = _buffer(tensors)
    return _views(tensors, buffer, buffer.pin_memory())


def _buffer(tensors: Mapping[str, Tensor]) -> Tensor:
    """The bytes that all of them are views of."""
    storage = next(iter(tensors.values())).untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _views(tensors: Tensors, old: Tensor, new: Tensor) -> Tensors:
    """The same places of another buffer."""
    found = {}
    for name, tensor in tensors.items():
        start = tensor.data_ptr() - old.data_ptr() if tensor.numel() else 0
        part = new[start : start + tensor.numel() * tensor.element_size()]
        found[name] = part.view(tensor.dtype).view(tensor.shape)
    return found


def _size(tensors: Mapping[str, Tensor]) -> int:
    return _buffer(tensors).numel() if tensors else 0
