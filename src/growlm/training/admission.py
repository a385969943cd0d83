"""Admission: whether what was learned does better than what was there, on held-out passages that chose nothing.

Knows losses of the same passages under both; not where they come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from growlm.errors import NotBetterError

_LEAST_GAIN = 1e-3  # nats a token


@dataclass(frozen=True)
class Comparison:
    """Two models on the same passages. Losses are in nats a token.

    Attributes:
        gain: by how much the loss is lower than before.
        error: standard error of the gain, documents being drawn, or of a single one passages; None of a single passage.
        passages: how many of these.
    """

    before: float
    after: float
    gain: float
    error: float | None
    passages: int
    tokens: int

    @classmethod
    def of(cls, before: Tensor, after: Tensor, tokens: Tensor, documents: Sequence[int] | None = None) -> Comparison:
        """
        Args:
            before, after: summed loss of every passage, (n,) each.
            tokens: that were scored of it, (n,).
            documents: (n,) which each passage is of: those of one document depend on each other, and count as one
                where there are several documents.
        """
        if documents is not None and len(set(documents)) > 1:
            found, of = torch.tensor(documents).unique(return_inverse=True)
            before, after, tokens = (
                torch.zeros(len(found), dtype=torch.float64).index_add_(0, of, values.double())
                for values in (before, after, tokens)
            )
        total, n = float(tokens.sum()), len(tokens)
        gain = float((before - after).sum()) / total
        error = None
        if n > 1:
            # Of a ratio of sums: passages differ in length, and the tokens of one depend on each other.
            rest = (before - after).double() - gain * tokens.double()
            error = math.sqrt(n / (n - 1) * float(rest.square().sum())) / total
        return cls(float(before.sum()) / total, float(after.sum()) / total, gain, error, n, int(total))

    @property
    def better(self) -> bool:
        """Whether the gain is more than its standard error, and than nothing to speak of."""
        return self.gain > max(self.error or 0.0, _LEAST_GAIN)

    @property
    def worse(self) -> bool:
        """Whether the loss is higher by more than the standard error."""
        return -self.gain > (self.error or 0.0)

    def told(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.3f}"
        losses = f"held-out loss {self.before:.3f} -> {self.after:.3f}"
        return f"{losses} (gain {self.gain:.3f}{error}, {self.passages} held-out texts)"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def require_better(name: str, found: Comparison, than: str = "the base") -> None:
    """
    Raises:
        NotBetterError: the gain is not more than its standard error.
    """
    if not found.better:
        raise NotBetterError(
            f"{name}: not better than {than}, so that nothing was saved: {found.told()}; give more text, more --epochs "
            "or another --learning-rate, or save it all the same with --admit-anyway"
        )


def require_no_worse(name: str, found: Comparison, than: str, hint: str) -> None:
    """
    Args:
        hint: what to try.

    Raises:
        NotBetterError: the loss is higher by more than its standard error.
    """
    if found.worse:
        raise NotBetterError(
            f"{name}: worse than {than}, so that nothing was saved: {found.told()}; {hint}, or save it all the same "
            "with --admit-anyway"
        )
