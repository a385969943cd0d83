"""What the base says of a text: its hidden states after some layer, and one vector a text made of them.

Knows token ids only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from growlm.base.padding import pad_left

if TYPE_CHECKING:
    from growlm.base import Base

# b batch, t tokens, d hidden size


def mean_pool(hidden: Tensor, visible: Tensor | None = None) -> Tensor:
    """One vector a text: the mean over tokens of (b, t, d), scaled to root mean square 1; (b, d) float32.

    The first token is left out of texts that have another: attention parks on it, and its state says little.
    """
    hidden = hidden.float()
    batch, tokens, _ = hidden.shape
    seen = torch.ones(batch, tokens, dtype=torch.bool) if visible is None else visible.bool()
    seen = seen.to(hidden.device)
    first = seen & (seen.cumsum(-1) == 1)
    seen = torch.where(seen.sum(-1, keepdim=True) > 1, seen & ~first, seen)
    mean = (hidden * seen[..., None]).sum(1) / seen.sum(-1, keepdim=True)
    return mean * torch.rsqrt(mean.square().mean(-1, keepdim=True) + 1e-12)


@torch.no_grad()
def base_states(base: Base, texts: Sequence[Sequence[int]], layer: int | None) -> tuple[Tensor, Tensor | None]:
    """The base's states (b, t, d) for token ids padded on the left, and which are visible.

    Args:
        layer: after how many layers; None: after all of them and the final norm.
    """
    input_ids, visible = pad_left(texts, base.device)
    hidden, shared = base.begin(input_ids, visible=visible)
    hidden = base.run(base.embed_positions(hidden, shared.positions), base.layers_to_run(0, layer), shared)
    return (base.norm(hidden) if layer is None else hidden), visible
