"""Padding: texts of several lengths as one batch, and where it is theirs. Knows token ids only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# b batch, t tokens


def pad_left(texts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
    """Token ids (b, t) padded on the left with id 0, and (b, t) bool, False where padded; None if nowhere."""
    ids = pad_sequence(_rows(texts), batch_first=True, padding_side="left")
    visible = _real(texts, ids.shape[1]).flip(-1)
    return ids.to(device), None if visible.all() else visible.to(device)


def pad_right(texts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids (b, t) padded on the right with id 0, and (b, t) bool, False where padded.

    The base needs no mask for them: attention is causal, so that no token sees the padding behind it.
    """
    ids = pad_sequence(_rows(texts), batch_first=True)
    return ids.to(device), _real(texts, ids.shape[1]).to(device)


def _rows(texts: Sequence[Sequence[int]]) -> list[Tensor]:
    return [torch.tensor(text, dtype=torch.long) for text in texts]


def _real(texts: Sequence[Sequence[int]], longest: int) -> Tensor:
    return torch.arange(longest) < torch.tensor([len(text) for text in texts])[:, None]
