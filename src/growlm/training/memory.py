"""Memory of a training run: its peak; freed pages are kept for the next step instead of being given back.

Knows the C library's allocator and what the system counts; nothing of training.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Parameters of mallopt(3) and the values that glibc's own adjustment ends at.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_USUAL_TRIM, _USUAL_MMAP, _USUAL_MMAP_MAX = 64 << 20, 32 << 20, 65536
_NEVER = 2**31 - 1
_open = 0  # blocks that are running: the last one out sets things back


@contextmanager
def kept_pages() -> Iterator[None]:
    """Large tensors come from the heap, which does not shrink until the end.

    A step allocates and frees gigabytes in tensors of many megabytes. By default each comes fresh from the system and
    every 4 KB page of it costs a fault, about a quarter of a step. Does nothing where the C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    global _open
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    _open += 1
    try:
        yield
    finally:
        _open -= 1
        if not _open:
            _set_back(libc)


def peak_bytes() -> int:
    """The most main memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak_bytes(device: torch.device) -> int | None:
    """The most memory of a GPU that this process's tensors have had; None of what is no GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _set_back(libc: ctypes.CDLL) -> None:
    libc.mallopt(_MMAP_MAX, _USUAL_MMAP_MAX)
    libc.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
    libc.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
    libc.malloc_trim(0)
