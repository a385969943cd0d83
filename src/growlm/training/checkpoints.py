"""Checkpoints: parameters, buffers, optimiser state and random state of a run, whole or not at all, the newest alone.

Of several ranks the first writes a file, or where they have parts, each its own into a folder. Knows tensors and where
they go; not what is trained, nor when a checkpoint is due.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from growlm.disk.files import read_json, write_atomic
from growlm.disk.tensors import read_tensors, write_tensors
from growlm.errors import IntegrityError
from growlm.training.optim import RowAdamW
from growlm.training.parallel import ALONE, Ranks, in_parts

_POINTER = "checkpoint.json"
_RANDOM = "random"  # what the keys of random states begin with


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
        if not bounded or pointer.file not in (_file_of(pointer.step), _folder_of(pointer.step)):
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


def _folder_of(step: int) -> str:
    return f"step-{step}"


def save(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
    ranks: Ranks = ALONE,
) -> None:
    """Writes the checkpoint after `step` steps that took `seconds`, and deletes the one before. All ranks call it.

    Raises:
        StoreError: no room for it.
        RankError: another rank has ended.
    """
    parted = in_parts(parameters.values())
    if not (ranks.first or parted):
        return
    random = _random_keys(ranks, parted)
    tensors: dict[str, Tensor] = {random.cpu: torch.get_rng_state()}
    if (cuda := _on_cuda(parameters)) is not None:
        tensors[random.cuda] = torch.cuda.get_rng_state(cuda)
    for name, p in parameters.items():
        tensors[f"parameter.{name}"] = p
        for key, value in optimizer.state[p].items():
            tensors[f"{key}.{name}"] = value
    if ranks.first:  # others may have seen other rows, and go on from the first one's
        tensors |= {f"buffer.{name}": buffer for name, buffer in buffers.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if ranks.first:  # half written by a run that was killed
        kept = _pointer(folder)
        _remove_others(folder, kept.file if kept else "")
    if parted:
        from growlm.training.checkpoint_parts import write_parts

        file = _folder_of(step)
        digest = write_parts(folder / file, tensors, ranks)
    else:
        file = _file_of(step)
        digest = write_tensors(folder / file, tensors)
    if ranks.first:
        # The pointer is written last: what it names is complete.
        write_atomic(folder / _POINTER, json.dumps(asdict(_Pointer(step, seconds, file, digest))).encode())
        _remove_others(folder, file)


def _remove_others(folder: Path, kept: str) -> None:
    """All checkpoints but one."""
    for old in folder.glob("step-*"):
        if old.name != kept:
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)


@torch.no_grad()
def restore(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: RowAdamW,
    num_steps: int,
    ranks: Ranks = ALONE,
) -> tuple[int, float]:
    """Puts back what the newest checkpoint in `folder` holds, and returns its step and seconds; zeros if there is none.
    All ranks call it.

    Raises:
        IntegrityError: it is damaged, or of a run of fewer than `num_steps`.
        RankError: another rank has ended.
    """
    pointer = _pointer(folder)
    if pointer is None:
        return 0, 0.0
    if pointer.step > num_steps:  # more than this run has: not its checkpoint
        raise damaged(folder / _POINTER)
    path, parted = folder / pointer.file, in_parts(parameters.values())
    random = _random_keys(ranks, parted)
    try:
        if parted:
            from growlm.training.checkpoint_parts import read_parts

            def wanted(name: str) -> bool:
                return name in random or not name.startswith(_RANDOM)

            tensors = read_parts(path, parameters, wanted, ranks, sha256=pointer.sha256)
        else:
            tensors = read_tensors(path, sha256=pointer.sha256)
        torch.set_rng_state(tensors.pop(random.cpu).clone())
        of_gpu = tensors.pop(random.cuda, None)
        if of_gpu is not None and (cuda := _on_cuda(parameters)) is not None:
            torch.cuda.set_rng_state(of_gpu.clone(), cuda)
        states: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
        for full, tensor in tensors.items():
            key, name = full.split(".", 1)
            if key not in ("parameter", "buffer"):
                states[name][key] = tensor
        for name, p in parameters.items():
            p.copy_(tensors.pop(f"parameter.{name}"))
            if name in states:
                optimizer.load_parameter_state(p, states.pop(name), copied=not parted)
        for name, buffer in buffers.items():
            buffer.copy_(tensors[f"buffer.{name}"])
    except (IntegrityError, KeyError, RuntimeError, ValueError, OSError) as error:
        raise damaged(path) from error
    return pointer.step, pointer.seconds


def _on_cuda(parameters: Mapping[str, nn.Parameter]) -> torch.device | None:
    """The GPU that is trained on, whose draws are then its own."""
    device = next(iter(parameters.values())).device
    return device if device.type == "cuda" else None


class _RandomKeys(NamedTuple):
    """Which tensors hold random states."""

    cpu: str
    cuda: str


def _random_keys(ranks: Ranks, parted: bool) -> _RandomKeys:
    """Where ranks have parts, each has a state of its own."""
    own = f".of_{ranks.rank}" if parted else ""
    return _RandomKeys(f"{_RANDOM}{own}", f"{_RANDOM}.cuda{own}")
