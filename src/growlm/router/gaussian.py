"""The gaussian router: linear discriminant analysis, one mean a domain, some of general text, one covariance for all.

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

# b batch, t tokens, d hidden size, c domains, f forms of general text


class GaussianRouter(Router):
    """Class means and one shared covariance of pooled hidden states, with a bound per class for *none*.

    Attributes:
        means: (c, d), whitened.
        general: (f, d), whitened: of forms of general text, all of which are *none*.
        whiten: (d, d).
        limits: (c,) largest squared distance at which a text still belongs.
        fitted: sha256 of the file that holds what was fitted; None where it was not kept, or names were taken out.
    """

    kind = "gaussian"

    def __init__(
        self,
        names: list[str],
        means: Tensor,
        general: Tensor,
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
        self.means = means
        self.general = general
        self.whiten = whiten
        self.limits = limits

    def route(self, hidden: Tensor, visible: Tensor | None = None) -> list[Route]:
        return self.route_pooled(mean_pool(hidden, visible))

    def route_pooled(self, vectors: Tensor) -> list[Route]:
        """Answers for pooled vectors (b, d)."""
        if not self.names:
            return [Route(None, {NONE: 1.0}) for _ in vectors]
        whitened = vectors.float().cpu() @ self.whiten
        distances = squared_distances(whitened, self.means)
        return routes_of(self.names, distances, self.limits, squared_distances(whitened, self.general))

    def without(self, names: Collection[str]) -> GaussianRouter:
        kept = [i for i, name in enumerate(self.names) if name not in names]
        left = [self.names[i] for i in kept]
        forks = {name: self.forks[name] for name in left}
        return GaussianRouter(
            left, self.means[kept], self.general, self.whiten, self.limits[kept], forks, layer=self.layer
        )

    def num_bytes(self) -> int:
        return tensor_bytes((self.means, self.general, self.whiten, self.limits))


def routes_of(names: Sequence[str], distances: Tensor, limits: Tensor, general: Tensor) -> list[Route]:
    """Answers from squared distances to domains (b, c), their limits (c,), and squared distances to forms of general
    text (b, f), which are as likely together as one domain is."""
    # A domain out of its own bound cannot be chosen, however far the others are.
    within = -0.5 * distances.masked_fill(distances > limits, math.inf)
    of_general = torch.logsumexp(-0.5 * general, -1, keepdim=True) - math.log(general.shape[-1])
    evidence = torch.cat([within, of_general], -1)
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
