"""Published: the course of a demo on a base that is given, instead of one that it pretrains."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from growlm.demo import published_sizing as sizing
from growlm.demo.course import Course
from growlm.demo.published_sizing import PublishedSize, PublishedSpeeds
from growlm.demo.result import DemoResult, PublishedResult

_NOTES = {
    "base": "1. a store for {base}",
    "text": "collecting text from this install",
    "learn": "2. {domain}, learned from {tokens} tokens of its own text alone",
    "evaluate": "3. held-out files: does it know more, is the right module found, is anything forgotten?",
    "generate": "4. a sample of each",
    "finetune": "5. to compare: all of the base finetuned on the same {tokens} tokens of {domain}",
    "report": "the report",
}


class Published(Course[PublishedSize]):
    first = sizing.FIRST
    wanted = "to finetune the base as well"
    reached = "the base is finetuned as well, to compare,"
    subject = "a demo with this base"

    speeds: PublishedSpeeds | None = None

    @property
    def fast(self) -> PublishedSize:
        return sizing.FAST

    def measure(self, seconds: float) -> dict[str, Any]:
        return self._stages(self.fast).measure()

    def take(self, measured: Mapping[str, Any]) -> None:
        self.speeds = PublishedSpeeds(**measured["speeds"])

    def plan(self, seconds: float) -> PublishedSize | None:
        assert self.speeds is not None
        return sizing.plan(self.speeds, seconds)

    def less(self, size: PublishedSize, stages: Collection[str], seconds: float, pace: float) -> PublishedSize:
        assert self.speeds is not None
        return sizing.less(size, self.speeds, stages, seconds, pace)

    def seconds_of(self, size: PublishedSize) -> dict[str, float]:
        return sizing.seconds_of(size, self.speeds) if self.speeds else {}

    def least(self) -> float:
        assert self.speeds is not None
        return sizing.seconds_for_least(self.speeds)

    def most_wanted(self) -> float:
        assert self.speeds is not None
        return sizing.seconds_for_finetuning(self.speeds)

    def enough(self, size: PublishedSize) -> bool:
        return size.finetune

    def described(self, size: PublishedSize) -> str:
        learned = " and ".join(f"{n:,}" for n in sorted(set(size.learn_tokens.values())))
        finetuned = "the base finetuned on the same, " if size.finetune else ""
        if self.speeds and self.speeds.finetune is None:
            finetuned = "the base not finetuned, as there is too little memory, "
        return (
            f"modules on {learned} tokens of each of {', '.join(size.learn_tokens)}, {finetuned}"
            f"{size.max_documents} held-out documents of each"
        )

    def note(self, stage: str, size: PublishedSize | None) -> str:
        verb, _, domain = stage.partition("-")
        tokens = size.learn_tokens.get(domain, 0) if size else 0
        return _NOTES[verb].format(base=self._base.name, domain=domain, tokens=f"{tokens:,}")

    def do(self, stage: str, size: PublishedSize | None, done: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        return self._stages(size or self.fast).run(stage, done)

    def told(
        self, size: PublishedSize, results: Mapping[str, dict[str, Any]], seconds: Mapping[str, float], pace: float
    ) -> DemoResult:
        found = results["evaluate"]
        refused = {name: found["refused"][name] for name in size.learn_tokens if name in found["refused"]}
        reasons = {name: results[f"learn-{name}"]["refused"] for name in refused}
        minutes = None
        if self.speeds and not size.finetune and math.isfinite(needed := pace * self.most_wanted()):
            spent = sum(seconds.get(stage, 0.0) for stage in (*self.first, "measure"))
            minutes = max(math.ceil((spent + needed) / 60), math.floor(self.request.minutes) + 1)
        return PublishedResult(
            evaluation={**found["evaluation"], "samples": results["generate"]["samples"]},
            status=found["status"],
            size=asdict(size),
            seconds=dict(seconds),
            minutes=None if self.request.fast else self.request.minutes,
            report=str(self.out / "report" / "index.html"),
            base=self._base.name,
            refused={name: {**row, "reason": reasons[name]} for name, row in refused.items()},
            finetuned=_finetuned(size, results, found["evaluation"]["perplexity"]["none"]["base"]),
            finetuned_bytes=4 * results["base"]["parameters"],
            minutes_to_finetune=minutes,
        )

    @property
    def _base(self) -> Any:
        assert self.request.base is not None
        return self.request.base

    def _stages(self, size: PublishedSize) -> Any:
        from growlm.demo.published_stages import PublishedStages

        asked = self.request
        return PublishedStages(self.out, size, asked.device, asked.precision, self.progress, self._base)


def _finetuned(
    size: PublishedSize, results: Mapping[str, dict[str, Any]], general_before: float
) -> dict[str, dict[str, float]] | None:
    """By text: perplexity when all domains were finetuned, and by how many nats a token that is worse than when its own
    domain had just been; English, than the base."""
    if not size.finetune:
        return None
    own = {name: results[sizing.finetuning(name)]["perplexity"] for name in size.learn_tokens}
    last = own[list(own)[-1]]
    before = {name: found[name] for name, found in own.items()} | {"english": general_before}
    return {name: {"perplexity": last[name], "lost": math.log(last[name] / before[name])} for name in before}
