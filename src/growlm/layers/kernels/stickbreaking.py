"""Stick-breaking attention in Triton: forward, backward, and decode split over keys.

What `growlm/layers/stickbreaking.py` computes; the kernels are in `stickbreaking_kernels.py`. Nothing here waits for
the device.

Backward, without atomics, so that the same input gives the same bits: `query_gradient` walks as the forward does and
stores what of every stick is gone, and the sum of a_i so far, where it enters a block of keys; with these
`key_value_gradients` goes through the queries of one block of keys. The alternative, to walk again for every block of
keys, is cubic. That is 8 bytes a query, head and block of keys, thus quadratic; so queries go band by band, each band's
states within `STATE_BYTES`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from growlm.layers.kernels.stickbreaking_kernels import (
    combine_kernel,
    decode_kernel,
    forward_kernel,
    key_value_gradients_kernel,
    query_gradient_kernel,
)

# b batch, h heads of queries, g heads of keys and values, n = h / g, t queries, s keys, d head width, e width of values

STATE_BYTES = 1 << 28  # of what the backward pass stores for one band of queries
MAX_WIDTH = 256  # of heads and values
MAX_DECODE_ROWS = {True: 64, False: 16}  # n t, of inputs of 16 bits or 32, up to which keys are split
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LOG2E = math.log2(math.e)


class Blocks(NamedTuple):
    """How a kernel is cut."""

    rows: int
    keys: int
    warps: int
    stages: int
    chunk: int = 8  # blocks between two looks at whether all is used up: a loop of known length is prefetched


# By kernel and whether inputs have 16 bits: the widest head (or values) and its blocks. A warp group's product takes 64
# rows, of warps all along the rows. Blocks are as large as registers allow: compiled for Hopper, at most a few hundred
# bytes of them are kept in memory (`tests/test_kernels_stickbreaking.py` says how many), but for the gradients of the
# widest heads in float32, whose products unroll over the width. None of this was timed.
_TABLE: dict[tuple[str, bool], list[tuple[int, Blocks]]] = {
    ("forward", True): [(64, Blocks(128, 64, 8, 3)), (128, Blocks(128, 64, 8, 2)), (256, Blocks(32, 32, 8, 2))],
    ("forward", False): [(64, Blocks(32, 32, 4, 2)), (128, Blocks(32, 32, 8, 1)), (256, Blocks(16, 16, 8, 1))],
    ("backward", True): [(64, Blocks(64, 32, 4, 2)), (128, Blocks(64, 32, 4, 2)), (256, Blocks(32, 32, 8, 1))],
    ("backward", False): [(64, Blocks(32, 32, 8, 1)), (128, Blocks(16, 16, 8, 1)), (256, Blocks(16, 16, 8, 1))],
    ("decode", True): [(64, Blocks(16, 64, 4, 3)), (128, Blocks(16, 64, 4, 3)), (256, Blocks(16, 64, 8, 2))],
    ("decode", False): [(64, Blocks(16, 32, 4, 2)), (128, Blocks(16, 32, 4, 2)), (256, Blocks(16, 16, 8, 1))],
}


def blocks(kernel: str, query: Tensor, value: Tensor) -> Blocks:
    """How `forward`, `backward` or `decode` is cut for these inputs."""
    width = max(query.shape[-1], value.shape[-1])
    return next(cut for widest, cut in _TABLE[kernel, query.dtype != torch.float32] if width <= widest)


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernels take these inputs."""
    same = query.dtype in DTYPES and key.dtype == query.dtype and value.dtype == query.dtype
    return same and 1 <= query.shape[-1] <= MAX_WIDTH and 1 <= value.shape[-1] <= MAX_WIDTH


class _Call:
    """Arguments that the kernels of one call share."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, documents: Tensor | None
    ) -> None:
        self.query, self.key, self.value = (_rows(x) for x in (query, key, value))
        self.b, self.h, self.t, self.d = query.shape
        self.g, self.s, self.e = value.shape[1:]
        self.n = self.h // self.g
        self.scale = scale
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.documents: Tensor | None = None
        self.starts: Tensor | None = None
        self.ends: Tensor | None = None
        if documents is not None:
            self.documents, self.starts, self.ends = _bounds(documents)

    def strides(self, *tensors: Tensor) -> tuple[int, ...]:
        """Of all but the last dimension; and those of the mask."""
        mask = (0, 0, 0) if self.mask is None else (self.mask.stride(0), *self.mask.stride()[2:])
        return (*(stride for x in tensors for stride in x.stride()[:3]), *mask)

    def constants(self, cut: Blocks) -> dict[str, Any]:
        return {
            "D": self.d,
            "E": self.e,
            "WIDE_D": max(16, triton.next_power_of_2(self.d)),  # a matrix product takes 16 at least
            "WIDE_E": max(16, triton.next_power_of_2(self.e)),
            "ROWS": cut.rows,
            "KEYS": cut.keys,
            "CHUNK": cut.chunk,
            "MASK": 0 if self.mask is None else 1 if self.mask.shape[2] == 1 else 2,
            "DOCUMENTS": self.documents is not None,
            "NARROW": self.query.dtype != torch.float32,
            "num_warps": cut.warps,
            "num_stages": cut.stages,
        }


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _bounds(documents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(b, s) each: the documents, where every token's begins, and where it ends. Where they are not in order, all may
    see all that their numbers allow: 0 and s. Nothing is read back from the device."""
    documents = documents.contiguous()
    ordered = (documents[:, 1:] >= documents[:, :-1]).all(1, keepdim=True)
    starts = torch.searchsorted(documents, documents, out_int32=True)
    ends = torch.searchsorted(documents, documents, right=True, out_int32=True)
    return documents, starts * ordered, ends.masked_fill_(~ordered, documents.shape[1])


