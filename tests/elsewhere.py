"""A pretended GPU: the processor's memory, which torch and all that asks it takes for `cuda`.

Within `pretended()`, what is put on `cuda` is marked by its storage, and so is what is computed from it. An operation
that mixes it with tensors of the processor raises, as it would there; so does `numpy()`. Values and gradients are the
processor's. What this cannot show is what kernels do: numbers, their order, what they do not support.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch._dynamo  # else torch reads it in the middle of a pretence
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves

from growlm.engine import host_tier
from growlm.engine.arrival import Arrival, Piece
from growlm.layers import kernels

THERE = torch.device("cuda", 0)
_ANSWERS: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "is_initialized": lambda: False,
    "device_count": lambda: 1,
    "device": lambda *_: nullcontext(),
    "is_bf16_supported": lambda **_: True,
    "mem_get_info": lambda *_: (1 << 34, 1 << 35),
    "synchronize": lambda *_: None,
    "get_rng_state": lambda *_: torch.get_rng_state(),  # it draws by the processor's generator
    "set_rng_state": lambda *_: None,
}
_generator = torch.Generator
# What takes tensors of both: copies, and indices of the processor into tensors elsewhere.
_BRIDGES = {"aten::copy_"}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
_MOVES = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu}


class _Places:
    """Where storages are: True elsewhere, False on the processor. What C++ makes for itself fits both."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, bool]] = {}

    def of(self, tensor: Tensor) -> bool | None:
        if tensor.is_meta or tensor.layout != torch.strided:
            return self.of(tensor._values()) if tensor.is_sparse else None
        found = self._known.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[1]

    def put(self, tensor: Tensor, there: bool) -> None:
        if tensor.is_sparse:
            self.put(tensor._values(), there)
            self.put(tensor._indices(), there)
        elif not tensor.is_meta and tensor.layout == torch.strided:
            reference = StorageWeakRef(tensor.untyped_storage())
            # The reference keeps the number from being given to another storage.
            self._known[reference.cdata] = (reference, there)
            if len(self._known) > 200_000:
                self._known = {k: v for k, v in self._known.items() if not v[0].expired()}


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Operations(TorchDispatchMode):
    """Every operation, also those of backward passes."""

    def __init__(self, places: _Places, again: Callable[[], Any]) -> None:
        super().__init__()
        self._places, self._again = places, again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        where = [self._places.of(x) for x in tensors]
        there = True in where
        ours = name.startswith("growlm::")  # may take what it likes, and is looked into
        if there and False in where and name not in _BRIDGES and not ours:
            here = [tuple(x.shape) for x, place in zip(tensors, where, strict=True) if place is False and x.ndim]
            if here and not (name in _INDEXING and where[0]):
                raise RuntimeError(f"{name} of tensors on cuda:0 and, of shape {here}, on the processor")
        if ours:
            with self._again():
                out = torch._library.custom_ops.OPDEFS[name]._init_fn(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and self._places.of(x) is None and (there or False in where):
                self._places.put(x, there)
        return out


class _Calls(TorchFunctionMode):
    """What Python asks of torch: devices that are named, and those that tensors say they are on."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self._places = places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:
            return THERE if self._places.of(args[0]) else func(*args)
        if func == torch.Tensor.is_cuda.__get__:
            return bool(self._places.of(args[0]))
        if func is torch.Tensor.numpy and self._places.of(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func in _MOVES:
            return self._move(func, args, kwargs)
        device = kwargs.get("device")
        there = _is_there(device)
        if there:
            kwargs["device"] = "cpu"
            if kwargs.get("pin_memory"):
                raise RuntimeError("only tensors of the processor can be pinned")
        out = func(*args, **kwargs)
        made = device is not None or (name in _FACTORIES)
        if made and isinstance(out, Tensor) and not out.is_meta:
            known = [self._places.of(x) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
            if there or (device is None and True in known):
                self._places.put(out, True)
            elif device is not None or not known:
                self._places.put(out, False)
        return out

    def _move(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        source, given = args[0], [*args[1:], *kwargs.values()]
        before = bool(self._places.of(source))
        after = before if func is torch.Tensor.to else func is torch.Tensor.cuda
        dtype = source.dtype
        if func is torch.Tensor.to:
            for x in given:
                if isinstance(x, str | torch.device):
                    if torch.device(x).type == "meta":
                        return func(*args, **kwargs)
                    after = _is_there(x)
                elif isinstance(x, torch.dtype):
                    dtype = x
                elif isinstance(x, Tensor):
                    after, dtype = bool(self._places.of(x)), x.dtype
        if source.is_meta:
            return func(*args, **kwargs)
        out = torch.Tensor.to(source, dtype, copy=before != after or kwargs.get("copy", False))
        if out is not source:
            self._places.put(out, after)
        return out


_FACTORIES = {
    "tensor", "zeros", "ones", "empty", "full", "arange", "randn", "rand", "randint", "randperm", "eye", "linspace",
    "from_numpy", "frombuffer", "as_tensor",
}  # fmt: skip


@contextmanager
def pretended() -> Iterator[None]:
    """A GPU that is none, for this thread and those that it starts."""
    places = _Places()

    def modes() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(_Operations(places, modes))
        stack.enter_context(_Calls(places))
        return stack

    run = threading.Thread.run

    def run_in_it(thread: threading.Thread) -> None:
        with modes():
            run(thread)

    with pytest.MonkeyPatch.context() as patch, modes():
        patch.setattr(torch.backends.cuda, "is_built", lambda: True)
        patch.setattr(kernels, "available", lambda device: False)  # Triton needs a real one
        patch.setattr(host_tier, "copied_beside", copied_late)
        patch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
        for name, answer in _ANSWERS.items():
            patch.setattr(torch.cuda, name, answer)
        patch.setattr(torch, "Generator", _Generator)
        for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
            patch.setattr(torch, name, _of_the_processor(getattr(torch, name)))
        patch.setattr(threading.Thread, "run", run_in_it)
        yield


_STREAM = object()


class Late:
    """The place behind copies that are made where it is waited for, and not before: the latest that a GPU may be."""

    def __init__(self, copies: Sequence[Callable[[], object]]) -> None:
        self._copies, self._made = copies, False

    def query(self) -> bool:
        return self._made

    def wait(self, stream: object) -> None:
        assert stream is _STREAM
        if not self._made:
            for copy in self._copies:
                copy()
        self._made = True


def copied_late(
    buffer: Tensor, pieces: Sequence[Piece], device: torch.device, marks: list[Late] | None = None
) -> tuple[Tensor, Arrival]:
    """As `arrival.copied_beside`. What has not come yet are bytes that make no numbers."""
    there, copies, found = torch.full_like(buffer, 0xFF, device=device), [], []
    for piece in pieces:
        for start, end in piece.places:
            copies.append(lambda at=slice(start, end): there[at].copy_(buffer[at]))
        found.append((piece.stage, Late(tuple(copies))))
    found[0][1].wait(_STREAM)
    if marks is not None:
        marks.extend(mark for _, mark in found)
    return there, Arrival([(stage, mark) for stage, mark in found[1:] if stage is not None], lambda: _STREAM)


class _Generator(torch.Generator):
    """A class, since files that are read meanwhile may name it in a type."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return _generator()


def _of_the_processor(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is asked of a type of device, asked of the processor instead."""
    return lambda device, *arguments, **options: call("cpu" if device == "cuda" else device, *arguments, **options)
