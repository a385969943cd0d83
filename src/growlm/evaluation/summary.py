"""Summary: one evaluation result as lines of text. Knows the dictionary that `growlm eval --json` prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from growlm.evaluation.continual import row_names


def summary(result: Mapping[str, Any]) -> list[str]:
    """The result as a person reads it on a terminal."""
    rows = [["domain", "base", "module", "routed", "95 % interval"]]
    for name, row in result["perplexity"].items():
        rows.append([name, *(_number(row[key]) for key in ("base", "module", "routed")), _span(row["routed_interval"])])
    routing, none = result["routing"], result["routing"]["none"]
    lines = [
        *_table(rows),
        f"router accuracy {_share(routing['accuracy'], routing['accuracy_interval'])}, "
        f"retained gain {_share(routing['retained_gain'], routing['retained_gain_interval'])}, "
        f"forgetting {_number(result['forgetting'], '.3g')}",
    ]
    shares = [f"{none[key]:.1%} of {text}" for key, text in NONE_SHARES if key in none]
    error = f"calibration error {routing['calibration']['expected_error']:.3f}"
    lines.append(f"none chosen for {' and '.join(shares)}; {error}")
    if (cost := routing["none_cost"]) is not None:
        lines.append(f"routing costs text of no domain {_number(cost, '+.4f')} nats a token")
    detail = result["forgetting_detail"]
    if changed := detail["changed"]:
        lines.append(f"changed since learned: {', '.join(changed)}; {len(changed)} of {len(detail['checked'])} parts")
    if unknown := result["forgetting_detail"].get("not_comparable"):
        lines.append(
            f"not in forgetting: {', '.join(unknown)}; the loss was no number when it was learned, or is none now"
        )
    if matrix := result["matrix"]:
        rows = [["routed perplexity", *matrix["domains"]], ["before", *map(_number, matrix["before"])]]
        for name, losses in zip(row_names(matrix), matrix["after"], strict=True):
            rows.append([name, *map(_number, losses)])
        measures = (("average forgetting", "average_forgetting"), ("backward transfer", "backward_transfer"),
                    ("forward transfer", "forward_transfer"))  # fmt: skip
        lines += [
            "",
            *_table(rows),
            ", ".join(f"{text} {_number(matrix[key], '+.4f')}" for text, key in measures) + " nats a token",
        ]
        if updated := matrix["updated"]:
            lines.append(f"every row is of today's versions; updated since: {', '.join(updated)}")
    return lines


NONE_SHARES = (("of_no_domain", "text of no domain"), ("of_domains", "the domains' text"))


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows]  # fmt: skip


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def _share(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.1%}" if interval is None else f"{value:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"


def _span(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
