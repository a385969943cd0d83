"""Machine: what the other stages' floors are made of: bandwidths of memory, of the bus and of the disk, and the rate of
a large matrix product."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.stages.bench import Bench, nothing
from growlm.disk.tensors import as_bytes

READERS = 4  # threads that read a file
_PIECE = 16 << 20  # bytes that one reads at a time


def run(bench: Bench) -> None:
    size, side = (1 << 20, 256) if bench.tiny else (1 << 30, 8192)
    host, there = host_buffer(bench, size), torch.empty(size, dtype=torch.uint8, device=bench.device)
    other = torch.ones_like(there)
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    sides = {
        "copy": lambda: there.copy_(other),
        "host": lambda: there.copy_(host, non_blocking=True),
        "matmul": lambda: a @ b,
    }
    taken = bench.turns("machine", sides, seconds=4, kernels=True)
    work = {"copy": 2 * size, "host": size, "matmul": 2 * side**3}
    bench.floors |= {name: work[name] / seconds for name, seconds in taken.items()}
    file = bench.out / "machine.bin"
    host.random_(256)
    write_through(file, host)
    # A cold read first: what is read warm is in the page cache afterwards.
    for name, before in (("disk", partial(drop_pages, file)), ("cached", nothing)):
        found = bench.turns(
            "machine", {name: lambda: read(file, host)}, seconds=4, rounds=2, warmup=name == "cached", before=before
        )
        bench.floors[name] = size / found[name]
    file.unlink()
    gigabytes = {f"{name} GB/s": bench.floors[name] / 1e9 for name in ("copy", "host", "disk", "cached")}
    bench.tell("rates", {
        **gigabytes, "matmul TFLOP/s": bench.floors["matmul"] / 1e12, "device": bench.name,
        "host memory": "pinned" if bench.cuda else "paged", "per second": bench.floors,
    })  # fmt: skip


def host_buffer(bench: Bench, size: int) -> Tensor:
    """Bytes of main memory, pinned where there is a device to copy to."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=bench.cuda)


def write_through(file: Path, data: Tensor) -> None:
    """Writes bytes and waits for the disk, so that their pages can be dropped."""
    with open(file, "wb", buffering=0) as f:
        view = as_bytes(data)
        while len(view):
            view = view[f.write(view) :]
        os.fsync(f.fileno())


def drop_pages(file: Path) -> None:
    """Has the system forget what it holds of a file, as far as it will."""
    with open(file, "rb") as f:
        os.fsync(f.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(file: Path, buffer: Tensor) -> None:
    """Reads a file's first bytes into a buffer, by several threads."""
    view = as_bytes(buffer)
    with open(file, "rb", buffering=0) as f, ThreadPoolExecutor(READERS) as threads:
        list(threads.map(lambda at: read_piece(f.fileno(), view[at : at + _PIECE], at), range(0, len(view), _PIECE)))


def read_piece(handle: int, view: memoryview, at: int) -> None:
    """
    Raises:
        EOFError: the file ends before.
    """
    while len(view):
        count = os.preadv(handle, [view], at)
        if not count:
            raise EOFError(f"the file ends at {at} bytes")
        view, at = view[count:], at + count
