"""The gaussian router: linear discriminant analysis, one mean a domain and one covariance for all.

Knows means, the covariance and limits as they were fitted (`fitting.py`), and hidden states; reads no file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from growlm.base import tensor_bytes
from growlm.router.cells import squared_distances
from growlm.router.interface import NONE, Route, Router
from growlm.router.states import mean_pool

# b batch, t tokens, d hidden size, c classes


class GaussianRouter(Router):
    """Class means and one shared covariance of pooled hidden states, with a bound per class for *none*.

    Attributes:
        whiten: (d, d).
        means: (c, d), whitened; the last class is general text.
        limits: (c - 1,) largest squared distance at which a text still belongs.
        fitted: sha256 of the file that holds what was fitted; None where it was not kept, or names were taken out.
    """

    kind = "gaussian"

    def __init__(
        self,
        names: list[str],
        means: Tensor,
        whiten: Tensor,
        limits: Tensor,
        forks: dict[str, int],
        fitted: str | None = None,
        layer: int | None = None,
    ) -> None:
        self.names = names
        self.forks = forks
        self.fitted = fitted
        self.layer = layer
        self.whiten = whiten
        self.means = means
        self.limits = limits

    def route(self, hidden: Tensor, visible: Tensor | None = None) -> list[Route]:
        return self.route_pooled(mean_pool(hidden, visible))

    def route_pooled(self, vectors: Tensor) -> list[Route]:
        """Answers for pooled vectors (b, d)."""
        if not self.names:
            return [Route(None, {NONE: 1.0}) for _ in vectors]
        distances = squared_distances(vectors.float().cpu() @ self.whiten, self.means)
        return routes_of(self.names, distances, self.limits)

    def without(self, names: Collection[str]) -> GaussianRouter:
        kept = [i for i, name in enumerate(self.names) if name not in names]
        left = [self.names[i] for i in kept]
        means, limits = self.means[[*kept, -1]], self.limits[kept]
        forks = {name: self.forks[name] for name in left}
        return GaussianRouter(left, means, self.whiten, limits, forks, layer=self.layer)

    def num_bytes(self) -> int:
        return tensor_bytes((self.means, self.whiten, self.limits))


def routes_of(names: Sequence[str], distances: Tensor, limits: Tensor) -> list[Route]:
    """Answers from squared distances (b, c), of which the last is that to general text, and limits (c - 1,)."""
    # A domain out of its own bound cannot be chosen, however far the others are.
    evidence = -0.5 * distances
    evidence[:, :-1] = evidence[:, :-1].masked_fill(distances[:, :-1] > limits, -math.inf)
    scores = torch.softmax(evidence, dim=-1)
    # By evidence, and not by scores alone: of far domains all scores are 0.
    order = evidence.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, scores.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    labels = [*names, NONE]
    routes = []
    for row, ranks in zip(scores.tolist(), order.tolist(), strict=True):
        best = labels[ranks[0]]
        routes.append(Route(None if best == NONE else best, {labels[i]: row[i] for i in ranks}))
    return routes
