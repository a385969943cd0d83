"""Placement: which device a process computes on, and in which dtype it trains there. Knows nothing of what is computed.

The only file that asks torch which devices there are.
"""

from __future__ import annotations

import math
import os
import platform
import re
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from growlm.errors import ConfigError, setting

_PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_WORTH = 1.5  # times the speed of float32 from which on bfloat16 is taken: clear of what timing errs by
_SIZE, _REPEATS = 256, 10  # of the matrices that are multiplied to find that out


@dataclass(frozen=True)
class Placement:
    """Where a process computes.

    Attributes:
        device: that holds weights and states.
        dtype: of the matrix products of training. Answers are computed in the store's dtype instead.
        rank, world: which of how many processes that share one piece of work. It is always the first of one: nothing
            can be shared yet, and so what torchrun says of itself is not read.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, device: str | torch.device | None = "auto", precision: str = "auto") -> Placement:
        """
        Args:
            device: as `find_device` takes it.
            precision: bfloat16, float32, or auto: what the device is made for.

        Raises:
            ConfigError: as `find_device`.
        """
        found = find_device(device)
        return cls(found, _native_dtype(found) if precision == "auto" else _PRECISIONS[precision])

    def autocast(self) -> Any:
        """A context in which matrix products are in `dtype`."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def record(self) -> dict[str, str]:
        """What is kept beside a result: the kind of device, and the dtype."""
        return {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}


def find_device(name: str | torch.device | None = "auto") -> torch.device:
    """
    Args:
        name: cpu, cuda, cuda:N or mps; auto or None: a GPU of CUDA's where there is one, else the processor. A
            torch.device is taken as it is.

    Raises:
        ConfigError: no such device, here or anywhere; says what was found instead and what to do.
    """
    if isinstance(name, torch.device):
        return name
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device(name)
    if name == "mps":
        _require_mps()
        return torch.device(name)
    if re.fullmatch(r"cuda(:[0-9]{1,3})?", name):
        _require_cuda(name)
        return torch.device(name)
    raise ConfigError(f"{setting('device')} {name!r} is not one of auto, cpu, cuda, cuda:N, mps")


def gpus() -> list[torch.device]:
    """All that torch can use here: CUDA's, each by its number, and that of a Mac."""
    found = [torch.device("cuda", i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    return [*found, *([torch.device("mps")] if torch.backends.mps.is_available() else [])]


def use_own_gpu(number: int) -> bool:
    """Has this process compute on one GPU of CUDA's, by its number, where it says `cuda` or `auto`; returns whether
    there are any. Of several processes of one machine each has another."""
    if not torch.cuda.is_available():
        return False
    torch.cuda.set_device(number % torch.cuda.device_count())
    return True


def num_gpus() -> int:
    """Of CUDA's."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def instructions() -> list[str]:
    """Those of the processor that matrix products are fast by."""
    there = {
        "AVX2": torch.cpu._is_avx2_supported(),
        "AVX-512": torch.cpu._is_avx512_supported(),
        "AVX-512 BF16": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    return [name for name, is_there in there.items() if is_there]


def _require_cuda(name: str) -> None:
    if not torch.backends.cuda.is_built():
        raise ConfigError(
            f"device {name}: torch {torch.__version__} is built without CUDA; install a build with it, or use cpu"
        )
    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES is {hidden!r})"
        made_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm"
        raise ConfigError(
            f"device {name}: torch {torch.__version__} is built for {made_for} and sees no GPU{why}; check that there "
            "is one and that its driver is new enough, or use cpu"
        )
    count = torch.cuda.device_count()
    if int(name.partition(":")[2] or 0) >= count:
        last = "cuda:0 alone" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ConfigError(f"device {name}: not among the GPUs here, {last}; name one of these")


def _require_mps() -> None:
    if not torch.backends.mps.is_built():
        raise ConfigError(f"device mps: torch {torch.__version__} is built without MPS, which Macs have; use cpu")
    if not torch.backends.mps.is_available():
        raise ConfigError("device mps: there is no GPU that Metal can use here, or macOS is too old for it; use cpu")


def _native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32, else float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = _processor_has_bfloat16()
    else:
        native = False  # nobody has measured it
    return torch.bfloat16 if native else torch.float32


def _processor_has_bfloat16() -> bool:
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return True
    # Of x86 the flags tell all. Of others they do not say whether this torch makes use of what there is.
    return platform.machine().lower() not in ("x86_64", "amd64") and _bfloat16_speed() >= _WORTH


@cache
def _bfloat16_speed() -> float:
    """How many times as fast as in float32 a small matrix product is in bfloat16; tens of milliseconds, once a process.

    Of each the fastest of many that take turns, on one thread: what else runs can only add to a time, and threads that
    wait for one another would be held up by it every time.
    """
    matrices = [torch.ones(_SIZE, _SIZE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    fastest = [math.inf, math.inf]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(_REPEATS):
            for i, a in enumerate(matrices):
                started = time.perf_counter()
                a @ a
                fastest[i] = min(fastest[i], time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return fastest[0] / fastest[1]


_FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")


def out_of_memory(error: BaseException) -> str | None:
    """What to tell a user, in one line, whose error is that a device's memory is full; None for any other error."""
    told = " ".join(str(error).split())
    if not isinstance(error, torch.OutOfMemoryError) and not any(sign in told for sign in _FULL):
        return None
    on_gpu = "DefaultCPUAllocator" not in told
    wanted = re.search(r"tried to allocate ([\d.]+ ?\w+)", told, re.IGNORECASE)
    free = re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", told)
    numbers = ([f"asked for {wanted[1]} more"] if wanted else []) + ([f"{free[2]} of {free[1]} free"] if free else [])
    full = f"out of memory on the {'GPU' if on_gpu else 'processor'}"
    full += f" ({', '.join(numbers)})" if numbers else ""
    if known := getattr(error, "__notes__", None):  # whoever was at work has said more
        return "; ".join([full, *known])
    return (
        f"{full}; train with a smaller --batch-size or --sequence-length, answer with a smaller --memory, or end what "
        f"else runs there{', or use --device cpu' if on_gpu else ''}"
    )
