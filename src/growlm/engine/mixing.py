"""Mixing: one text written or scored by several modules at once, weighted by how well each predicted it so far.

The weights are Bayes' rule over modules, as DEMix layers mix domain experts (Gururangan et al., 2022), with a fixed
share (Herbster and Warmuth, 1998): before every token a small part of the weight goes back to the router's prior, so
that a text may pass from one domain into another. Knows module sets and probabilities; not where modules come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

# k modules, n tokens, v vocabulary

UNIFORM_PRIOR_SHARE = 0.1  # share of a mixture's prior that is spread evenly: one ruled out may fit what comes later
SHARE = 0.02  # of the weight that returns to the prior at every token: a change of domain every 50 tokens


class Posterior:
    """Weights of k modules after the text so far.

    Args:
        prior: (k,) positive weights, e.g. the router's scores; they are normalised.
        share: what returns to the prior at every token; 0 is Bayes' rule alone.
    """

    def __init__(self, prior: Tensor, share: float = SHARE) -> None:
        self._wide = torch.float32 if prior.device.type == "mps" else torch.float64  # which Metal does not have
        self._prior = prior.to(self._wide) / prior.to(self._wide).sum()
        self._log_weights = self._prior.log()
        self._share = share

    @classmethod
    def of_scores(cls, scores: list[float], device: torch.device) -> Posterior:
        """Before anything was read, from the router's scores of the modules."""
        prior = torch.tensor(scores, device=device)
        return cls((1 - UNIFORM_PRIOR_SHARE) * prior / prior.sum() + UNIFORM_PRIOR_SHARE / len(scores))

    @property
    def weights(self) -> Tensor:
        """(k,), they sum to 1."""
        return self._log_weights.exp()

    def mix(self, log_probabilities: Tensor) -> Tensor:
        """The mixture's log-probabilities (v,) from each module's (k, v)."""
        return torch.logsumexp(log_probabilities.to(self._wide) + self._log_weights[:, None], dim=0)

    def update(self, log_probabilities: Tensor) -> float:
        """Takes in a token that each module gave a log-probability, (k,). Returns the mixture's own."""
        joint = self._log_weights + log_probabilities.to(self._wide)
        total = torch.logsumexp(joint, dim=0)
        self._log_weights = ((1 - self._share) * (joint - total).exp() + self._share * self._prior).log()
        return float(total)


def mixture_losses(losses: Tensor, prior: Tensor, share: float = SHARE) -> Tensor:
    """Log-loss (n,) of a mixture on a text, from each module's log-loss of every token, (k, n); in nats."""
    posterior = Posterior(prior, share)
    return torch.tensor([-posterior.update(-column) for column in losses.T], dtype=torch.float64)
