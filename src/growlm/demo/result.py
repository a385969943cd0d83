"""Result: what a demo measured, as a person reads it and as JSON. Every number was measured by a verb."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

from growlm.units import format_count, format_size

NONE = "none"  # text of no module
_HALF = 0.5  # of the base's perplexity: the most that a module may leave on its domain


@dataclass(frozen=True)
class DemoResult(ABC):
    """What every demo measures.

    Attributes:
        evaluation: of `growlm eval`, and samples.
        seconds: by stage, in all attempts.
        minutes: what was asked for; None for the fast demo.
    """

    evaluation: dict[str, Any]
    status: dict[str, Any]
    size: dict[str, Any]
    seconds: dict[str, float]
    minutes: float | None
    report: str

    @property
    @abstractmethod
    def missed(self) -> list[str]:
        """Domains for which a module did not do what it should."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @abstractmethod
    def lines(self) -> list[str]:
        """The result as a person reads it."""

    def _measured(self) -> list[str]:
        routing, memory = self.evaluation["routing"], self.evaluation["memory"]
        return [
            f"retained gain {_number(routing['retained_gain'], '.1%')}, router accuracy {routing['accuracy']:.1%} "
            "(english belongs to no module)",
            f"forgetting {_number(self.evaluation['forgetting'], 'g')}: base and earlier modules answer "
            + ("bit for bit as before" if not self.evaluation["forgetting_detail"]["changed"] else "differently"),
            f"parameters: {format_count(self.status['total_parameters'])} in all, at most "
            f"{format_count(self.status['active_parameters'])} active",
            f"memory: {format_size(memory['resident_bytes'])} resident (base, router, one module) of "
            f"{format_size(memory['total_bytes'])}",
        ]

    def _samples(self) -> list[str]:
        lines = ["", "A sample from each, the module chosen by the router:"]
        width = max(7, *(len(sample["domain"]) for sample in self.evaluation["samples"]))
        for sample in self.evaluation["samples"]:
            text = " ".join(sample["text"].split())[:90]
            lines.append(f"  {sample['domain']:<{width}} -> {sample['module'] or 'base':<{width}} ...{text}")
        return lines

    def _took(self) -> list[str]:
        took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        asked = "" if self.minutes is None else f" of {60 * self.minutes:.0f}"
        return [f"took {sum(self.seconds.values()):.0f}{asked} s: {took}", f"report: {self.report}"]


@dataclass(frozen=True)
class SmallResult(DemoResult):
    """Of a small base that was pretrained.

    Attributes:
        minutes_to_halve: where a module does not halve its domain's perplexity, the minutes in which all should, by
            what was measured.
    """

    minutes_to_halve: int | None
    accounting: list[str]

    @property
    def not_halved(self) -> list[str]:
        """Domains of which the module leaves more than half of the base's perplexity."""
        rows = self.evaluation["perplexity"]
        return [name for name, row in rows.items() if name != NONE and row["module"] > _HALF * row["base"]]

    missed = not_halved

    def gains(self) -> dict[str, float]:
        """By domain, how many nats a token the module is better than the base."""
        rows = self.evaluation["perplexity"]
        return {name: math.log(row["base"] / row["module"]) for name, row in rows.items() if name != NONE}

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "halved": not self.not_halved, "not_halved": self.not_halved}

    def lines(self) -> list[str]:
        lines = [
            f"{'domain':<8}  {'base':>8}  {'module':>8}  {'lower by':>8}  {'routed':>8}   (perplexity, held-out files)"
        ]
        for name, row in self.evaluation["perplexity"].items():
            lower = "" if name == NONE else f"{1 - row['module'] / row['base']:.0%}"
            label = "english" if name == NONE else name
            lines.append(f"{label:<8}  {row['base']:8.1f}  {row['module']:8.1f}  {lower:>8}  {row['routed']:8.1f}")
        lines += [*self._measured(), *self._samples(), "", *self.accounting, ""]
        if self.not_halved:
            would_do = "" if self.minutes_to_halve is None else f"; about --minutes {self.minutes_to_halve} would do"
            lines.append(f"not halved: the base's perplexity on {', '.join(self.not_halved)}{would_do}")
        return [*lines, *self._took()]


@dataclass(frozen=True)
class PublishedResult(DemoResult):
    """Of a published base.

    Attributes:
        base: its name.
        refused: domains of which no module was admitted: their perplexities, and the reason.
        finetuned: by text, what full finetuning on all domains in turn has come to, and what it `lost` of each since
            that was learned, in nats a token; None where the base was not finetuned.
        finetuned_bytes: of one finetuned base, as it is saved.
        minutes_to_finetune: where there was no time for it.
    """

    base: str
    refused: dict[str, dict[str, Any]]
    finetuned: dict[str, dict[str, float]] | None
    finetuned_bytes: int
    minutes_to_finetune: int | None

    @property
    def not_better(self) -> list[str]:
        """Domains that have no module, or one that is no better than the base on these held-out files."""
        rows = self.evaluation["perplexity"]
        worse = [name for name, row in rows.items() if name != NONE and row["module"] >= row["base"]]
        return [*self.refused, *worse]

    missed = not_better

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "better": not self.not_better, "not_better": self.not_better}

    def lines(self) -> list[str]:
        rows, after = self.evaluation["perplexity"], self.finetuned
        columns = ["base", "module", "routed", *(["finetuned"] if after else [])]
        lines = [
            f"perplexity on held-out files; base: {self.base}",
            "  ".join([f"{'domain':<10}", *(f"{column:>9}" for column in columns)]),
        ]
        for name in [*self.size["learn_tokens"], NONE]:
            row, label = rows.get(name) or self.refused[name], "english" if name == NONE else name
            module = "refused" if name in self.refused else "-" if name == NONE else f"{row['module']:.2f}"
            cells = [f"{row['base']:.2f}", module, f"{row['routed']:.2f}"]
            cells += [f"{after[label]['perplexity']:.2f}"] if after else []
            lines.append("  ".join([f"{label:<10}", *(f"{cell:>9}" for cell in cells)]))
        lines += self._measured()
        if after:
            *earlier, last = self.size["learn_tokens"]
            lost = ", ".join(f"{after[name]['lost']:+.3f} on {name}" for name in (*earlier, "english"))
            lines.append(
                f"finetuned, one domain after another up to {last}: loss {lost}, since it knew them best (nats a "
                f"token); {format_size(self.finetuned_bytes)} resident"
            )
        else:
            would_do = f": about --minutes {self.minutes_to_finetune} would do" if self.minutes_to_finetune else ""
            lines.append(f"not finetuned, to compare{would_do}")
        lines += [*self._samples(), ""]
        lines += [f"refused: {row['reason']}" for row in self.refused.values()]
        if worse := [name for name in self.not_better if name not in self.refused]:
            lines.append(f"no better than the base on these files: {', '.join(worse)}")
        return [*lines, *self._took()]


def _number(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)
