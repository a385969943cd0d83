"""Recall: what a text says after contexts like this one, mixed into the probabilities of the next token.

A context has up to w neighbours: places of the text whose tokens before agree with it, and what follows there. Several
estimates of the next token are made of them, each from the longest contexts that have so many neighbours, and mixed
with the model's own by gates that see how long the agreement is, how many agree, how much they say the same, how sure
the model is, and whether the prompt has said as much of the context before, since a model copies its prompt: a mixture
as of cache and nearest-neighbour language models (Khandelwal et al. 2020), with the infinity-gram model's estimates
(Liu et al. 2024). The gates are a few dozen numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# n tokens, v vocabulary, w neighbours of a context, j levels, f features

LEVELS = (1, 4, 16, 64)  # neighbours that the contexts of a level have at the least
FEATURES = 10
NOTHING = -math.inf  # the first gate of a level that counts for nothing
_LEAST = -12.0  # log-probabilities that the gates tell apart, at the least


@dataclass
class Recalled:
    """What neighbours say of n next tokens.

    Attributes:
        tokens: (n, w) what follows; 0 where there is no neighbour.
        masses: (n, j, w) of each level's estimate, the part that is of each neighbour; they sum to 1, or to 0 where
            there is no estimate.
        features: (n, j, f) what the gates see.
    """

    tokens: Tensor
    masses: Tensor
    features: Tensor

    def probability(self, tokens: Tensor) -> Tensor:
        """Of tokens (n,), each level's, (n, j)."""
        return torch.where((self.tokens == tokens[:, None])[:, None], self.masses, 0.0).sum(-1)

    def gates(self, weights: Tensor) -> Tensor:
        """Log-weights (n, 1 + j) of the model and of each level, for `weights` (j, f)."""
        scores = (self.features * torch.nan_to_num(weights, neginf=0.0)).sum(-1)
        off = weights[:, 0].isneginf() | (self.masses.sum(-1) == 0)
        scores = torch.cat([scores.new_zeros(len(scores), 1), scores.masked_fill(off, NOTHING)], dim=1)
        return scores.log_softmax(-1)


def recalled(log_probabilities: Tensor, lengths: Tensor, tokens: Tensor, repeated: Tensor) -> Recalled:
    """
    Args:
        log_probabilities: the model's, (n, v) float32.
        lengths: (n, w) tokens of the context that agree, falling; 0 where there is no neighbour.
        tokens: (n, w) what follows; anything where there is none.
        repeated: (n,) tokens of the context that stand earlier in the prompt as well.
    """
    there = lengths > 0
    tokens = torch.where(there, tokens, 0)
    own = log_probabilities.gather(1, tokens).clamp(min=_LEAST)  # the model's, of each neighbour's token
    same = (tokens[:, :, None] == tokens[:, None]).float()
    surest = log_probabilities.amax(-1)
    entropy = torch.special.entr(log_probabilities.exp()).sum(-1)
    masses, features = [], []
    for least in LEVELS:
        length = lengths[:, min(least, lengths.shape[1]) - 1]  # with which there are so many
        chosen = there & (lengths >= length[:, None]) & (length > 0)[:, None]
        count = chosen.sum(-1)
        mass = chosen / count.clamp(min=1)[:, None]
        votes = chosen * (same @ chosen.float()[..., None])[..., 0]  # whole numbers: of how many that say the same
        most = votes.amax(-1)
        # Of several tokens that most say, what the model finds likeliest: not what happens to lie first.
        likeliest = torch.where(chosen & (votes == most[:, None]), own, _LEAST).amax(-1)
        masses.append(mass)
        seen = [
            torch.ones_like(surest),
            length.clamp(min=1).float().log(),
            count.clamp(min=1).float().log(),
            most / count.clamp(min=1),
            likeliest / 4,
            (own * mass).sum(-1) / 4,
            surest,
            entropy / 4,
            (repeated >= length).float(),
            (repeated.float().log1p() - length.float().log1p()).clamp(min=0),
        ]
        features.append(torch.stack(seen, dim=-1) * (count > 0)[:, None])
    return Recalled(tokens, torch.stack(masses, dim=1), torch.stack(features, dim=1))


def mixed(log_probabilities: Tensor, found: Recalled, weights: Tensor) -> Tensor:
    """Log-probabilities (n, v) of the model and all estimates together."""
    gates = found.gates(weights.float())
    out = log_probabilities + gates[:, :1]
    own = (found.masses * gates[:, 1:, None].exp()).sum(1)  # (n, w)
    same = (found.tokens[:, :, None] == found.tokens[:, None]).float()
    added = (same @ own[..., None])[..., 0]
    # Neighbours that say the same write the same. Where there is none, nothing is added to a token.
    return out.scatter(1, found.tokens, torch.logaddexp(out.gather(1, found.tokens), added.log()))


def mixture_losses(losses: Tensor, said: Tensor, gates: Tensor) -> Tensor:
    """Log-losses (n,) of the mixture, from the model's (n,), the levels' probabilities of the same tokens (n, j), and
    the gates (n, 1 + j)."""
    parts = torch.cat([-losses[:, None], said.clamp(min=1e-30).log()], dim=1)
    return -(parts + gates).logsumexp(-1)
