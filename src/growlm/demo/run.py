"""Demo: the main job on text that is already there. A base, three domains learned one after another, evaluate, report.

Measures the machine, sizes itself to the minutes that it is given, and does less where time runs short. Knows the
time; which stages there are and what each does is its course's: of a small base of its own (`small.py`), or of a
published one (`published.py`). A demo that was stopped goes on where it was, and what it prints in the end comes from
the files of its stages.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growlm.demo.course import Course
from growlm.demo.published import Published
from growlm.demo.record import Record, Request, discard, record_of
from growlm.demo.result import DemoResult
from growlm.demo.small import Small
from growlm.errors import BaseModelError, ConfigError
from growlm.progress import reporting, say

_MEASURE = "measure"
_LEFT = 0.92  # of what is left, the part that is planned with


def demo(
    out: str | Path,
    *,
    base: str | Path | None = None,
    fast: bool = False,
    minutes: float | None = None,
    device: str = "auto",
    precision: str = "auto",
    progress: bool | None = None,
) -> DemoResult:
    """Runs the demo in the folder `out`: text, base, store and report.

    Args:
        base: a published base, a GGUF file or a checkpoint folder, on which it is done instead of a small one of its
            own.
        fast: of one small size on any machine.
        minutes: in which it should end; by default 10, with a base 30.
        device: where it computes, as in `LearnConfig`.
        precision: of training's matrix products, as in `TrainConfig`.
        progress: False is silent; by default there are bars on stderr, or where it is no terminal, lines, one in ten
            seconds at most.

    Raises:
        ConfigError: minutes that are too few on this machine for any demo, or a setting out of range.
        StoreError: `out` holds something else, or another demo.
        IntegrityError: a file of the record is damaged.
        DataError: this install lacks the text.
        BaseModelError: `base` is none that is supported; nothing is made.
    """
    started = time.monotonic()
    request = Request(fast, minutes, device, precision, None if base is None else Path(base).expanduser())
    out = Path(out).expanduser()
    course: Course[Any] = (Small if base is None else Published)(request, out, progress)
    try:
        with record_of(out, request, started) as record, reporting("demo", progress):
            return _Run(record, request, course).result()
    except BaseModelError:
        if not (out / "brain").exists():
            discard(out)
        raise


class _Run:
    """One process's work on a demo."""

    def __init__(self, record: Record, request: Request, course: Course[Any]) -> None:
        self.record, self.request, self.course = record, request, course

    def result(self) -> DemoResult:
        results: dict[str, dict[str, Any]] = {}
        size = self.record.size
        if size is None:
            size = self._planned(results)
        elif (measured := self.record.result(_MEASURE)) is not None:
            self.course.take(measured)
        while waiting := [s for s in size.stages if s not in results]:
            stage = waiting[0]
            result = self.record.result(stage)
            if result is None:
                size = self._fitted(size, stage)
                if stage not in size.stages:  # there is no time for it
                    continue
                result = self._run(stage, size, results)
            results[stage] = result
        seconds = {stage: self.record.seconds(stage) for stage in (_MEASURE, *size.stages)}
        took = {stage: spent for stage, spent in seconds.items() if spent}
        return self.course.told(size, results, took, self._pace(size))

    def _planned(self, results: dict[str, dict[str, Any]]) -> Any:
        """The size for this machine and these minutes."""
        course = self.course
        if self.request.fast:
            self.record.settle(course.fast, *course.fast.stages)
            return course.fast
        for stage in course.first:
            results[stage] = self.record.result(stage) or self._run(stage, None, results)
        say("measuring this machine with a demo in small")
        with self.record.stage(_MEASURE) as done:
            measured = course.measure(self._seconds_left())
            course.take(measured)
            done(measured)
        before = sum(map(self.record.seconds, (*course.first, _MEASURE)))
        enough = _minutes(before + course.most_wanted())  # "" where no time would do
        size = course.plan(self._seconds_left())
        if size is None:
            least = _minutes(before + course.least())
            self.record.forget(_MEASURE)  # nothing was made: the next try begins anew
            raise ConfigError(
                f"--minutes {self.request.minutes:g} is too few for {course.subject} on this machine: the least takes "
                f"about {least}" + (f", and {course.reached} from about {enough} on" if enough else "")
            )
        each = course.seconds_of(size)
        seconds = before + sum(taken for stage, taken in each.items() if stage not in course.first)
        say(f"in {self.request.minutes:g} minutes: {course.described(size)}; about {seconds / 60:.1f} minutes in all")
        if not course.enough(size) and enough:
            say(f"too few minutes {course.wanted}: about {enough} would do")
        self.record.settle(size)
        return size

    def _fitted(self, size: Any, stage: str) -> Any:
        """The size, with less of what has not begun if time runs short; from now on it holds for this stage."""
        course = self.course
        if course.seconds_of(size) and not self.record.settled(stage):
            waiting = [s for s in size.stages if not self.record.settled(s) and self.record.result(s) is None]
            pace = self._pace(size)
            fitted = course.less(size, waiting, _LEFT * self._seconds_left(), pace)
            if fitted != size:
                say(f"short of time, so that less is left to do: {course.described(fitted)}")
                if course.enough(size) and not course.enough(fitted):
                    enough = _minutes(self.record.seconds(_MEASURE) + pace * course.most_wanted())
                    say(f"too little {course.wanted}: {enough} would do")
            size = fitted
        self.record.settle(size, *(s for s in [stage] if s in size.stages))
        return size

    def _run(self, stage: str, size: Any, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        expected = self.course.seconds_of(size).get(stage) if size is not None else None
        note = self.course.note(stage, size)
        say(note if expected is None else f"{note} (about {expected:.0f} s)")
        with self.record.stage(stage, expected) as done:
            done(self.course.do(stage, size, results))
        result = self.record.result(stage)
        assert result is not None
        return result

    def _pace(self, size: Any) -> float:
        """What the last long stage took, for a second that it should have taken; not below 1."""
        for stage in reversed(size.stages):
            expected = self.record.expected(stage) if stage.startswith(("pretrain", "learn", "finetune")) else None
            if expected and self.record.result(stage) is not None:
                return max(self.record.seconds(stage) / expected, 1.0)
        return 1.0

    def _seconds_left(self) -> float:
        size = self.record.size
        stages = dict.fromkeys((_MEASURE, *self.course.first, *(size.stages if size else ())))
        return 60 * self.request.minutes - sum(map(self.record.seconds, stages))


def _minutes(seconds: float) -> str:
    if not math.isfinite(seconds):
        return ""
    minutes = math.ceil(2 * seconds / 60) / 2
    return f"{minutes:g} minute" + "s" * (minutes != 1)
