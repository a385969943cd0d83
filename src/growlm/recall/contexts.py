"""Contexts: what came before the places of a prompt at which its next token is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from growlm.recall.suffixes import LONGEST


@dataclass(frozen=True)
class Contexts:
    """Of places of any shape (...); to index it is to index the places.

    Attributes:
        tokens: (..., l) the newest first; below 0 where there is none.
        repeated: (...) how many of the newest stand earlier in the prompt as well, one after another, up to l: what
            followed there may follow again.
    """

    tokens: Tensor
    repeated: Tensor

    @classmethod
    def of(cls, seen: Tensor, count: int) -> Self:
        """Of the newest `count` places of rows (b, s): (b, count).

        Args:
            seen: token ids, below 0 where a row has none.
        """
        first = seen.shape[1] - count
        start = max(first - LONGEST + 1, 0)
        padded = torch.nn.functional.pad(seen[:, start:], (LONGEST - 1, 0), value=-1)
        if not count:
            return cls(seen.new_empty(len(seen), 0, LONGEST), seen.new_empty(len(seen), 0))
        tokens = padded.unfold(1, LONGEST, 1).flip(-1)[:, first - start :]
        repeated = [[_repeated(row, at) for at in range(first, len(row))] for row in seen.cpu().numpy()]
        return cls(tokens, torch.tensor(repeated, device=seen.device))

    @classmethod
    def joined(cls, parts: Sequence[Contexts]) -> Self:
        """Along the first dimension."""
        return cls(torch.cat([part.tokens for part in parts]), torch.cat([part.repeated for part in parts]))

    def __getitem__(self, places: Any) -> Contexts:
        return Contexts(self.tokens[places], self.repeated[places])

    def flat(self) -> Contexts:
        """With one dimension of places."""
        return Contexts(self.tokens.flatten(0, -2), self.repeated.flatten())


def _repeated(row: np.ndarray, at: int) -> int:
    """How many tokens up to a place stand before it as well."""
    if row[at] < 0:
        return 0
    earlier = np.flatnonzero(row[:at] == row[at])
    length = 0
    while len(earlier) and length < LONGEST:
        length += 1
        if length > at or row[at - length] < 0:
            break
        earlier = earlier[earlier >= length]
        earlier = earlier[row[earlier - length] == row[at - length]]
    return length
