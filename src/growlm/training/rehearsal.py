"""Rehearsal: a few real steps of a run, timed, to tell how long all of them take. Its module is of no use.

Knows what `ModuleTraining` does, and a clock; nothing of stores or what is printed.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np
import torch
from torch import Tensor

from growlm.progress import phase
from growlm.training.config import AUTO, LearnConfig
from growlm.training.loop import matrices, module_rate, train
from growlm.training.memory import device_peak_bytes, peak_bytes
from growlm.training.module_training import ModuleTraining

_ROUNDS = 4  # of steps that are timed; the first one only warms up
_TRIALS = 3  # trial steps; so does the first of these


@dataclass(frozen=True)
class Rehearsed:
    """What a whole run takes, by what a few steps of it took.

    Attributes:
        rounds: of trials: how many rates, and for how many short steps each.
        rows, trials, steps: seconds for choosing vocabulary rows, for all trials, for all optimiser steps.
        score: seconds for each token of validation that is scored.
        timed: optimiser steps by which it was told.
        peak: bytes of main memory that this process has at the most in a step of full size; `device_peak` of the GPU's.
        scratch: bytes of the disk that the run takes until it ends.
    """

    rounds: list[tuple[int, int]]
    rows: float
    trials: float
    steps: float
    score: float
    timed: int
    peak: int
    device_peak: int | None
    scratch: int

    @classmethod
    def nothing(cls) -> Rehearsed:
        """Of a kind of which nothing is trained."""
        return cls([], 0.0, 0.0, 0.0, 0.0, 0, 0, None, 0)


class _EnoughError(Exception):
    """The time is up."""


class Rehearsal(ModuleTraining):
    """A run of which only a few steps are made. As `ModuleTraining`; of `validation` a few passages will do."""

    sample_rows = 1
    _row_seconds = 0.0  # for a row of text, on which the base is asked what it knows

    @property
    def steps(self) -> list[np.ndarray]:
        """Of the whole run: the rows that each reads."""
        return self._steps

    def measure(self, seconds: float) -> Rehearsed:
        """Makes steps for about so many seconds, and of each kind one at the least.

        Raises:
            TrainingError: a loss or gradient that is not finite.
        """
        began, before = monotonic(), peak_bytes()
        before_on_device = device_peak_bytes(self.base.device)
        rates, plan = self._trials_for(rate := module_rate(self.base.hidden_size))
        rate = min([rate, *rates])
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        changed = {**trained, **dict(self.module.named_buffers())}
        start = {name: t.detach().clone() for name, t in changed.items()}
        given = monotonic()
        rows = [self._trial_row(step) for step in range(_TRIALS)]
        given = (monotonic() - given) / len(rows)
        self._trial(rows[:1], rate, trained, matrices)
        short = monotonic()
        self._trial(rows[1:], rate, trained, matrices)
        short = (monotonic() - short) / (len(rows) - 1)
        with torch.no_grad():
            for name, tensor in changed.items():
                tensor.copy_(start.pop(name))
        if self.config.learning_rate != AUTO or self._imitated:
            plan = []
        trials = sum(number * steps * short for number, steps in plan) + max((s for _, s in plan), default=0) * given

        # Steps of fewer rows, where those of all would take too long.
        batch = max(map(len, self._steps))
        a_row = (short + given) * self.config.sequence_length / (sum(len(labels) for _, labels in rows) / len(rows))
        left = seconds - (monotonic() - began)
        wanted = 2 * len(self._kinds) * a_row * batch  # seconds of the fewest steps that tell something
        fits = batch if wanted <= left else max(int(batch * left / wanted), 1)
        times = self._timed_steps([step[:fits] for step in self._steps], left, rate, trained)
        each = {kind: statistics.median(found[1:] or found) for kind, found in times.items()}
        score, validation = 0.0, self._validation
        if validation:
            began = monotonic()
            validation.loss()
            score = (monotonic() - began) / validation.num_tokens
        self._validation = None  # it holds this object, which holds the base
        if self._cache is not None:
            self._cache.close()
        return Rehearsed(
            rounds=plan,
            rows=self._row_seconds * min(self.sample_wanted, ModuleTraining.sample_rows),
            trials=trials,
            steps=self._all_steps(each),
            score=score,
            timed=sum(map(len, times.values())),
            peak=_scaled(before, peak_bytes(), batch / fits),
            device_peak=None
            if before_on_device is None
            else _scaled(before_on_device, device_peak_bytes(self.base.device) or 0, batch / fits),
            scratch=self.scratch_bytes(),
        )

    @property
    def _kinds(self) -> list[str]:
        """Kinds of steps that the run has: of rows that are new, of those that were kept, and of imitation."""
        return ["new", *(["kept"] if self._cache is not None else []), *(["imitated"] if self._imitated else [])]

    def _timed_steps(
        self, steps: Sequence[np.ndarray], seconds: float, rate: float, trained: dict[str, torch.nn.Parameter]
    ) -> dict[str, list[float]]:
        """Seconds a row of steps, by kind, of rows that are like `steps`."""
        whole, self._steps = self._steps, list(steps)
        last = len(steps) - 1
        order = [
            (kind, 0 if kind == "imitated" else min(self._imitated + turn, last))
            for turn in range(_ROUNDS)
            for kind in self._kinds
        ]
        marks: list[float] = []

        def losses(number: int) -> Iterator[Tensor]:
            marks.append(monotonic())
            late = marks[-1] - marks[0]
            turns, begun = divmod(number, len(self._kinds))
            if number == len(order) or (turns and not begun and late * (turns + 1) / turns > seconds):
                raise _EnoughError
            kind, step = order[number]
            if kind == "new" and self._cache is not None:
                self._cache.forget(self._steps[step])
            return self._losses(step)

        try:
            with phase("timing some steps", len(order), "steps"):
                train(
                    trained,
                    losses,
                    max(len(steps), len(order) + 1),
                    lambda number: self._tokens_of(order[number][1]),
                    self.config,
                    rate,
                    folder=self.work / "steps",
                    resume_hint="nothing was changed",
                )
        except _EnoughError:
            pass
        finally:
            self._steps = whole
        times: dict[str, list[float]] = defaultdict(list)
        for (kind, step), one, following in zip(order, marks, marks[1:], strict=False):
            times[kind].append((following - one) / len(steps[step]))
        return times

    def _all_steps(self, each: dict[str, float]) -> float:
        """Seconds of all steps, of what a row takes in those of every kind."""
        imitated = sum(map(len, self._steps[: self._imitated]))
        learned = sum(map(len, self._steps)) - imitated
        if self._cache is None:
            return learned * each["new"] + imitated * each.get("imitated", 0.0)
        kept, computed = np.zeros(len(self.packed), dtype=bool), 0
        for rows in self._steps:
            computed += int((~kept[rows]).sum())
            kept[rows[rows < self._cache.room]] = True
        below = max(each["new"] - each["kept"], 0.0)
        return learned * each["kept"] + imitated * each.get("imitated", 0.0) + computed * below

    def _least_known(self, config: LearnConfig, begin: Sequence[int]) -> Tensor:
        began = monotonic()
        found = super()._least_known(config, begin)
        self._row_seconds = monotonic() - began
        return found


def _scaled(before: int, after: int, larger: float) -> int:
    """A peak, of which what was added in smaller steps grows with their size."""
    return round(before + (after - before) * larger)
