"""Writing: what the branches of requests have come to -> their next tokens, and how likely a prompt was.

Knows requests that run, module sets and samplers; not who has a place, nor when a pass is run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from growlm.base import Base
from growlm.engine.request import Branch, Request
from growlm.engine.runner import Runner, Work, come_to
from growlm.engine.sampling import token_logprobs
from growlm.modules.scoring import label_losses
from growlm.recall.contexts import Contexts

# k branches, n tokens, v vocabulary

_AT_A_TIME = 64  # tokens of a prompt whose logits are held


class Writer:
    """Writes with one base.

    Args:
        end_tokens: that end an answer; they are no part of it.
    """

    def __init__(self, base: Base, runner: Runner, end_tokens: set[int]) -> None:
        self._base, self._runner = base, runner
        self.end_tokens = end_tokens

    def logits(self, branches: Sequence[tuple[Branch, Request]]) -> dict[Branch, Tensor]:
        """Logits (n, v) after the newest token of each branch, and after each of its drafts."""
        by_set: dict[str, list[tuple[Branch, Request]]] = {}
        for branch, request in branches:
            by_set.setdefault(branch.modules.digest, []).append((branch, request))
        rows = []
        for own in by_set.values():
            modules, contexts = own[0][0].modules, None
            if modules.memories:
                contexts = Contexts.joined([self._contexts(request) for _, request in own])
            states = [branch.newest for branch, _ in own if branch.newest is not None]
            rows.append((modules, torch.cat(states), contexts))
        found: dict[Branch, Tensor] = {}
        for own, logits in zip(by_set.values(), self._runner.logits(rows), strict=True):
            sizes = [1 + len(request.drafts) for _, request in own]
            found.update(zip((branch for branch, _ in own), logits.split(sizes), strict=True))
        return found

    def _contexts(self, request: Request) -> Contexts:
        """(n,) up to the newest token, and up to each draft."""
        drafts = len(request.drafts)
        ids = [*request.ids(0, request.read - drafts), *request.drafts]
        return Contexts.of(torch.from_numpy(np.array([ids])), 1 + drafts)[0]

    def read_prompt(self, request: Request, works: Sequence[Work], start: int) -> None:
        """Takes in how well each branch predicted the tokens of the prompt that it has just read: into the mixture's
        weights, or as log-probabilities, where they are asked for."""
        if start >= len(request.tokens) or (request.mixture is None and request.config.prompt_logprobs is None):
            return
        if request.mixture is None and request.answer.tokens:  # another module reads it again
            return
        seen = torch.tensor([request.tokens[: start + len(works[0].ids) + 1]], device=self._base.device)
        count = seen.shape[1] - 1 - start  # the prompt's last token has none behind it
        losses = []
        for branch, work in zip(request.branches, works, strict=True):
            contexts = branch.modules.contexts(seen[:, :-1], count)
            own, hidden = None if contexts is None else contexts[0], come_to(work)[0, :count]
            if request.mixture is None:
                self._score(request, branch, hidden, seen[0, start + 1 :], own)
            else:
                losses.append(label_losses(branch.modules, hidden, seen[0, start + 1 :], own))
        if request.mixture is not None:
            for column in torch.stack(losses).T:
                request.mixture.update(-column)

    def _score(
        self, request: Request, branch: Branch, hidden: Tensor, labels: Tensor, contexts: Contexts | None
    ) -> None:
        assert request.config.prompt_logprobs is not None
        for at in range(0, len(labels), _AT_A_TIME):
            part = slice(at, at + _AT_A_TIME)
            logits = branch.modules.project(hidden[part], None if contexts is None else contexts[part])
            request.prompt_logprobs += token_logprobs(logits, labels[part].tolist(), request.config.prompt_logprobs)

    def write(self, request: Request, each: Tensor) -> bool:
        """The next token, from the branches' logits (k, v); returns whether the answer goes on."""
        assert request.sampler is not None
        if request.mixture is None:
            token = request.sampler.choose(each[0])
        else:
            each = each.float().log_softmax(-1)
            token = request.sampler.choose(request.mixture.mix(each))
        if token in self.end_tokens or not request.answer.add(token):
            return False
        if len(request.answer.tokens) == request.config.max_new_tokens:
            return False
        if request.mixture is not None:
            request.mixture.update(each[:, token])
        return True
