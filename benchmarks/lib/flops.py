"""FLOPs of a model's forward pass, counted while it runs; a product and its sum are two.

Matrix products and attention are counted by torch's FlopCounterMode, as if every key were read; that includes the
products of queries with sub-keys, which are matrix products like others. It does not know three things, for which there
are formulas here: grouped products, attention as the processor has it, and rows of tables, of which the number that was
read is watched and each is multiplied once by a token (`up`) or by a gate (`down`, `values`). Adding, activations,
norms, sorting and top-k count for nothing, in every kind of model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from growlm.layers import PEER, ProductKeyMemory, retrievals
from growlm.model import GrowlmConfig, GrowlmForCausalLM


def _grouped(rows: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """(rows, in), (e, in, out): a row meets one expert's matrix."""
    return 2 * rows[0] * weight[1] * weight[2]


def _grouped_backward(grad: Sequence[int], rows: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Gradients of rows and of weights: as many products as forward, each."""
    return 2 * _grouped(rows, weight)


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


FORMULAS = {
    torch.ops.growlm.grouped_product: _grouped,
    torch.ops.growlm.grouped_product_backward: _grouped_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}


def row_flops(layer: PEER | ProductKeyMemory, retrieved: int) -> int:
    """Of `retrieved` experts' rows: every number of theirs is read, multiplied and added once."""
    return 2 * retrieved * sum(table.shape[1] for table in layer.parameters(recurse=False))


@torch.no_grad()
def forward_flops(model: nn.Module, length: int) -> float:
    """Of a token, mean over a text of `length` tokens, for a model with softmax attention."""
    tables = [m for m in model.modules() if isinstance(m, PEER | ProductKeyMemory)]
    ids = torch.zeros(1, length, dtype=torch.long, device=next(model.parameters()).device)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter, retrievals() as found:
        model.eval()(ids, use_cache=False)
    total = counter.get_total_flops()
    total += sum(row_flops(layer, r.experts.numel()) for layer, r in zip(tables, found, strict=True))
    return total / length


def config_flops(config: GrowlmConfig, length: int) -> float:
    """`forward_flops` of a model that is not made: shapes alone are followed, whatever its size."""
    with FakeTensorMode():
        return forward_flops(GrowlmForCausalLM(config), length)
