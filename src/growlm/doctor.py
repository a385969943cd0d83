"""Doctor: what growlm finds on a machine, and whether it will work there. Looks, and changes nothing.

Each part is looked at by itself, so that one that is broken does not hide the others.
"""

from __future__ import annotations

import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

from growlm import __version__
from growlm.requirements import all_requirements

_DRIVER = Path("/proc/driver/nvidia/version")
_EXTRAS = ("bench", "eval", "serve")  # those whose packages are of use to more than growlm's own developers


def examine(folder: Path | None = None) -> dict[str, Any]:
    """What there is, as plain values; null is unknown.

    `versions`: by package, the release that is `installed` and the `range` that growlm takes. `processor`; `devices`;
    `precision`: the dtype that auto takes, by device. Free bytes of `memory`, and of the `disk` that holds the
    folder, by default the current one. `problems`: what will not work, and what to do; `warnings`: what may not work.
    `ok`: whether there are no problems.
    """
    problems: list[str] = []
    warnings: list[str] = []
    folder = folder or Path.cwd()
    report: dict[str, Any] = {
        "versions": _versions(problems, warnings),
        "processor": _processor(),
        "devices": [],
        "precision": {},
        "memory": {"free_bytes": None},
        "disk": {"folder": str(folder), "free_bytes": shutil.disk_usage(folder).free},
    }
    try:
        import torch
    except Exception as error:  # of an installation in pieces not only ImportError
        problems.append(f"torch cannot be imported ({_line(error)}); install it again")
    else:
        from growlm.layers.tables import free_bytes

        report["memory"]["free_bytes"] = free_bytes(torch.device("cpu"))
        try:
            report |= _computing(torch, report["processor"], warnings)
            _run_tiny_model(torch)
        except Exception as error:  # whatever releases do that do not fit together, or a GPU that is not well
            problems.append(
                f"a tiny model does not run ({_line(error)}); install tested releases, transformers first, or look "
                "after the GPU if it is that"
            )
    return {"ok": not problems, "problems": problems, "warnings": warnings, **report}


def _versions(problems: list[str], warnings: list[str]) -> dict[str, dict[str, str | None]]:
    asked = all_requirements(*_EXTRAS)
    if not asked:
        warnings.append("growlm was not installed, so what it is tested with is unknown: pip install --editable .")
    for one in asked:
        if line := one.remark():
            (problems if one.fails else warnings).append(line)
    own = {"python": platform.python_version(), "growlm": __version__}
    return {
        **{name: {"installed": release, "range": None, "state": "fine"} for name, release in own.items()},
        **{one.name: {"installed": one.installed, "range": one.range, "state": one.state} for one in asked},
    }


def _processor() -> dict[str, Any]:
    """`cores` are those that this process may use."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"name": name, "cores": cores, "threads": None, "instructions": []}


def _computing(torch: Any, processor: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    from growlm.base.placement import Placement, gpus, instructions

    with catch_warnings():  # torch's own, of a driver that does not suit it
        simplefilter("ignore")
        devices = gpus()
    if not devices and _DRIVER.exists():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        warnings.append(
            f"this machine has a driver for NVIDIA GPUs, but torch {torch.__version__}, built {built}, sees none; "
            "install the build of torch that suits the driver, or go on without a GPU"
        )
    return {
        "processor": {**processor, "threads": torch.get_num_threads(), "instructions": instructions()},
        "devices": [_gpu(torch, device) for device in devices],
        "precision": {str(d): Placement.of(d).record()["dtype"] for d in (torch.device("cpu"), *devices)},
    }


def _gpu(torch: Any, device: Any) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": str(device), "name": "Metal", "bytes": None, "free_bytes": None}
    free, total = torch.cuda.mem_get_info(device)
    return {"device": str(device), "name": torch.cuda.get_device_name(device), "bytes": total, "free_bytes": free}


def _run_tiny_model(torch: Any) -> None:
    """As every command runs its base."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from growlm.base import Base

    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        Base(LlamaForCausalLM(config).eval()).logits(torch.zeros(1, 2, dtype=torch.long))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
