"""Loop: optimiser steps, schedule, interruption, progress. One loop for pretraining and learning.

Knows parameters and a function that gives a step's loss; does not know what is being trained.
A run that is killed and started again ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from torch import Tensor, nn

from growlm.errors import Interrupted, TrainingError
from growlm.progress import phase, say
from growlm.training import checkpoints
from growlm.training.config import TrainConfig
from growlm.training.history import History
from growlm.training.memory import kept_pages
from growlm.training.optim import clip_gradients, make_optimizer
from growlm.training.parallel import ALONE, Ranks, fill, in_parts
from growlm.training.validation import Validation, read_best

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
    losses_of_step: Callable[[int], Iterable[Tensor]],
    num_steps: int,
    tokens_of_step: Callable[[int], int],
    config: TrainConfig,
    learning_rate: float,
    *,
    folder: Path,
    resume_hint: str,
    decay: Callable[[str, nn.Parameter], bool] = matrices,
    buffers: Mapping[str, Tensor] | None = None,
    validation: Validation | None = None,
    ranks: Ranks = ALONE,
) -> tuple[int, float]:
    """Runs all steps that are left. Returns the steps that were done, and the seconds that training took, earlier runs
    included.

    Args:
        losses_of_step: parts of the loss of step i, which add up to it, one after another: gradients follow each
            before the next is computed. A function of i and the parameters alone; of several ranks, this one's share.
        folder: holds checkpoints, of which the newest is continued from, and the loss of every step (`history`).
        resume_hint: what to tell a user who interrupts.
        decay: which parameters get weight decay.
        buffers: what a forward pass changes besides, as running statistics; saved and restored with the parameters.
        validation: scores some steps on held-out text, ends the run where they no longer help, and at the end has the
            tensors of the best of them. Of several ranks, the first one's alone.
        ranks: that train this together; the first of them writes.

    Raises:
        Interrupted: by Ctrl-C or a termination signal, after a checkpoint.
        TrainingError: a loss or gradient that is not finite; no step is made on it and no checkpoint saved.
        RankError: another rank has ended.
        StoreError: no room for a checkpoint.
        IntegrityError: the checkpoint to go on from is damaged.
    """
    optimizer = make_optimizer(parameters, lr=learning_rate, weight_decay=config.weight_decay, decay=decay)
    buffers = buffers or {}
    done, spent = checkpoints.restore(folder, parameters, buffers, optimizer, num_steps, ranks)
    ranks.begin_equal({**parameters, **buffers})
    if validation is not None:
        validation.begin(done, num_steps)
    started = saved = time.monotonic()
    history = History(folder, done) if ranks.first else None
    smooth: float | None = None
    before = sum(map(tokens_of_step, range(done)))
    tokens = 0
    with kept_pages(), _signals() as stop, phase("training", num_steps, "steps", done=done) as training:
        last = ranks.first_says(done == num_steps or (validation is not None and validation.ended))
        while not last:
            rate = rate_at(done, num_steps, learning_rate, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            own = 0.0
            with ranks.jointly():
                for loss in losses_of_step(done):
                    loss.backward()
                    own += float(loss.detach())
            value, stopping = ranks.add_up(list(parameters.values()), own, stop.is_set())
            require_finite(f"the loss at step {done + 1} of {num_steps}", value)
            norm = clip_gradients(parameters.values(), config.clip or math.inf, ranks.total)
            require_finite(f"the gradient's norm at step {done + 1} of {num_steps}", float(norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += tokens_of_step(done)
            done += 1
            smooth = value if smooth is None else 0.9 * smooth + 0.1 * value
            heldout = ""
            last = done == num_steps
            if validation is not None:
                last = validation.after(done, num_steps) or last
                heldout = f", validation {validation.losses[max(validation.losses)]:.3f}"
                if max(validation.losses):
                    heldout += f" (at first {validation.losses[0]:.3f})"
            now = time.monotonic()
            stopping = stopping or (ranks.size == 1 and stop.is_set())  # of several, all stop after the same step
            due = stopping or last or now - saved > config.checkpoint_seconds
            last, due = ranks.first_says([last, due])
            scored = validation.losses.get(done) if validation is not None else None
            if history is not None:
                history.add(done, before + tokens, value, rate, scored)
            training.advance(note=f"loss {smooth:.3f}{heldout}, {tokens / max(now - started, 1e-9):,.0f} tokens/s")
            if due:
                checkpoints.save(folder, parameters, buffers, optimizer, done, spent + now - started, ranks)
                saved = time.monotonic()
            if stopping and not last:
                raise Interrupted(f"stopped after step {done} of {num_steps}; {resume_hint}")
        if done < num_steps:
            say(f"ends after {done:,} of {num_steps:,} steps: more did not help on held-out text")
    best = ranks.first_says(validation.to_put_back if validation is not None else None)
    if best is not None and (ranks.first or in_parts(parameters.values())):  # who has no part of it need not have it
        fill({**parameters, **buffers}, read_best(folder, best))
    return done, spent + time.monotonic() - started


def require_finite(what: str, value: float) -> None:
    """
    Raises:
        TrainingError: `value` is infinite or no number.
    """
    if not math.isfinite(value):
        raise TrainingError(f"{what} is {value}; nothing was saved; use a lower --learning-rate, or a stricter --clip")


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