def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    # Said, since what Triton does unasked changes with its release.
    kernel[(programs,)](*arguments, **constants, enable_fp_fusion=True)


def _on(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of several devices, that of the queries is the one that kernels run on."""

    @functools.wraps(function)
    def on(*arguments: Any, **options: Any) -> Any:
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        if device.type != "cuda":
            return function(*arguments, **options)
        with torch.cuda.device(device):
            return function(*arguments, **options)

    return on


@_on
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    cut: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (b, h, t, e), and the same in float32: of float32 inputs, the output itself.

    Arguments are those of `stickbreaking_attention`; the mask is of type bool and (b, 1, 1 or t, s).
    """
    call = _Call(query, key, value, scale, mask, documents)
    out, exact = _outputs(call)
    if out.numel():
        cut = cut or blocks("forward", query, value)
        launch(
            forward_kernel,
            call.b * call.h * triton.cdiv(call.t, cut.rows),
            (call.query, call.key, call.value, out, exact, call.mask, call.documents, call.starts,
             scale * _LOG2E, call.t, call.s, call.h, call.n, *call.strides(call.query, call.key, call.value)),
            call.constants(cut),
        )  # fmt: skip
    return out, exact


def _outputs(call: _Call) -> tuple[Tensor, Tensor]:
    out = call.query.new_empty(call.b, call.h, call.t, call.e)
    return out, out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)


@_on
def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    cut: Blocks | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`forward` for few queries of many keys (n t up to MAX_DECODE_ROWS), which are split between programs."""
    call = _Call(query, key, value, scale, mask, documents)
    out, exact = _outputs(call)
    if not out.numel():
        return out, exact
    cut = cut or blocks("decode", query, value)
    rows = call.n * call.t
    number = triton.cdiv(call.s, cut.keys)
    if splits is None:
        splits = _splits(call, cut)
    span = triton.cdiv(number, splits)
    splits = triton.cdiv(number, span)
    parts = torch.empty(call.b, call.g, rows, splits, call.e, dtype=torch.float32, device=query.device)
    gone = parts.new_empty(call.b, call.g, rows, splits)
    constants = call.constants(cut)
    launch(
        decode_kernel,
        call.b * call.g * splits,
        (call.query, call.key, call.value, parts, gone, call.mask, call.documents, call.starts, scale * _LOG2E,
         call.t, call.s, call.g, call.n, span, splits, *call.strides(call.query, call.key, call.value)),
        constants | {"ROWS": max(cut.rows, triton.next_power_of_2(rows))},
    )  # fmt: skip
    launch(
        combine_kernel,
        call.b * call.h * call.t,
        (parts, gone, out, exact, splits),
        {"E": call.e, "WIDE_E": constants["WIDE_E"], "SPLITS": 16, "NARROW": constants["NARROW"], "num_warps": 4},
    )
    return out, exact


def _splits(call: _Call, cut: Blocks) -> int:
    """Enough for two programs a multiprocessor, of four blocks of keys at least."""
    device = call.query.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = triton.cdiv(2 * processors, call.b * call.g)
    return max(1, min(wanted, call.s // (4 * cut.keys)))


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`decode` where queries are few and keys many, else `forward`."""
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    few = (
        0 < rows <= MAX_DECODE_ROWS[query.dtype != torch.float32]
        and key.shape[2] >= 8 * blocks("decode", query, value).keys
    )
    return (decode if few else forward)(query, key, value, scale, mask, documents)


@_on
def backward(
    grad: Tensor,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    cut: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; `grad` (b, h, t, e), and `out` in float32 as `forward` returns it."""
    call = _Call(query, key, value, scale, mask, documents)
    grad, out = _rows(grad.to(query.dtype)), out.contiguous()
    cut = cut or blocks("backward", query, value)
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    if not grad.numel():
        return grad_query.zero_(), torch.zeros_like(key), torch.zeros_like(value)
    number = triton.cdiv(call.s, cut.keys)
    rows = STATE_BYTES // (8 * call.b * call.h * number) // cut.rows * cut.rows
    bands = range(0, call.t, min(max(rows, cut.rows), call.t))
    whole = len(bands) == 1
    kind = None if whole else torch.float32
    make = torch.empty_like if whole else torch.zeros_like
    grad_key, grad_value = (make(x, dtype=kind, memory_format=torch.contiguous_format) for x in (key, value))
    constants = call.constants(cut)
    for band in bands:
        stop = min(band + bands.step, call.t)
        states = triton.cdiv(call.s - call.t + stop, cut.keys)
        wholes = torch.empty(call.b * call.h, stop - band, dtype=torch.float32, device=query.device)
        entered, newest = wholes.new_empty(2, call.b * call.h, states, stop - band).unbind()
        reached = wholes.new_empty(call.b * call.h, triton.cdiv(stop - band, cut.rows), dtype=torch.int32)
        kept = (wholes, entered, newest, reached, call.mask, call.documents)
        strides = call.strides(call.query, call.key, call.value, grad)
        launch(
            query_gradient_kernel,
            call.b * call.h * triton.cdiv(stop - band, cut.rows),
            (call.query, call.key, call.value, grad, out, grad_query, *kept, call.starts,
             scale * _LOG2E, scale, call.t, call.s, call.h, call.n, band, stop, states, *strides),
            constants,
        )  # fmt: skip
        launch(
            key_value_gradients_kernel,
            call.b * call.g * states,
            (call.query, call.key, call.value, grad, grad_key, grad_value, *kept, call.ends,
             scale * _LOG2E, scale, call.t, call.s, call.g, call.n, band, stop, states, *strides),
            constants | {"WALKED": cut.rows, "ADD": not whole},
        )  # fmt: skip
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)
