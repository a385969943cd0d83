"""Loop: optimiser steps, schedule, checkpoints, interruption, progress. One loop for pretraining and learning.

Knows parameters and a function that gives a step's loss; does not know what is being trained.
A run that is killed and started again ends with the same bits as one that was not.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from growlm.disk.files import read_json, write_atomic
from growlm.disk.tensors import read_tensors, write_tensors
from growlm.errors import IntegrityError, Interrupted, TrainingError
from growlm.progress import phase
from growlm.training.config import TrainConfig
from growlm.training.memory import kept_pages
from growlm.training.optim import RowAdamW, clip_gradients, make_optimizer

_POINTER = "checkpoint.json"
_MIN_RATE = 0.1  # share of the peak that the cosine ends at


def rate_at(step: int, num_steps: int, peak: float, warmup: float) -> float:
    """Learning rate of a step: a linear rise over the first `warmup` share, then a cosine to a tenth of the peak."""
    rising = max(round(warmup * num_steps), 1)
    if step < rising:
        return peak * (step + 1) / rising
    share = (step - rising) / max(num_steps - rising, 1)
    return peak * (_MIN_RATE + (1 - _MIN_RATE) * 0.5 * (1 + math.cos(math.pi * share)))


def module_rate(hidden_size: int) -> float:
    """Peak learning rate where none is given: what starts as the identity wants more than finetuning does."""
    return 3e-3 * min(1.0, math.sqrt(256 / hidden_size))


def matrices(name: str, p: nn.Parameter) -> bool:
    """What gets weight decay: norms and biases have none."""
    return p.ndim >= 2


def train(
    parameters: Mapping[str, nn.Parameter],
    loss_of_step: Callable[[int], Tensor],
    num_steps: int,
    tokens_of_step: Callable[[int], int],
    config: TrainConfig,
    learning_rate: float,
    *,
    folder: Path,
    resume_hint: str,
    decay: Callable[[str, nn.Parameter], bool] = matrices,
    buffers: Mapping[str, Tensor] | None = None,
) -> float:
    """Runs all steps that are left and returns the seconds that training took, earlier runs included.

    Args:
        loss_of_step: the loss of step i, with gradients to follow; a function of i and the parameters alone.
        folder: holds checkpoints; the newest there is continued from.
        resume_hint: what to tell a user who interrupts.
        decay: which parameters get weight decay.
        buffers: what a forward pass changes besides, as running statistics; saved and restored with the parameters.

    Raises:
        Interrupted: by Ctrl-C or a termination signal, after a checkpoint.
        TrainingError: a loss or gradient that is not finite; no step is made on it and no checkpoint saved.
        StoreError: no room for a checkpoint.
        IntegrityError: the checkpoint to go on from is damaged.
    """
    optimizer = make_optimizer(parameters, lr=learning_rate, weight_decay=config.weight_decay, decay=decay)
    buffers = buffers or {}
    done, spent = _restore(folder, parameters, buffers, optimizer, num_steps)
    started = saved = time.monotonic()
    smooth: float | None = None
    tokens = 0
    with kept_pages(), _signals() as stop, phase("training", num_steps, "steps", done=done) as training:
        for step in range(done, num_steps):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, num_steps, learning_rate, config.warmup)
            loss = loss_of_step(step)
            loss.backward()
            value = float(loss.detach())
            require_finite(f"the loss at step {step + 1} of {num_steps}", value)
            norm = clip_gradients(parameters.values(), config.clip or math.inf)
            require_finite(f"the gradient's norm at step {step + 1} of {num_steps}", float(norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += tokens_of_step(step)
            now = time.monotonic()
            smooth = value if smooth is None else 0.9 * smooth + 0.1 * value
            training.advance(note=f"loss {smooth:.3f}, {tokens / max(now - started, 1e-9):,.0f} tokens/s")
            last = step + 1 == num_steps
            if stop.is_set() or last or now - saved > config.checkpoint_seconds:
                _save(folder, parameters, buffers, optimizer, step + 1, spent + now - started)
                saved = time.monotonic()
            if stop.is_set() and not last:
                raise Interrupted(f"stopped after step {step + 1} of {num_steps}; {resume_hint}")
    return spent + time.monotonic() - started


def require_finite(what: str, value: float) -> None:
    """
    Raises:
        TrainingError: `value` is infinite or no number.
    """
    if not math.isfinite(value):
        raise TrainingError(f"{what} is {value}; nothing was saved; use a lower --learning-rate, or a stricter --clip")


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
        raise _damaged(path) from error
    return pointer


def _damaged(path: Path) -> IntegrityError:
    # It is not passed over: who has a copy of the file loses no hours of training.
    state = "damaged" if path.exists() else "missing"
    return IntegrityError(f"{path}: this part of a stopped run is {state}; restore it, or use --restart to begin anew")


def _file_of(step: int) -> str:
    return f"step-{step}.safetensors"


def _save(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
) -> None:
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
def _restore(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: RowAdamW,
    num_steps: int,
) -> tuple[int, float]:
    pointer = _pointer(folder)
    if pointer is None:
        return 0, 0.0
    if pointer.step > num_steps:  # more than this run has: not its checkpoint
        raise _damaged(folder / _POINTER)
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
        raise _damaged(path) from error
    return pointer.step, pointer.seconds


def _on_cuda(parameters: Mapping[str, nn.Parameter]) -> torch.device | None:
    """The GPU that is trained on, whose draws are then its own."""
    device = next(iter(parameters.values())).device
    return device if device.type == "cuda" else None


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Sets an event on Ctrl-C or termination, so that a step is never cut in half; a second one stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
