"""Sharding: the layers of a model in parts, one on each rank, for a model that is too large for one device.

A layer is gathered where it runs and let go after it, and again in the backward pass (FSDP2's `fully_shard`; Zhao et
al. 2023). Of a layer that is trained, gradients and optimiser state are in parts as well. Embedding, final norm and
head stay whole on every rank: not only the layers' own passes read them. So do tables of experts, whose gradients are
sparse.

Rank 0 may compute alone: what it gathers it calls by the layer's number, and the others, who wait for its word, give
their parts (`Ranks.calls`). Knows a base and ranks; nothing of modules or of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, share_comm_ctx
from torch.distributed.tensor import DTensor

from growlm.base import Base
from growlm.base.placement import Placement
from growlm.layers.peer import PEER, ProductKeyMemory
from growlm.training.parallel import Ranks, peers

# As it is called from torch 2.13 on, or before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Exchange:
    """Memory for what ranks give one another."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Exchange):
    """How a layer is gathered, as `FSDPModule.set_custom_all_gather` takes it: rank 0 calls the others first."""

    def __init__(self, ranks: Ranks, number: int) -> None:
        self._ranks, self._number = ranks, number

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        if self._ranks.first:
            self._ranks.calls.call(self._number)
        with peers():
            return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


class _Scatter(_Exchange):
    """How gradients of a layer are summed, each rank's part of them, as `FSDPModule.set_custom_reduce_scatter` takes
    it."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        with peers():
            return _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def parallelize(base: Base, placement: Placement, ranks: Ranks) -> None:
    """Moves a base from main memory to this rank's device, in place: all of it but its layers, and its part of these.

    Frozen weights get the dtype of the placement, trained ones keep theirs. What a layer computes is what the whole one
    computes, to the bit. The gradient of a trained layer is the sum of all ranks', of which each has its part.

    Args:
        base: in main memory.
        ranks: several, of which each calls this with the same base.
    """
    mesh = init_device_mesh(placement.device.type, (ranks.size,))
    for number, layer in enumerate(base.layers):
        for p in layer.parameters():  # buffers stay as exact as they are served
            if not p.requires_grad:
                p.data = p.data.to(placement.dtype)
        # Moves the layer to the device first: one layer at a time is there as a whole.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=_tables(layer))
        assert isinstance(layer, FSDPModule)
        layer.set_gradient_divide_factor(1)  # a rank's loss is weighted by its share already
        layer.set_force_sum_reduction_for_comms(True)  # gloo has no other
        layer.set_custom_all_gather(_Gather(ranks, number))  # type: ignore[arg-type]
        layer.set_custom_reduce_scatter(_Scatter())  # type: ignore[arg-type]
        # Of itself, which is none: by default it would be of what ran before, which of rank 0 is more than of others.
        layer.set_modules_to_backward_prefetch([layer])
    share_comm_ctx([layer for layer in base.layers if isinstance(layer, FSDPModule)])
    for p in base.model.parameters():
        if not isinstance(p, DTensor):
            p.data = p.data.to(placement.device, p.dtype if p.requires_grad else placement.dtype)
    for module in base.model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(placement.device)

    def answer(number: int) -> None:
        layer = base.layers[number]
        assert isinstance(layer, FSDPModule)
        layer.unshard()
        layer.reshard()

    ranks.calls.answered = answer
    with ranks.jointly():  # the tensors that layers are gathered into are made outside of inference mode
        for number in range(base.num_layers):
            answer(number)


@torch.no_grad()
def gather(base: Base, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's own tensors by their names in it, whole and in main memory. Rank 0 alone asks, while the others wait
    for its word; a layer at a time is on its device as a whole."""
    found: dict[str, Tensor] = {}
    for prefix, layer in base.model.named_modules():
        if isinstance(layer, FSDPModule):
            assert isinstance(layer, nn.Module)
            layer.unshard()
            for name, p in layer.named_parameters(prefix):
                if isinstance(tensors.get(name), DTensor):
                    found[name] = p.to("cpu", copy=True)
            layer.reshard()
    moved: dict[int, Tensor] = {}  # a tensor of two names stays one
    for name, tensor in tensors.items():
        if name not in found:
            found[name] = moved.setdefault(id(tensor), tensor.detach().cpu())
    return found


def _tables(layer: nn.Module) -> set[nn.Parameter]:
    """What has sparse gradients."""
    pools = [m for m in layer.modules() if isinstance(m, PEER | ProductKeyMemory)]
    return {p for pool in pools for p in pool.parameters(recurse=False)}
