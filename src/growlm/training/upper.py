"""Upper: the layers above the fork with one module, by weights that are given with each call.

Knows a module set; nothing of losses, text or optimisers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from growlm.base import Base, LayerToRun, Pass
from growlm.modules import ModuleSet

# b batch, t tokens, d hidden size


class Upper(nn.Module):
    """What runs above the fork, by weights that are given with each call."""

    def __init__(self, modules: ModuleSet) -> None:
        super().__init__()
        self.module = modules.modules[0]
        self._set = modules

    def forward(self, compute: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        return compute(given)

    def states(self, given: Tensor, weights: dict[str, Tensor], *, recompute: bool = False) -> Tensor:
        """What runs above the fork: features (b, t, d), or token ids (b, t) at fork 0, to final states (b, t, d).

        Args:
            weights: in place of the module's own.
            recompute: keep the layers' inputs alone for the backward pass.
        """
        base, fork = self._set.base, self._set.fork

        def run(compute: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
            return torch.func.functional_call(self, weights, (compute, hidden))

        if fork == 0:
            hidden, shared = base.begin(given)
            hidden = run(lambda h: base.embed_positions(self._set.embed(h, given), shared.positions), hidden)
        else:
            hidden, shared = given, base.pass_for(given, torch.arange(given.shape[1], device=given.device)[None])
        if not recompute:
            return base.norm(run(lambda h: base.run(h, self._set.layers[fork:], shared), hidden))
        for layer in self._set.layers[fork:]:
            one = partial(run, partial(_one, base, layer, shared))
            hidden = checkpoint(one, hidden, use_reentrant=False, context_fn=self._once)
        return base.norm(hidden)

    def _once(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For a layer that is computed and computed once more: statistics count its batch once."""
        return nullcontext(), unchanged(dict(self.module.named_buffers()))


def _one(base: Base, layer: LayerToRun, shared: Pass, hidden: Tensor) -> Tensor:
    return base.run(hidden, [layer], shared)


@contextmanager
def unchanged(buffers: Mapping[str, Tensor]) -> Iterator[None]:
    """They are afterwards what they were before, whatever is computed inside."""
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in buffers.items():
                tensor.copy_(before[name])
