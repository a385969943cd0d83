"""Statistics: intervals by bootstrap over documents, and how far a router's confidence can be believed.

Knows tensors of numbers a document; not what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_RESAMPLES = 1000
_DRAWS = 1 << 22  # documents drawn at a time
_BINS = 10


class Bootstrap:
    """Percentile intervals over resampled documents (Efron, 1979); the same seed gives the same intervals.

    Args:
        groups: how many documents each group has. Documents are drawn again within their own group, and measures of
            several groups see the same draws.
    """

    def __init__(self, groups: Sequence[int], *, resamples: int = _RESAMPLES, seed: int = 0) -> None:
        self._groups, self._resamples, self._seed = list(groups), resamples, seed

    def sums(self, group: int, values: Tensor) -> Tensor:
        """Sum of a group's values (documents,) in every resample, (resamples,)."""
        count = self._groups[group]
        assert values.shape == (count,)
        generator = torch.Generator().manual_seed(self._seed + group)
        values = values.double()
        at_once = max(_DRAWS // count, 1)
        parts = [
            values[torch.randint(count, (min(at_once, self._resamples - at), count), generator=generator)].sum(1)
            for at in range(0, self._resamples, at_once)
        ]
        return torch.cat(parts)

    @staticmethod
    def interval(measures: Tensor, level: float = 0.95) -> list[float] | None:
        """The middle `level` of the resampled measures; None where one of them is not defined."""
        if not bool(measures.isfinite().all()):
            return None
        tail = (1 - level) / 2
        low, high = measures.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
        return [low, high]


def calibration(confidence: Tensor, right: Tensor) -> dict[str, Any]:
    """Expected calibration error with ten bins of equal width (Guo et al., 2017), and the bins.

    Args:
        confidence: (n,) the probability that was given to each choice, in [0, 1].
        right: (n,) bool, whether the choice was right.
    """
    which = (confidence.double() * _BINS).long().clamp(0, _BINS - 1)
    bins = []
    error = 0.0
    for number in range(_BINS):
        mine = which == number
        count = int(mine.sum())
        if not count:
            continue
        said, was = float(confidence[mine].double().mean()), float(right[mine].double().mean())
        bins.append({"documents": count, "confidence": said, "accuracy": was})
        error += abs(said - was) * count / len(confidence)
    return {"expected_error": error, "bins": bins}
