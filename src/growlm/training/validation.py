"""Validation: held-out loss while a module is trained, the best step by it, and the step at which to stop.

Knows steps, losses and tensors to keep; not what is trained, nor how it is scored. A run that is killed and started
again scores the same steps and keeps the same one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from growlm.disk.files import read_json, write_atomic
from growlm.disk.tensors import read_tensors, write_tensors
from growlm.errors import IntegrityError
from growlm.training.checkpoints import damaged as _damaged

_SCORES = "validation.json"
_BEST = "best.safetensors"
_TIMES = 5  # that a run is scored, the last one at its end
_NO_NUMBER = 1e9  # what a loss that became NaN or infinite counts as
_PATIENCE = 2  # scores in a row that may be no better than the best before it ends


class Validation:
    """The scores of one run.

    Args:
        folder: of the run.
        tensors: gives what is kept of the best step: parameters and buffers as they are now.
        score: held-out loss in nats a token with these as they are now.

    Attributes:
        losses: by the number of steps done; of 0 too, where training begins.
    """

    def __init__(self, folder: Path, tensors: Callable[[], Mapping[str, Tensor]], score: Callable[[], float]) -> None:
        self._folder, self._tensors, self._score = folder, tensors, score
        self.losses: dict[int, float] = {}
        self._digest: str | None = None  # of the best step's file

    @property
    def best(self) -> int:
        """Of the steps that were scored but 0, the one with the lowest loss; 0 if there is none."""
        return min((step for step in self.losses if step), key=lambda step: (self.losses[step], step), default=0)

    def begin(self, done: int, num_steps: int) -> None:
        """Takes up the scores of a stopped run of which `done` steps are there; what came after is scored again.

        Raises:
            IntegrityError: they are damaged or not there.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if not done:
            self._record(0)
            return
        path = self._folder / _SCORES
        try:
            known = read_json(path)
            self.losses = {int(step): float(loss) for step, loss in known["losses"].items() if int(step) <= done}
            self._digest = known["sha256"]
            if not isinstance(self._digest, str | None) or not self.due(num_steps, done) <= self.losses.keys():
                raise ValueError
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise _damaged(path) from None

    def after(self, step: int, num_steps: int) -> bool:
        """Scores a step if it is one of those to be scored; whether the run should end with it."""
        if step in self.due(num_steps, step) and step not in self.losses:
            self._record(step)
        return self.ended

    @staticmethod
    def due(num_steps: int, done: int) -> set[int]:
        """The steps that have been scored after so many."""
        due = {math.ceil(num_steps * i / _TIMES) for i in range(_TIMES + 1)}
        return {step for step in due if step <= done}

    @property
    def ended(self) -> bool:
        """Whether the last scores are no better than one before them."""
        scored = [step for step in sorted(self.losses) if step]
        return len(scored) > _PATIENCE and self.best not in scored[-_PATIENCE:]

    def _record(self, step: int) -> None:
        loss = self._score()
        self.losses[step] = loss if math.isfinite(loss) else _NO_NUMBER
        if step and self.best == step:
            self._digest = write_tensors(self._folder / _BEST, self._tensors())
        told = {"losses": {str(step): loss for step, loss in self.losses.items()}, "sha256": self._digest}
        write_atomic(self._folder / _SCORES, json.dumps(told).encode())

    @property
    def to_put_back(self) -> str | None:
        """The digest of the best step's tensors; None where they are those of the last one."""
        return self._digest if self.losses and self.best != max(self.losses) else None


def read_best(folder: Path, digest: str) -> dict[str, Tensor]:
    """The tensors of the best step of the run in a folder.

    Raises:
        IntegrityError: their file is damaged.
    """
    try:
        return read_tensors(folder / _BEST, sha256=digest)
    except IntegrityError:
        raise _damaged(folder / _BEST) from None
