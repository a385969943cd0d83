"""Validation: held-out loss while a module is trained, the best step by it, and the step at which to stop.

Knows steps, losses and tensors to keep; not what is trained, nor how it is scored. A run that is killed and started
again scores the same steps and keeps the same one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from growlm.disk.files import read_json, write_atomic
from growlm.disk.tensors import read_tensors, write_tensors
from growlm.errors import IntegrityError

_SCORES = "validation.json"
_BEST = "best.safetensors"
_TIMES = 5  # that a run is scored, the last one at its end
_NO_NUMBER = 1e9  # what a loss that became NaN or infinite counts as
_PATIENCE = 2  # scores in a row that may be no better than the best before it ends


class Validation:
    """The scores of one run.

    Args:
        folder: of the run.
        tensors: what is kept of the best step: parameters and buffers as they are trained.
        score: held-out loss in nats a token with these as they are now.

    Attributes:
        losses: by the number of steps done; of 0 too, where training begins.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], score: Callable[[], float]) -> None:
        self._folder, self._tensors, self._score = folder, tensors, score
        self.losses: dict[int, float] = {}

    @property
    def best(self) -> int:
        """Of the steps that were scored but 0, the one with the lowest loss; 0 if there is none."""
        return min((step for step in self.losses if step), key=lambda step: (self.losses[step], step), default=0)

    def begin(self, done: int) -> None:
        """Takes up the scores of a stopped run of which `done` steps are there; what came after is scored again."""
        try:
            known = dict(read_json(self._folder / _SCORES))
            self.losses = {int(step): float(loss) for step, loss in known.items() if int(step) <= done}
        except (OSError, ValueError, TypeError):
            self.losses = {}
        if 0 not in self.losses and not done:
            self._record(0)

    def after(self, step: int, num_steps: int) -> bool:
        """Scores a step if it is one of those to be scored; whether the run should end with it."""
        due = {math.ceil(num_steps * i / _TIMES) for i in range(1, _TIMES + 1)}
        if step in due and step not in self.losses:
            self._record(step)
        return self.ended

    @property
    def ended(self) -> bool:
        """Whether the last scores are no better than one before them."""
        scored = [step for step in sorted(self.losses) if step]
        return len(scored) > _PATIENCE and self.best not in scored[-_PATIENCE:]

    def _record(self, step: int) -> None:
        loss = self._score()
        self.losses[step] = loss if math.isfinite(loss) else _NO_NUMBER
        if step and self.best == step:
            write_tensors(self._folder / _BEST, dict(self._tensors))
        self._folder.mkdir(parents=True, exist_ok=True)
        told = {str(step): loss for step, loss in self.losses.items()}
        write_atomic(self._folder / _SCORES, json.dumps(told).encode())

    @torch.no_grad()
    def keep_best(self) -> None:
        """Puts the tensors of the best step back.

        Raises:
            IntegrityError: their file is damaged.
        """
        if not self.losses or self.best == max(self.losses):
            return
        kept = read_tensors(self._folder / _BEST)
        if kept.keys() != self._tensors.keys():
            raise IntegrityError(f"{self._folder / _BEST}: not of this run; use --restart to begin anew")
        for name, tensor in self._tensors.items():
            tensor.copy_(kept[name])
