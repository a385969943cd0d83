"""Memory: what a module carries of a domain's text, and how it changes the next token's distribution.

Nothing is trained but a few dozen gates (`growlm.layers.recall`). Knows logits and the tokens before them; no layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from growlm.errors import ConfigError, IntegrityError
from growlm.layers.recall import FEATURES, LEVELS, NOTHING, Recalled, mixed, recalled
from growlm.recall.contexts import Contexts
from growlm.recall.text import Found, Place, RecalledText

_AT_A_TIME = 512  # contexts that are looked up together
_FORMER = 8  # features that there were
_LARGEST = 1e4  # that a gate may be: those that are fitted are a thousand times smaller


def widened(gates: Tensor) -> Tensor:
    """Gates of a module that was learned when there were fewer features: the others count for nothing."""
    return torch.nn.functional.pad(gates, (0, FEATURES - _FORMER)) if gates.shape == (len(LEVELS), _FORMER) else gates


@dataclass(frozen=True)
class Origin:
    """Where a token may come from.

    Attributes:
        share: of the token's probability that is the text's and not the model's.
        length: tokens before it that stand there too.
    """

    share: float
    length: int
    place: Place


class Memory(nn.Module):
    """The memory that a module carries: gates that are part of its weights, and text beside them.

    Attributes:
        gates: (levels, features); what the first of a level is -inf counts for nothing.
        text: None until it is given: a module without it cannot run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.zeros(len(LEVELS), FEATURES), requires_grad=False)
        self.text: RecalledText | None = None

    @torch.no_grad()
    def close(self) -> None:
        """Nothing is recalled: the logits are what they were, bit for bit."""
        self.gates.zero_()[:, 0] = NOTHING

    @property
    def active(self) -> bool:
        """Whether any gate is open."""
        return bool(self.gates[:, 0].isfinite().any())

    def require_numbers(self, where: str) -> None:
        """
        Raises:
            IntegrityError: a gate is no finite number, nor what closes a level.
        """
        closed = self.gates[:, :1].isneginf()
        if not bool((self.gates.isfinite() & (self.gates.abs() <= _LARGEST) | closed).all()):
            raise IntegrityError(f"{where}: its gates are no numbers; restore the file or learn the module again")

    def recalled(self, log_probabilities: Tensor, contexts: Contexts) -> Recalled:
        """What the text says of the next tokens, where the model says (n, v), after contexts (n,)."""
        return _weighed(log_probabilities, self._find(contexts), contexts)

    def mix(self, logits: Tensor, contexts: Contexts) -> Tensor:
        """Log-probabilities (..., v) in float32 of model and text, from the model's logits (..., v).

        Args:
            contexts: (...) the tokens before each of them.
        """
        flat, before = logits.flatten(0, -2), contexts.flat()
        out = torch.empty(flat.shape, dtype=torch.float32, device=flat.device)
        for at in range(0, len(flat), _AT_A_TIME):
            own = flat[at : at + _AT_A_TIME].float().log_softmax(-1)
            found = self.recalled(own, before[at : at + _AT_A_TIME])
            out[at : at + _AT_A_TIME] = mixed(own, found, self.gates)
        return out.view(logits.shape)

    def origins(self, logits: Tensor, contexts: Contexts, tokens: Tensor) -> list[Origin | None]:
        """Where tokens (n,) may come from that were written after contexts (n,), where the model alone had logits
        (n, v); None for one that stands nowhere after such a context."""
        own, found = logits.float().log_softmax(-1), self._find(contexts)
        said = _weighed(own, found, contexts)
        gates = said.gates(self.gates.float()).exp()
        theirs = (gates[:, 1:] * said.probability(tokens)).sum(-1)
        shares = theirs / (theirs + gates[:, 0] * own.gather(1, tokens[:, None])[:, 0].exp())
        origins: list[Origin | None] = []
        following = (-1, -1)  # part and place after the token before
        for row, (token, share) in enumerate(zip(tokens.tolist(), shares.tolist(), strict=True)):
            where = np.flatnonzero((found.tokens[row] == token) & (found.lengths[row] > 0))
            if not len(where):
                origins.append(None)
                continue
            places = [(int(found.parts[row, at]), int(found.places[row, at]) + 1) for at in where]
            # Where the token before it stood, if it goes on there; else what agrees longest, which comes first.
            best = places.index(following) if following in places else 0
            part, at = places[best]
            following = part, at + 1
            assert self.text is not None
            origins.append(Origin(share, int(found.lengths[row, where[best]]), self.text.place(part, at)))
        return origins

    def _find(self, contexts: Contexts) -> Found:
        if self.text is None:
            raise ConfigError("a module that recalls has no text; load it from a store")
        return self.text.find(contexts.tokens.cpu().numpy())


def _weighed(log_probabilities: Tensor, found: Found, contexts: Contexts) -> Recalled:
    lengths, tokens = (torch.from_numpy(array).to(log_probabilities.device) for array in (found.lengths, found.tokens))
    return recalled(log_probabilities, lengths, tokens, contexts.repeated.to(log_probabilities.device))
