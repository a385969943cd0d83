"""Demo: the main job on text that is already there. Pretrain, learn three domains one after another, evaluate, report.

Measures the machine, sizes itself to the minutes that it is given, and does less where time runs short. Knows the
order of the stages and their time; what each of them does is in `stages.py`. A demo that was stopped goes on where it
was, and what it prints in the end comes from the files of its stages.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from growlm.demo import sizing
from growlm.demo.record import Record, Request, record_of
from growlm.demo.result import DemoResult
from growlm.demo.sizing import DemoSize, Speeds
from growlm.errors import ConfigError
from growlm.progress import reporting, say

_MEASURE = "measure"
_LEFT = 0.92  # of what is left, the part that is planned with
_NOTES = {
    "text": "collecting text from this install",
    "pretrain": "1. a base, pretrained on {pretrain} tokens of English",
    "learn": "2. {domain}, learned from {learn} tokens of its own text alone",
    "evaluate": "3. held-out files: does it know more, is the right module found, is anything forgotten?",
    "generate": "4. a sample of each",
    "report": "5. the report",
}


def demo(
    out: str | Path,
    *,
    fast: bool = False,
    minutes: float = 10.0,
    device: str = "auto",
    precision: str = "auto",
    progress: bool | None = None,
) -> DemoResult:
    """Runs the demo in the folder `out`: text, base, store and report.

    Args:
        fast: of one small size on any machine.
        minutes: in which it should end.
        device: where it computes, as in `LearnConfig`.
        precision: of training's matrix products, as in `TrainConfig`.
        progress: False is silent; by default there are bars on stderr, or where it is no terminal, lines, one in ten
            seconds at most.

    Raises:
        ConfigError: minutes that are too few on this machine for any demo, or a setting out of range.
        StoreError: `out` holds something else, or another demo.
        IntegrityError: a file of the record is damaged.
        DataError: this install lacks the text.
    """
    started = time.monotonic()
    request = Request(fast, minutes, device, precision)
    with record_of(Path(out).expanduser(), request, started) as record, reporting("demo", progress):
        return _Run(record, request, progress).result()


class _Run:
    """One process's work on a demo."""

    def __init__(self, record: Record, request: Request, progress: bool | None) -> None:
        self.record, self.request, self.progress = record, request, progress
        self.speeds: dict[str, Speeds] = {}

    def result(self) -> DemoResult:
        size = self.record.size or self._planned()
        if (measured := self.record.result(_MEASURE)) is not None:
            self.speeds = {preset: Speeds(**found) for preset, found in measured["speeds"].items()}
        results: dict[str, dict[str, Any]] = {}
        for stage in size.stages:
            result = self.record.result(stage)
            if result is None:
                size = self._fitted(size, stage)
                result = self._run(stage, size, results)
            results[stage] = result
        return self._told(size, results)

    def _planned(self) -> DemoSize:
        """The size for this machine and these minutes."""
        if self.request.fast:
            self.record.settle(sizing.FAST, *sizing.FAST.stages)
            return sizing.FAST
        say("measuring this machine with a demo in small")
        with self.record.stage(_MEASURE) as done:
            from growlm.demo.machine import measure

            speeds = measure(self._seconds_left(), self.request.device, self.request.precision)
            done({"speeds": {preset: asdict(found) for preset, found in speeds.items()}})
        measuring = self.record.seconds(_MEASURE)
        half = _minutes(measuring + sizing.seconds_for_half(speeds))
        size = sizing.plan(speeds, self._seconds_left())
        if size is None:
            least = _minutes(measuring + sizing.seconds_for_least(speeds))
            self.record.forget(_MEASURE)  # nothing was made: the next try begins anew
            raise ConfigError(
                f"--minutes {self.request.minutes:g} is too few for a demo on this machine: the least takes about "
                f"{least}, and every module halves its domain's perplexity from about {half} on"
            )
        seconds = measuring + sizing.total(size, speeds[size.preset])
        say(f"in {self.request.minutes:g} minutes: {_described(size)}; about {seconds / 60:.1f} minutes in all")
        if not sizing.enough(size):
            say(f"too few minutes for every module to halve its domain's perplexity: about {half} would do")
        self.record.settle(size)
        return size

    def _fitted(self, size: DemoSize, stage: str) -> DemoSize:
        """The size, with less of what has not begun if time runs short; from now on it holds for this stage."""
        speeds = self.speeds.get(size.preset)
        if speeds is not None and not self.record.settled(stage):
            waiting = [s for s in size.stages if not self.record.settled(s)]
            pace = self._pace(size)
            fitted = sizing.less(size, speeds, waiting, _LEFT * self._seconds_left(), pace)
            if fitted != size:
                say(f"short of time, so that less is left to do: {_described(fitted)}")
                if sizing.enough(size) and not sizing.enough(fitted):
                    half = _minutes(self.record.seconds(_MEASURE) + pace * sizing.seconds_for_half(self.speeds))
                    say(f"too little for every module to halve its domain's perplexity: {half} would do")
            size = fitted
        self.record.settle(size, stage)
        return size

    def _run(self, stage: str, size: DemoSize, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        speeds = self.speeds.get(size.preset)
        expected = sizing.seconds_of(size, speeds)[stage] if speeds else None
        verb, _, domain = stage.partition("-")
        counts = {"pretrain": size.pretrain_tokens, "learn": size.learn_tokens.get(domain, 0)}
        note = _NOTES[verb].format(domain=domain, **{verb: f"{n:,}" for verb, n in counts.items()})
        say(note if expected is None else f"{note} (about {expected:.0f} s)")
        with self.record.stage(stage, expected) as done:
            from growlm.demo.stages import Stages

            asked = self.request
            stages = Stages(self.record.out, size, asked.device, asked.precision, self.progress)
            done(stages.run(stage, results))
        result = self.record.result(stage)
        assert result is not None
        return result

    def _told(self, size: DemoSize, results: Mapping[str, dict[str, Any]]) -> DemoResult:
        seconds = {stage: self.record.seconds(stage) for stage in (_MEASURE, *size.stages)}
        found = DemoResult(
            evaluation={**results["evaluate"]["evaluation"], "samples": results["generate"]["samples"]},
            status=results["evaluate"]["status"],
            size=asdict(size),
            seconds={stage: spent for stage, spent in seconds.items() if spent},
            minutes=None if self.request.fast else self.request.minutes,
            minutes_to_halve=None,
            report=str(self.record.out / "report" / "index.html"),
            accounting=results["report"]["accounting"],
        )
        if not found.not_halved or not self.speeds:
            return found
        times = sizing.tokens_missed(size, found.gains())
        needed = self.record.seconds(_MEASURE) + self._pace(size) * sizing.seconds_for_half(self.speeds, times)
        return replace(found, minutes_to_halve=max(math.ceil(needed / 60), math.floor(self.request.minutes) + 1))

    def _pace(self, size: DemoSize) -> float:
        """What the last long stage took, for a second that it should have taken; not below 1."""
        for stage in reversed(size.stages):
            expected = self.record.expected(stage) if stage.startswith(("pretrain", "learn")) else None
            if expected and self.record.result(stage) is not None:
                return max(self.record.seconds(stage) / expected, 1.0)
        return 1.0

    def _seconds_left(self) -> float:
        stages = (_MEASURE, *(self.record.size.stages if self.record.size else ()))
        return 60 * self.request.minutes - sum(map(self.record.seconds, stages))


def _described(size: DemoSize) -> str:
    tokens = set(size.learn_tokens.values())
    learned = " and ".join(f"{n:,}" for n in sorted(tokens))
    return (
        f"a {size.preset} base on {size.pretrain_tokens:,} tokens of English, {size.num_layers} layers on "
        f"{learned} tokens of each of {', '.join(size.learn_tokens)}, {size.max_documents} held-out documents of each"
    )


def _minutes(seconds: float) -> str:
    minutes = math.ceil(2 * seconds / 60) / 2
    return f"{minutes:g} minute" + "s" * (minutes != 1)
