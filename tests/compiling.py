"""Kernels compiled for a GPU that is not there: what calls would launch, down to its machine code.

The calls are the real ones, with tensors of the processor in place of the GPU's: argument types, alignment and block
sizes are those of a launch. To be run in a process whose environment does not ask for Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

SHARED = 227 << 10  # bytes that a program can have on compute capability 9.0


class _Driver:
    """Of a GPU that is none."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled() -> Iterator[dict[str, list[Any]]]:
    """Within it, a launch of a kernel compiles it, for compute capability 9.0, and adds it to what this yields, by
    name; nothing is computed."""
    # Set, Triton does not warn that its default will change.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launched: dict[str, list[Any]] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launched.setdefault(self.fn.__name__, []).append(kernel)
        return kernel

    run: Callable[..., Any] = JITFunction.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        driver.set_active(_Driver())  # for good: without a GPU there is none to go back to
        yield launched
