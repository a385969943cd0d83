"""Mixing: one text written or scored by several modules at once, weighted by how well each predicted it so far.

The weights are Bayes' rule over modules, as DEMix layers mix domain experts (Gururangan et al., 2022), with a fixed
share (Herbster and Warmuth, 1998): before every token a small part of the weight goes back to the router's prior, so
that a text may pass from one domain into another. Knows module sets and probabilities; not where modules come from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from growlm.engine.generation import Group, Prefilled, begin_group, step_groups
from growlm.engine.sampling import SamplingConfig, sample
from growlm.modules import ModuleSet
from growlm.modules.scoring import label_losses

# k modules, n tokens, v vocabulary

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


@torch.inference_mode()
def decode_mixed(
    prefilled: Prefilled,
    sets: Sequence[ModuleSet],
    prior: Tensor,
    config: SamplingConfig,
    end_tokens: Collection[int],
    on_token: Callable[[int], bool],
) -> Tensor:
    """Writes the answer to a single prompt with all module sets together; returns their weights at the end, (k,)."""
    base = sets[0].base
    joint = min(s.fork for s in sets)
    prompt = prefilled.input_ids[0]
    posterior = Posterior(prior.to(base.device))
    running, log_probabilities, losses = [], [], []
    first = torch.zeros(1, dtype=torch.long, device=base.device)
    for number, modules in enumerate(sets):
        state, hidden = begin_group(prefilled, Group(modules, [0]), first, joint, number)
        running.append(state)
        log_probabilities.append(state.project(hidden, prefilled.seen)[0, -1].float().log_softmax(-1))
        before = modules.contexts(prefilled.seen[:, :-1], len(prompt) - 1)
        losses.append(label_losses(modules, hidden[0, :-1], prompt[1:], None if before is None else before[0]))
    for column in torch.stack(losses).T:
        posterior.update(-column)
    prefix = prefilled.cache.select(first.expand(len(sets)), 0, joint)
    generator = [torch.Generator(base.device).manual_seed(config.seed)]
    length, seen = prefilled.input_ids.shape[1], prefilled.seen.expand(len(sets), -1)
    for count in range(1, config.max_new_tokens + 1):
        each = torch.stack(log_probabilities)
        token = sample(posterior.mix(each)[None], config, generator)
        if int(token) in end_tokens or not on_token(int(token)) or count == config.max_new_tokens:
            break
        posterior.update(each[:, int(token)])
        seen = torch.cat([seen, token.expand(len(sets))[:, None]], dim=1)
        logits = step_groups(base, seen, joint, prefix, running, past=length, visible=None)
        log_probabilities = [part[0, -1].float().log_softmax(-1) for part in logits]
        length += 1
    return posterior.weights
