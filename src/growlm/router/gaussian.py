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
from growlm.router.lexicon import Lexicon
from growlm.router.states import mean_pool

# b batch, t tokens, d hidden size, c domains, f forms of general text


class GaussianRouter(Router):
    """Class means and one shared covariance of pooled hidden states, with a bound per class for *none*.

    Attributes:
        means: (c, d), whitened.
        general: (f, d), whitened: of forms of general text, all of which are *none*.
        whiten: (d, d).
        lexicon: what the words of a text say, where modules carry their text.
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
        lexicon: Lexicon | None = None,
    ) -> None:
        self.names = names
        self.forks = forks
        self.fitted = fitted
        self.layer = layer
        self.lexicon = lexicon
        self.means = means
        self.general = general
        self.whiten = whiten
        self.limits = limits

    def route(
        self, hidden: Tensor, visible: Tensor | None = None, texts: Sequence[Sequence[int]] | None = None
    ) -> list[Route]:
        return self.route_pooled(mean_pool(hidden, visible), texts)

    def route_pooled(self, vectors: Tensor, texts: Sequence[Sequence[int]] | None = None) -> list[Route]:
        """Answers for pooled vectors (b, d) of texts, given as token ids."""
        if not self.names:
            return [Route(None, {NONE: 1.0}) for _ in vectors]
        whitened = vectors.float().cpu() @ self.whiten
        distances = squared_distances(whitened, self.means)
        general = squared_distances(whitened, self.general)
        return routes_of(self.names, distances, self.limits, general, self.words_of(texts))

    def words_of(self, texts: Sequence[Sequence[int]] | None) -> Tensor | None:
        """What the words of texts say for each module, in nats, (b, c); None where there is nothing to say."""
        return None if texts is None or self.lexicon is None else self.lexicon.evidence(texts)

    def without(self, names: Collection[str]) -> GaussianRouter:
        kept = [i for i, name in enumerate(self.names) if name not in names]
        left = [self.names[i] for i in kept]
        forks = {name: self.forks[name] for name in left}
        lexicon = None if self.lexicon is None else self.lexicon.without(kept)
        return GaussianRouter(
            left, self.means[kept], self.general, self.whiten, self.limits[kept], forks, None, self.layer, lexicon
        )

    def num_bytes(self) -> int:
        words = 0 if self.lexicon is None else self.lexicon.num_bytes()
        return tensor_bytes((self.means, self.general, self.whiten, self.limits)) + words


def routes_of(
    names: Sequence[str], distances: Tensor, limits: Tensor, general: Tensor, words: Tensor | None = None
) -> list[Route]:
    """Answers from squared distances to domains (b, c), their limits (c,), squared distances to forms of general text
    (b, f), which are as likely together as one domain is, and what words say for domains, in nats (b, c)."""
    within = domain_evidence(distances, limits, words)
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


def domain_evidence(distances: Tensor, limits: Tensor, words: Tensor | None) -> Tensor:
    """Log-likelihoods of domains, up to a term that they and general text share, (b, c)."""
    # A domain out of its own bound cannot be chosen, however far the others are; what words say counts as nearness.
    evidence = -0.5 * distances if words is None else words - 0.5 * distances
    return evidence.masked_fill(evidence < -0.5 * limits, -math.inf)
