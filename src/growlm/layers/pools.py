"""Pools of tiny experts at a frozen feed-forward: beside it, or in its place (PEER).

A pool in place of a feed-forward is first trained to compute what that computes: within `imitation`, layers run the
frozen part and say how far the pool is from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from growlm.layers.around import Around
from growlm.layers.collecting import Collector

_errors: Collector[Tensor] = Collector("imitation")


def imitation() -> AbstractContextManager[list[Tensor]]:
    """Within it, pools in place of a feed-forward are beside the forward pass: the frozen part's output goes on, and
    every pool adds to the list that this yields the mean square of its error, over the mean square of what it should
    have given."""
    return _errors.open()


class WithPools(Around):
    """Called as the feed-forward (..., d) -> (..., d) that it stands for.

    Args:
        frozen: that feed-forward; held outside of `nn.Module`'s registry, since it is not this one's to train or save.
        beside: pools whose results are added.
        instead: pools in its place; of several the mean counts, since each alone gives about what it gave.
    """

    def __init__(self, frozen: nn.Module, beside: Sequence[nn.Module], instead: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self._frozen, self._beside, self._instead = (frozen,), tuple(beside), tuple(instead)

    @property
    def frozen(self) -> nn.Module:
        return self._frozen[0]

    @property
    def reads_frozen(self) -> bool:
        return not self._instead or _errors.is_open

    def finish(self, hidden: Tensor, plain: Tensor | None) -> Tensor:
        if plain is not None:
            out = plain
            for pool in self._instead if _errors.is_open else ():
                _errors.add(_error(pool(hidden.detach()), out.detach()))
        else:
            out = self._instead[0](hidden)
            if len(self._instead) > 1:
                out = torch.stack([out, *(pool(hidden) for pool in self._instead[1:])]).mean(0)
        for pool in self._beside:
            out = out + pool(hidden)
        return out


def _error(given: Tensor, wanted: Tensor) -> Tensor:
    wanted = wanted.float()
    size = wanted.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (given.float() - wanted).square().mean() / size
