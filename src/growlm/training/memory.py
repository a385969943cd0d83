"""Memory of a training run: its peak; freed pages are kept for the next step instead of being given back.

Knows the C library's allocator and what the system counts; nothing of training.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from growlm.units import format_size

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


def what_fits(
    device: torch.device, base: int, module: int, length: int, rows: int, one_row: Callable[[], None] | None
) -> str:
    """What to tell a user whose memory was full: what is resident, and what fits beside it.

    Args:
        base, module: bytes of these; of the module with gradients and the optimiser's state.
        length: tokens of a row.
        rows: of a step.
        one_row: computes the gradients of one row; None where that cannot be done alone.
    """
    told = f"resident are the base ({format_size(base)}) and the module with its optimiser ({format_size(module)})"
    cures = "--activation-checkpointing, a smaller --sequence-length, or --shard-base on several devices"
    needed, free = (0, 0) if one_row is None else added_on_device(device, one_row)
    if needed is None:
        return f"{told}; a row of {length} tokens alone does not fit beside them: give {cures}"
    fit = min(max(free // needed, 1), rows) if needed else 0
    if rows == 1 or fit == rows:  # not the rows of a step are what is too much
        return f"{told}; give {cures}"
    if not needed:
        return f"{told}; give a larger --gradient-accumulation-steps, {cures}"
    row = f"a row of {length} tokens needs {format_size(needed)} of the {format_size(free)} that are left"
    return f"{told}; {row}, so that {fit} of {rows} fit: give --gradient-accumulation-steps {-(-rows // fit)}, {cures}"


def added_on_device(device: torch.device, compute: Callable[[], None]) -> tuple[int | None, int]:
    """The most memory of a GPU that something takes while it is computed, None if there is too little, and what is free
    without it; (0, 0) on what is no GPU."""
    if device.type != "cuda":
        return 0, 0
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        compute()
    except torch.OutOfMemoryError:
        return None, free
    return torch.cuda.max_memory_allocated(device) - before, free


def _set_back(libc: ctypes.CDLL) -> None:
    libc.mallopt(_MMAP_MAX, _USUAL_MMAP_MAX)
    libc.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
    libc.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
    libc.malloc_trim(0)
