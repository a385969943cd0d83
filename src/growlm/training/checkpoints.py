"""Checkpoints: parameters, buffers, optimiser state and random state of a run, whole or not at all, the newest alone.

Knows tensors and a folder; not what is trained, nor when a checkpoint is due.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from growlm.disk.files import read_json, write_atomic
from growlm.disk.tensors import read_tensors, write_tensors
from growlm.errors import IntegrityError
from growlm.training.optim import RowAdamW

_POINTER = "checkpoint.json"


def saved_step(folder: Path) -> int:
    """Steps done by the newest checkpoint in `folder`; 0 if there is none.

    Raises:
        IntegrityError: what says which it is is damaged.
    """
    pointer = _pointer(folder)
    return pointer.step if pointer else 0


@dataclass(frozen=True)
class _Pointer:
    """Which checkpoint is the newest complete one."""

    step: int
    seconds: float
    file: str
    sha256: str


def _pointer(folder: Path) -> _Pointer | None:
    path = folder / _POINTER
    try:
        pointer = _Pointer(**read_json(path))
        types = [type(value) for value in astuple(pointer)]
        bounded = types == [int, float, str, str] and pointer.step > 0 and pointer.seconds >= 0
        if not bounded or pointer.file != _file_of(pointer.step):
            raise ValueError(f"not what a run writes: {pointer}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise damaged(path) from error
    return pointer


def damaged(path: Path) -> IntegrityError:
    """What to say of a file of a stopped run that is not as it was written."""
    # It is not passed over: who has a copy of the file loses no hours of training.
    state = "damaged" if path.exists() else "missing"
    return IntegrityError(f"{path}: this part of a stopped run is {state}; restore it, or use --restart to begin anew")


def _file_of(step: int) -> str:
    return f"step-{step}.safetensors"


def save(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
) -> None:
    """Writes the checkpoint after `step` steps that took `seconds`, and deletes the one before.

    Raises:
        StoreError: no room for it.
    """
    tensors: dict[str, Tensor] = {"random": torch.get_rng_state()}
    if (cuda := _on_cuda(parameters)) is not None:
        tensors["random.cuda"] = torch.cuda.get_rng_state(cuda)
    for name, p in parameters.items():
        tensors[f"parameter.{name}"] = p
        for key, value in optimizer.state[p].items():
            tensors[f"{key}.{name}"] = value
    for name, buffer in buffers.items():
        tensors[f"buffer.{name}"] = buffer
    folder.mkdir(parents=True, exist_ok=True)
    file = _file_of(step)
    digest = write_tensors(folder / file, tensors)
    # The pointer is written last: what it names is complete.
    write_atomic(folder / _POINTER, json.dumps(asdict(_Pointer(step, seconds, file, digest))).encode())
    for old in folder.glob("step-*.safetensors"):
        if old.name != file:
            old.unlink(missing_ok=True)


@torch.no_grad()
def restore(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: RowAdamW,
    num_steps: int,
) -> tuple[int, float]:
    """Puts back what the newest checkpoint in `folder` holds, and returns its step and seconds; zeros if there is none.

    Raises:
        IntegrityError: it is damaged, or of a run of fewer than `num_steps`.
    """
    pointer = _pointer(folder)
    if pointer is None:
        return 0, 0.0
    if pointer.step > num_steps:  # more than this run has: not its checkpoint
        raise damaged(folder / _POINTER)
    path = folder / pointer.file
    try:
        tensors = read_tensors(path, sha256=pointer.sha256)
        torch.set_rng_state(tensors.pop("random").clone())
        of_gpu = tensors.pop("random.cuda", None)
        if of_gpu is not None and (cuda := _on_cuda(parameters)) is not None:
            torch.cuda.set_rng_state(of_gpu.clone(), cuda)
        states: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
        for full, tensor in tensors.items():
            key, name = full.split(".", 1)
            if key not in ("parameter", "buffer"):
                states[name][key] = tensor
        for name, p in parameters.items():
            p.copy_(tensors.pop(f"parameter.{name}"))
            if states[name]:
                optimizer.load_parameter_state(p, states[name])
        for name, buffer in buffers.items():
            buffer.copy_(tensors[f"buffer.{name}"])
    except (IntegrityError, KeyError, RuntimeError, ValueError) as error:
        raise damaged(path) from error
    return pointer.step, pointer.seconds


def _on_cuda(parameters: Mapping[str, nn.Parameter]) -> torch.device | None:
    """The GPU that is trained on, whose draws are then its own."""
    device = next(iter(parameters.values())).device
    return device if device.type == "cuda" else None
