"""Small: the course of a demo that pretrains a small base of its own, on English alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

from growlm.demo import sizing
from growlm.demo.course import Course
from growlm.demo.result import DemoResult, SmallResult
from growlm.demo.sizing import DemoSize, Speeds

_NOTES = {
    "text": "collecting text from this install",
    "pretrain": "1. a base, pretrained on {pretrain} tokens of English",
    "learn": "2. {domain}, learned from {learn} tokens of its own text alone",
    "evaluate": "3. held-out files: does it know more, is the right module found, is anything forgotten?",
    "generate": "4. a sample of each",
    "report": "5. the report",
}


class Small(Course[DemoSize]):
    wanted = "for every module to halve its domain's perplexity"
    reached = "every module halves its domain's perplexity"

    speeds: Mapping[str, Speeds] = {}  # by preset

    @property
    def fast(self) -> DemoSize:
        return sizing.FAST

    def measure(self, seconds: float) -> dict[str, Any]:
        from growlm.demo.machine import measure

        speeds = measure(seconds, self.request.device, self.request.precision)
        return {"speeds": {preset: asdict(found) for preset, found in speeds.items()}}

    def take(self, measured: Mapping[str, Any]) -> None:
        self.speeds = {preset: Speeds(**found) for preset, found in measured["speeds"].items()}

    def plan(self, seconds: float) -> DemoSize | None:
        return sizing.plan(self.speeds, seconds)

    def less(self, size: DemoSize, stages: Collection[str], seconds: float, pace: float) -> DemoSize:
        return sizing.less(size, self.speeds[size.preset], stages, seconds, pace)

    def seconds_of(self, size: DemoSize) -> dict[str, float]:
        speeds = self.speeds.get(size.preset)
        return sizing.seconds_of(size, speeds) if speeds else {}

    def least(self) -> float:
        return sizing.seconds_for_least(self.speeds)

    def most_wanted(self) -> float:
        return sizing.seconds_for_half(self.speeds)

    def enough(self, size: DemoSize) -> bool:
        return sizing.enough(size)

    def described(self, size: DemoSize) -> str:
        tokens = set(size.learn_tokens.values())
        learned = " and ".join(f"{n:,}" for n in sorted(tokens))
        return (
            f"a {size.preset} base on {size.pretrain_tokens:,} tokens of English, {size.num_layers} layers on "
            f"{learned} tokens of each of {', '.join(size.learn_tokens)}, {size.max_documents} held-out documents of "
            "each"
        )

    def note(self, stage: str, size: DemoSize | None) -> str:
        assert size is not None
        verb, _, domain = stage.partition("-")
        counts = {"pretrain": size.pretrain_tokens, "learn": size.learn_tokens.get(domain, 0)}
        return _NOTES[verb].format(domain=domain, **{verb: f"{n:,}" for verb, n in counts.items()})

    def do(self, stage: str, size: DemoSize | None, done: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        from growlm.demo.stages import Stages

        assert size is not None
        return Stages(self.out, size, self.request.device, self.request.precision, self.progress).run(stage, done)

    def told(
        self, size: DemoSize, results: Mapping[str, dict[str, Any]], seconds: Mapping[str, float], pace: float
    ) -> DemoResult:
        found = SmallResult(
            evaluation={**results["evaluate"]["evaluation"], "samples": results["generate"]["samples"]},
            status=results["evaluate"]["status"],
            size=asdict(size),
            seconds=dict(seconds),
            minutes=None if self.request.fast else self.request.minutes,
            report=str(self.out / "report" / "index.html"),
            minutes_to_halve=None,
            accounting=results["report"]["accounting"],
        )
        if not found.not_halved or not self.speeds:
            return found
        times = sizing.tokens_missed(size, found.gains())
        needed = seconds.get("measure", 0.0) + pace * sizing.seconds_for_half(self.speeds, times)
        asked = math.floor(self.request.minutes) + 1
        return replace(found, minutes_to_halve=max(math.ceil(needed / 60), asked))
