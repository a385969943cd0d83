"""Continual learning: what a sequence of domains did to each of them, as that field measures it.

Knows a matrix of log-losses; not where it came from, so that any way of learning can be measured with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ForgettingMatrix:
    """Log-loss in nats a token on every domain's test text, before any was learned and after each.

    Attributes:
        domains: in the order of learning; columns are in the same order.
        before: (number of domains,) before anything was learned.
        after: row i is what was measured once domain i had been learned. One more row may follow: what was measured at
            the end, where other things than these domains were learned after the last of them.

    The measures are those of Lopez-Paz and Ranzato, "Gradient Episodic Memory" (2017), for transfer, and of Chaudhry et
    al., "Riemannian Walk" (2018), for forgetting. They are defined there for accuracies; a loss is better when it is
    lower, so the differences are turned round and keep their meaning: transfer above 0 helps, forgetting above 0 hurts.
    """

    domains: Sequence[str]
    before: Sequence[float]
    after: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        size = len(self.domains)
        columns = {len(self.before), *map(len, self.after)}
        if columns != {size} or len(self.after) not in (size, size + 1):
            raise ValueError(
                f"a matrix of {size} domains has {len(self.after)} rows and columns of sizes {sorted(columns)}"
            )

    @property
    def _last(self) -> int:
        """The last row; the domains before it can have changed since they were learned."""
        return len(self.after) - 1

    def backward_transfer(self) -> float | None:
        """How much later domains lowered earlier ones' loss: mean over all learned before the last row of
        R[j][j] - R[last][j]."""
        last = self._last
        return _mean([self.after[j][j] - self.after[last][j] for j in range(last)])

    def forward_transfer(self) -> float | None:
        """How much earlier domains lowered a later one's loss before it was learned: mean of before[j] - R[j-1][j]."""
        return _mean([self.before[j] - self.after[j - 1][j] for j in range(1, len(self.domains))])

    def forgetting(self) -> float | None:
        """Mean over the domains learned before the last row of the final loss, less the least since each was
        learned."""
        last = self._last
        return _mean([self.after[last][j] - min(row[j] for row in self.after[j:last]) for j in range(last)])

    def to_json(self) -> dict[str, Any]:
        """Perplexities, and the measures in nats a token; None where a single domain has none."""
        return {
            "domains": list(self.domains),
            "before": [_perplexity(x) for x in self.before],
            "after": [[_perplexity(x) for x in row] for row in self.after],
            "average_forgetting": self.forgetting(),
            "backward_transfer": self.backward_transfer(),
            "forward_transfer": self.forward_transfer(),
        }


def row_names(matrix: Mapping[str, Any]) -> list[str]:
    """What the rows of a matrix's `to_json` are called, "before" not included."""
    domains = matrix["domains"]
    return [f"after {name}" for name in domains] + ["now"] * (len(matrix["after"]) - len(domains))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
