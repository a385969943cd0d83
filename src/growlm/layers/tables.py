"""Memory of large tables: whether there is room for one, and pages that suit how it is read. Knows tensors alone."""

from __future__ import annotations

import math
import mmap
import platform
import resource
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
# Python before 3.13 has no name for it. Elsewhere its number is another, and it only matters for very large tables.
_LINUX = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if _LINUX else 0)


def require_room(
    what: str, numbers: int, cure: str, device: torch.device | str | None, dtype: torch.dtype | None
) -> None:
    """
    Raises:
        MemoryError: so many numbers are more than the free memory.
    """
    like = torch.empty(0, device=device, dtype=dtype)
    needed, free = numbers * like.element_size(), free_bytes(like.device)
    if free is not None and needed > free:
        raise MemoryError(f"{what} need {needed:,} bytes, and {free:,} are free on {like.device}; {cure}")


def require_room_for_rows(
    num_rows: int, width: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> None:
    """As `require_room`, for the tables of a pool."""
    cure = "use fewer or smaller experts"
    require_room(f"the rows of {num_rows} experts", num_rows * width, cure, device, dtype)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be had without swapping, within the limits of a container and of the process too; None where it
    is unknown or, as on `meta`, none is taken."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    known = [free for free in (_free_of_machine(), _free_of_container(), _free_of_process()) if free is not None]
    return min(known, default=None)


def _free_of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _free_of_container(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """By control groups, version 2. Cached files that nothing uses are free."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((folder / "memory.current").read_text())
        stat = (folder / "memory.stat").read_text().splitlines()
        files = next((int(line.split()[1]) for line in stat if line.startswith("inactive_file ")), 0)
        return max(int(limit) - used + files, 0)
    except (OSError, ValueError):
        return None


def _free_of_process() -> int | None:
    """By the limit of its addresses (`ulimit -v`)."""
    try:
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit == resource.RLIM_INFINITY:
            return None
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        return max(limit - taken, 0)
    except OSError:
        return None


def new_table(rows: int, width: int, *, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """An uninitialised table, on huge pages where the system has them: rows that are read here and there would else
    each cost a walk through the page table.

    Raises:
        MemoryError: the system gives none.
    """
    like = torch.empty(0, device=device, dtype=dtype)
    size = rows * width * like.element_size()
    traced = type(like) is not Tensor  # without memory of its own
    if traced or like.device.type != "cpu" or size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(rows, width)
    memory = _pages(size, 0)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(rows, width)


def untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take memory where they are written to only; torch.zeros writes all of them. On a processor: elsewhere
    they are torch's.

    Raises:
        MemoryError: the system gives none.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(_pages(size, _NO_RESERVE), dtype=dtype).view(shape)


def _pages(size: int, flags: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags)
    except OSError as error:
        free = free_bytes(torch.device("cpu"))
        told = "" if free is None else f"; {free:,} are free, but this process may have a limit"
        raise MemoryError(f"{size:,} bytes for a table cannot be had ({error.strerror}){told}") from None
