"""Kernels: Triton forms of functions of `layers/`, which choose them by device and import them on first use.

A kernel computes what the function does on the processor, and is held by the same tests: on a GPU, and without one
under Triton's interpreter.
"""

from __future__ import annotations

import functools
import warnings

import torch


@functools.cache
def available(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for this device, an NVIDIA GPU of capability 8.0 or newer."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        import triton
    except ImportError:
        return False
    try:
        # Builds what launches kernels, for which Triton wants a C compiler and Python's headers.
        with torch.cuda.device(device):
            triton.runtime.driver.active.get_current_target()
    except Exception as error:
        warnings.warn(
            f"Triton cannot compile on this machine ({type(error).__name__}: {error}), so slower forms of its kernels "
            "run; a C compiler and the headers of Python are what it most often lacks",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
