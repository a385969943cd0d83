"""Pools: how many of a layer's very many experts a text retrieves, and how evenly.

Watches retrievals while text is read; changes nothing. Knows product keys, not expert routers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from growlm.base.padding import pad_right
from growlm.layers.product_keys import ProductKeys, retrievals
from growlm.modules import ModuleSet
from growlm.progress import track

_BATCH = 8


@dataclass(frozen=True)
class PoolCounts:
    """What a text retrieved by one layer's product keys.

    Attributes:
        counts: (num_experts,) int64, how often every expert was retrieved.
        gates: (num_experts,) float64, the sum of the gates that it had.
    """

    layer: int
    counts: Tensor
    gates: Tensor

    @property
    def name(self) -> str:
        return f"layer {self.layer} product keys"

    @property
    def num_experts(self) -> int:
        return len(self.counts)

    @property
    def share_used(self) -> float:
        """Of the experts, those that were retrieved at all. A short text cannot reach a large pool's."""
        return float((self.counts > 0).double().mean())

    @property
    def unevenness(self) -> float:
        """KL divergence of the accumulated gates from uniform, in nats: 0 where all experts weigh alike."""
        share = self.gates / self.gates.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return float(math.log(self.num_experts) + torch.xlogy(share, share).sum())

    def line(self) -> str:
        return (
            f"{self.name:<22} {self.num_experts:,} experts, {self.share_used:.1%} used, "
            f"KL from uniform {self.unevenness:.3f} nats"
        )


class PoolCounter:
    """Counts what a module set retrieves, one forward pass after another.

    Attributes:
        pools: one for every layer of product keys that ran, in the order of the forward pass; empty before the first.
    """

    def __init__(self, modules: ModuleSet) -> None:
        self.pools: list[PoolCounts] = []
        self._layers = {id(layer): index for index, (layer, *_) in enumerate(modules.layers)}
        parts = (modules.base.model, *modules.modules)
        self._keys = {id(m) for part in parts for m in part.modules() if isinstance(m, ProductKeys)}

    def __bool__(self) -> bool:
        """Whether there is anything to count."""
        return bool(self._keys)

    @contextmanager
    def counting(self, real: Tensor) -> Iterator[None]:
        """Counts the one forward pass within it. `real` (tokens,) is false for padding."""
        layer, asked = 0, []

        def before(module: nn.Module, _: object) -> None:
            nonlocal layer
            layer = self._layers.get(id(module), layer)
            if isinstance(module, ProductKeys) and id(module) in self._keys:
                asked.append((layer, module.num_experts))

        # A retrieval does not say whose it is, and layers may hold others' product keys: who runs is watched as well.
        hook = register_module_forward_pre_hook(before)
        try:
            with retrievals() as found:
                yield
        finally:
            hook.remove()
        if not self.pools:
            self.pools = [
                PoolCounts(index, torch.zeros(n, dtype=torch.int64), torch.zeros(n).double()) for index, n in asked
            ]
        for pool, retrieval in zip(self.pools, found, strict=True):
            experts = retrieval.experts.cpu()[real].flatten()
            pool.counts.add_(torch.bincount(experts, minlength=pool.num_experts))
            pool.gates.index_add_(0, experts, retrieval.gates.cpu()[real].flatten().double())


@torch.no_grad()
def count_pools(modules: ModuleSet, passages: Sequence[Sequence[int]]) -> list[PoolCounts]:
    """What passages of token ids retrieve; empty for a model without product keys, which is then not run."""
    counter = PoolCounter(modules)
    if counter:
        order = sorted(passages, key=len)
        for start in track(range(0, len(order), _BATCH), "counting use of experts", "batches"):
            ids, real = pad_right(order[start : start + _BATCH])
            with counter.counting(real.flatten()):
                modules.hidden(ids.to(modules.base.device))
    return counter.pools
