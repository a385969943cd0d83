"""Optimiser: one object for dense parameters (torch's fused AdamW) and for tables of which a step reads a few rows.

A table is whatever has a sparse gradient; no marker can get lost. Of a table, only rows with a gradient are touched:
the others keep their bits, whatever the weight decay, and cost nothing.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from growlm.layers import kernels
from growlm.layers.rows import read_rows
from growlm.layers.tables import untouched_zeros

# r rows with a gradient, w width of a row

SecondMoment = Literal["row", "element"]
_CACHED = 1 << 18  # elements of a table that stay in the cache through all parts of an update


def make_optimizer(
    parameters: nn.Module | Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decay: Callable[[str, nn.Parameter], bool] = lambda name, p: p.ndim >= 2,
    second_moment: SecondMoment = "row",
) -> RowAdamW:
    """The optimiser of a model or of named parameters, those that are frozen left out.

    Args:
        decay: which parameters get weight decay.
        second_moment: of tables: one for each row, which saves a third of an Adam's memory, or one for each element.

    Raises:
        TypeError: parameters without names.
    """
    if isinstance(parameters, nn.Module):
        parameters = parameters.named_parameters()
    elif isinstance(parameters, Mapping):
        parameters = parameters.items()
    parameters = list(parameters)
    if any(isinstance(p, Tensor) for p in parameters):
        raise TypeError("parameters have no names; give the model itself, or its named_parameters()")
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    groups = [
        # What ranks have in parts apart from the rest: torch's fused step takes one or the other.
        {"params": [p for name, p in trained if decay(name, p) == decays and isinstance(p, DTensor) == parted]}
        | {"weight_decay": weight_decay if decays else 0.0}
        for decays in (True, False)
        for parted in (False, True)
    ]
    return RowAdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, second_moment=second_moment)


class RowAdamW(torch.optim.AdamW):
    """AdamW, fused for dense parameters, by rows for those with a sparse gradient.

    A drop-in for torch's: closures, hooks, schedulers, `GradScaler`, copies and pickles work. Not for
    `DistributedDataParallel`, which cannot add up the sparse gradients of tables, nor for
    `torch.distributed.checkpoint`, which makes their state with a dense step.

    A row's step: with its own count of steps t for the bias corrections, `m` in float32, and `v` the mean over the row
    of the squared gradient (`second_moment="row"`) or its square by element. Rows in bfloat16 are rounded
    stochastically, by torch's generator: an update smaller than half a unit in the last place would else be lost.

    Updates are worked out in float32, whatever the dtype of the rows.

    State of a table: `row_steps` (N,) int32, `exp_avg` (N, w) float32, `row_exp_avg_sq` (N,) or (N, w) float32. On a
    processor, rows that were never read take no memory in it.

    Raises:
        ValueError: `second_moment` is neither; an option of AdamW that tables have not; a parameter has a sparse
            gradient after dense ones or the reverse, or one that is sparse in more than rows.
        MemoryError: no memory for the state of a table.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        second_moment: SecondMoment = "row",
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        # torch's fused AdamW has `GradScaler` leave it to the step to undo the scale, or to do nothing.
        self._step_supports_amp_scaling = False
        self.defaults["second_moment"] = second_moment
        for group in self.param_groups:
            _check_group(group, second_moment)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if "second_moment" in self.defaults:  # not while the first groups are added
            _check_group(param_group, self.defaults["second_moment"])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tables = [(p, g) for g in self.param_groups for p in g["params"] if p.grad is not None and p.grad.is_sparse]
        for p, _ in tables:
            assert p.grad is not None
            if p.grad.sparse_dim() != 1 or p.ndim < 2:
                raise ValueError(f"a parameter {tuple(p.shape)} has a gradient that is sparse in more than rows")
            if "step" in self.state[p]:
                raise ValueError(f"a parameter {tuple(p.shape)} has a sparse gradient, after dense ones")
        for g in self.param_groups:
            for p in g["params"]:
                if "row_steps" in self.state.get(p, {}) and p.grad is not None and not p.grad.is_sparse:
                    raise ValueError(f"a parameter {tuple(p.shape)} has a dense gradient, after sparse ones")
        gradients = [p.grad for p, _ in tables]
        for p, _ in tables:
            p.grad = None
        try:
            # Without what torch wraps a step in, as hooks: ours has them.
            inspect.unwrap(torch.optim.AdamW.step)(self)
        finally:
            for (p, _), grad in zip(tables, gradients, strict=True):
                p.grad = grad
        for p, group in tables:
            self._step_rows(p, group)
        return loss

    def _step_rows(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        rows, gradient = rows_of(p.grad)
        if not len(rows):
            return
        state = self.state[p]
        if not state:
            state["row_steps"] = untouched_zeros((len(p),), torch.int32, p.device)
            state["exp_avg"] = untouched_zeros(tuple(p.shape), torch.float32, p.device)
            shape = tuple(p.shape) if group["second_moment"] == "element" else (len(p),)
            state["row_exp_avg_sq"] = untouched_zeros(shape, torch.float32, p.device)
        _update(p, rows, gradient, state, group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch looks for its own kind of state in all of it.
        tables = {p: s for p, s in state["state"].items() if "row_steps" in s}
        others = defaultdict(dict, {p: s for p, s in state["state"].items() if "row_steps" not in s})
        super().__setstate__({**state, "state": others})
        self.state.update(tables)
        for group in self.param_groups:
            group.setdefault("second_moment", "row")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # torch would cast the state of tables to the dtype of their rows.
        tables = {i: s for i, s in state_dict["state"].items() if "row_steps" in s}
        others = {i: s for i, s in state_dict["state"].items() if "row_steps" not in s}
        super().load_state_dict({**state_dict, "state": others})
        saved = itertools.chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        ours = itertools.chain.from_iterable(g["params"] for g in self.param_groups)
        for i, p in zip(saved, ours, strict=True):
            if i in tables:
                self.load_parameter_state(p, tables[i])

    @torch.no_grad()
    def load_parameter_state(self, p: nn.Parameter, tensors: Mapping[str, Tensor], *, copied: bool = True) -> None:
        """Goes on from one parameter's state; of a table only the rows that were ever read.

        Args:
            copied: False takes the tensors over where they are on the parameter's device, and are nobody else's.

        Raises:
            ValueError: it is the state of a parameter of another shape.
        """
        state = self.state[p] = {}
        read = tensors["row_steps"].nonzero()[:, 0] if "row_steps" in tensors else None
        for key, tensor in tensors.items():
            fits = tensor.shape in ((), p.shape) if read is None else tensor.shape in (p.shape[:1], p.shape)
            if not fits:
                raise ValueError(f"{key} is {tuple(tensor.shape)}, which is no state of a parameter {tuple(p.shape)}")
            if read is None:
                state[key] = tensor.to(p.device, copy=copied)
            else:
                state[key] = untouched_zeros(tuple(tensor.shape), tensor.dtype, p.device)
                for part in read.split(_rows_at_a_time(tensor)):
                    state[key][part.to(p.device)] = tensor[part].to(p.device)


def _check_group(group: dict[str, Any], second_moment: str) -> None:
    """Settles a group's options."""
    kind = group.setdefault("second_moment", second_moment)
    if kind not in ("row", "element"):
        raise ValueError(f"second_moment {kind!r} is not one of row, element")
    for option in ("maximize", "amsgrad", "capturable", "differentiable"):
        if group.get(option):
            raise ValueError(f"{option} is not offered: tables have no such update")


def _update(p: Tensor, rows: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """One AdamW step of rows (r,) with gradient (r, ...)."""
    lr, (beta1, beta2), eps = float(group["lr"]), group["betas"], group["eps"]
    kept = 1 - lr * group["weight_decay"]
    p, gradient, first = p.flatten(1), gradient.flatten(1), state["exp_avg"].flatten(1)
    second, by_row = state["row_exp_avg_sq"], state["row_exp_avg_sq"].ndim == 1
    # What is one number a row is worked out for all rows at once.
    steps = state["row_steps"].index_select(0, rows).add_(1)
    state["row_steps"].index_copy_(0, rows, steps)
    size = (-lr / _bias(beta1, steps))[:, None]
    corrected = _bias(beta2, steps).sqrt_()[:, None]
    if kernels.available(p.device):
        from growlm.layers.kernels import row_update

        if row_update.fits(p, first, second):
            noise, shifts = _draws(p, len(rows)) if p.dtype == torch.bfloat16 else (None, None)
            row_update.update_rows(
                p, rows, gradient, first, second if by_row else second.flatten(1), size, corrected,
                betas=(beta1, beta2), eps=eps, kept=kept, noise=noise, shifts=shifts,
            )  # fmt: skip
            return
    if by_row:
        square = _row_norms(gradient).square_().div_(gradient.shape[1])
        v = second.index_select(0, rows).lerp_(square, 1 - beta2)
        second.index_copy_(0, rows, v)
        size = size / (v.sqrt_()[:, None] / corrected).add_(eps)
    count = _rows_at_a_time(p)
    rounding = _Rounding(min(count, len(rows)) * p.shape[1]) if p.dtype == torch.bfloat16 else None
    singles = torch.arange(count, device=rows.device)
    for at in range(0, len(rows), count):
        part = slice(at, at + count)
        here, g = rows[part], gradient[part].float()
        m = read_rows(first, here, singles).lerp_(g, 1 - beta1)
        first.index_copy_(0, here, m)
        if not by_row:
            v = second.flatten(1).index_select(0, here).lerp_(g.square(), 1 - beta2)
            second.flatten(1).index_copy_(0, here, v)
            m.div_(v.sqrt_().div_(corrected[part]).add_(eps))
        new = read_rows(p, here, singles).float().mul_(kept).addcmul_(m, size[part])
        p.index_copy_(0, here, new.to(p.dtype) if rounding is None else rounding(new))


def _bias(beta: float, steps: Tensor) -> Tensor:
    """1 - beta^steps, float32."""
    wide = torch.float32 if steps.device.type == "mps" else torch.float64  # which Metal does not have
    return -torch.expm1(steps.to(wide) * (math.log(beta) if beta else -math.inf)).float()


def _rows_at_a_time(table: Tensor) -> int:
    return max(_CACHED // max(table[:1].numel(), 1), 1)


def _row_norms(values: Tensor) -> Tensor:
    """(r, w) -> (r,) float32."""
    parts = values.split(_rows_at_a_time(values))
    return torch.cat([torch.linalg.vector_norm(part.float(), dim=1) for part in parts])


def _norm(gradient: Tensor) -> Tensor:
    """Float32, over all of its elements."""
    return _row_norms(gradient.flatten(1) if gradient.ndim > 1 else gradient.reshape(1, -1)).norm()


class _Rounding:
    """Rounds float32 to bfloat16, up or down with the probability that keeps the mean.

    Drawing as many numbers as a table has elements would take longer than the update. `size` numbers are drawn once,
    and shifted by one more (modulo their range) for each call: every number is uniform, any two are independent.
    """

    def __init__(self, size: int) -> None:
        self.noise = torch.randint(0, 1 << 16, (size,), dtype=torch.int32)

    def __call__(self, x: Tensor) -> Tensor:
        """At most `size` numbers, of which there is no NaN."""
        shift = torch.randint(0, 1 << 16, (), dtype=torch.int32)
        noise = self.noise[: x.numel()].add(shift).bitwise_and_(0xFFFF).to(x.device).view(x.shape)
        # Beyond the largest number it carries into the exponent, to infinity; infinity has no bits that it could carry.
        bits = noise.add_(x.view(torch.int32)).bitwise_and_(-(1 << 16))
        return bits.view(torch.float32).to(torch.bfloat16)


def _draws(table: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """All that `_Rounding` draws for an update of so many rows, from the same generator in the same order: its noise,
    as int16 of the same bits, and its shifts, on the device of the table."""
    count = _rows_at_a_time(table)
    noise = torch.randint(0, 1 << 16, (min(count, rows) * table[:1].numel(),), dtype=torch.int32)
    shifts = torch.randint(0, 1 << 16, (-(-rows // count),), dtype=torch.int32)
    return noise.to(torch.int16).to(table.device), shifts.to(table.device)


def rows_of(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (r,) and their values (r, ...) of a sparse gradient. Each row stands there once."""
    if not gradient.is_coalesced():
        rows = gradient._indices()[0]
        # Autograd drops the mark of a coalesced gradient when it takes it over; merging it anew would be a copy.
        if bool((rows[1:] > rows[:-1]).all()):
            return rows, gradient._values()
        gradient = gradient.coalesce()
    return gradient.indices()[0], gradient.values()


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, total: Callable[[Tensor], Tensor] = lambda own: own
) -> Tensor:
    """Scales all gradients, those of tables included, so that their norm together is at most `max_norm`. Of gradients
    in parts, each rank scales its own.

    Args:
        total: the sum over ranks of what each has, in place.

    Returns:
        The norm that they had.
    """
    parameters = [p for p in parameters if p.grad is not None]
    tables = [p for p in parameters if p.grad is not None and p.grad.is_sparse]
    parted = [p.grad for p in parameters if isinstance(p.grad, DTensor)]
    if not tables and not parted:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    for p in tables:
        assert p.grad is not None
        rows, values = rows_of(p.grad)
        if values is not p.grad._values():
            p.grad = torch.sparse_coo_tensor(rows[None], values, p.shape, is_coalesced=True, check_invariants=False)
    own = [g.to_local() for g in parted]
    wholes = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    wholes = [g._values() if g.is_sparse else g for g in wholes]
    gradients = wholes + own
    wide = [_norm(g) for g in wholes if g.numel()]
    if parted:
        wide.append(total(torch.stack([_norm(g).square() for g in own]).sum()).sqrt())
    if not wide:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack([w.to(wide[0].device) for w in wide]))
    share = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if share.device.type == "cpu" and share == 1:  # nothing to do, for gradients of a hundred megabytes
        return norm
    for g in gradients:
        g.mul_(share.to(g.device, g.dtype))
    return norm
