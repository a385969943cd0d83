"""Stick-breaking attention (ModuleFormer, section 3.2; equations 3 to 5): reference, blocked, cached decode.

On a GPU that Triton compiles for, `kernels/stickbreaking.py` computes the same.

A query walks from the newest key to the oldest and takes from each a share of what is left of a stick:
`beta[t,i] = sigmoid(q_t . k_i * scale)`, `p[t,i] = beta[t,i] * prod_{i<j<=t} (1 - beta[t,j])`. The weights sum to
at most one; what is left over goes nowhere. Order is all the position there is: no embedding of positions is needed.

Everything is computed in log space: `log p[t,i] = l[t,i] - sum_{i<=j<=t} softplus(l[t,j])`. The blocked form holds one
block of logits at a time, forward and backward, so its memory is linear in the number of tokens. Blocks are visited
newest first, and the walk ends where every stick of the block is shorter than 1e-34.

All is in float32, but for the last three products of the backward pass, which are in the dtype of the inputs: the
differences that are taken (what is left of a stick, and of its gradient) would lose their digits in a narrower one.
Exponentials are of base 2, which processors compute several times as fast as those of base e.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from growlm.layers import kernels

# b batch, h heads of queries, g heads of keys and values, n = h / g, t queries, s keys, d head width, e width of values
# x = s - 1 - i: keys counted from the newest

_LOG2E = math.log2(math.e)
_GONE = -80.0  # log of a weight that is nothing: below, float32 is denormal and slow
_SURE = 120.0  # logit of base 2 from which a key takes all there is, and above which an exponential might overflow
_BROKEN = 17.0  # -log of a stick that is shorter than float32 tells from none beside a whole one
_BLOCK = 256  # keys
_PANEL = 128  # queries


def stickbreaking_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Causal stick-breaking attention; the current token is the first that is broken from.

    Args:
        query: (b, h, t, d), of the last t of the s tokens.
        key, value: (b, g, s, d) and (b, g, s, e); head i of the queries reads head `i // (h / g)`.
        scale: of the logits, by default `d ** -0.5`.
        mask: bool, broadcastable to (b, 1, t, s), False where a key is not to be seen; what is later than the query is
            never seen.
        documents: (b, s) integers; a query sees keys of its own number only.

    Returns:
        (b, h, t, e) in the dtype of `query`.

    Raises:
        ValueError: shapes that do not fit one another.
    """
    check_shapes(query, key, value, mask, documents)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None:
        mask = mask.bool().expand(len(query), 1, mask.shape[-2], key.shape[2])
    return torch.ops.growlm.stickbreaking(query, key, value, scale, mask, documents)[0]


def stickbreaking_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by its definition, with all weights at once: output (b, h, t, e) and weights (b, h, t, s)."""
    check_shapes(query, key, value, mask, documents)
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    t, s = query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bhtd,bhsd->bhts", query, key) * scale
    seen = torch.ones(t, s, dtype=torch.bool, device=query.device).tril(s - t)[None, None]
    if mask is not None:
        seen = seen & mask
    if documents is not None:
        seen = seen & (documents[:, None, s - t :, None] == documents[:, None, None, :])
    logits = logits.masked_fill(~seen, -math.inf)
    passed = F.softplus(logits).flip(-1).cumsum(-1).flip(-1)  # at i, of all keys from i on
    weights = (logits - passed).exp()
    return torch.einsum("bhts,bhse->bhte", weights, value), weights


def check_shapes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, documents: Tensor | None) -> None:
    """
    Raises:
        ValueError: arguments of `stickbreaking_attention` that do not fit one another.
    """
    (b, h, t, d), (_, g, s, _) = query.shape, key.shape
    if key.shape != (b, g, s, d) or value.shape[:3] != (b, g, s):
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key and value of shapes {shapes} do not fit one another")
    if g < 1 or h % g:
        raise ValueError(f"{h} heads of queries cannot share {g} heads of keys")
    if s < t:
        raise ValueError(f"{t} queries but {s} keys; the keys hold the past and the queries' own tokens")
    if mask is not None and not _fits(mask.shape, (b, 1, t, s)):
        raise ValueError(f"mask of shape {tuple(mask.shape)}, expected one that broadcasts to {(b, 1, t, s)}")
    if documents is not None and documents.shape != (b, s):
        raise ValueError(f"documents of shape {tuple(documents.shape)}, expected {(b, s)}")


def _fits(shape: torch.Size, wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(have in (1, want) for have, want in zip(shape, wanted, strict=True))


class _Walk:
    """Blocks of logits of one call, panel by panel of queries and, within a panel, from the newest keys to the oldest.

    A block of keys is turned round and transposed once, when it is first needed. Buffers are used again and again.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, documents: Tensor | None
    ) -> None:
        self.b, self.h, self.t, self.d = query.shape
        self.g, self.s = key.shape[1:3]
        self.n = self.h // self.g
        self.scale, self.mask, self.documents = scale, mask, documents
        self.dtype = query.dtype if query.dtype in (torch.bfloat16, torch.float16) else torch.float32
        self.on_cpu = query.device.type == "cpu"  # elsewhere, looking at a number would wait for the device
        self._query = query.reshape(self.b * self.g, self.n, self.t, self.d)
        self._key, self._value = key.flatten(0, 1), value.flatten(0, 1)
        self._turned: dict[int, tuple[Tensor, Tensor]] = {}
        self.panels = [(r, min(r + _PANEL, self.t)) for r in range(0, self.t, _PANEL)]
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, rows: int, keys: int) -> Tensor:
        """Scratch space (b g, n rows, keys) in float32, with the name's last content or none."""
        size = self.b * self.h * rows * keys
        whole = self._buffers.get(name)
        if whole is None or whole.numel() < size:
            whole = self._query.new_empty(size, dtype=torch.float32)
            self._buffers[name] = whole
        return whole[:size].view(self.b * self.g, self.n * rows, keys)

    def queries(self, start: int, stop: int) -> Tensor:
        """Queries of a panel, scaled for logits of base 2, (b g, n rows, d)."""
        scaled = self._query[:, :, start:stop].float() * (self.scale * _LOG2E)
        return scaled.flatten(1, 2)

    def blocks(self, start: int, stop: int, limit: int | None = None) -> Iterator[tuple[int, int]]:
        """Ranges of x that a panel sees, newest first; `limit` of them."""
        first = self.t - stop  # x of the panel's last query
        for number, at in enumerate(range(first // _BLOCK * _BLOCK, self.s, _BLOCK)):
            if limit is not None and number >= limit:
                return
            yield max(at, first), min(at + _BLOCK, self.s)

    def keys(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a range of x in float32, newest first: (b g, keys, d) and (b g, keys, e)."""
        at = low // _BLOCK * _BLOCK
        if at not in self._turned:
            end = min(at + _BLOCK, self.s)
            part = slice(self.s - end, self.s - at)
            self._turned[at] = tuple(x[:, part].flip(1).float() for x in (self._key, self._value))  # type: ignore[assignment]
        keys, values = self._turned[at]
        return keys[:, low - at : high - at], values[:, low - at : high - at]

    def logits(self, queries: Tensor, start: int, stop: int, low: int, high: int) -> Tensor:
        """Logits of base 2 of a panel and a range of x, (b g, n rows, keys); minus infinity where nothing is seen."""
        rows, keys = stop - start, high - low
        out = self.buffer("logits", rows, keys)
        torch.bmm(queries, self.keys(low, high)[0].transpose(1, 2), out=out)
        if not self.on_cpu or float(out.amax()) > _SURE:
            out.clamp_(max=_SURE)
        split = out.view(self.b, self.g, self.n, rows, keys)
        device = out.device
        newest = self.t - 1 - torch.arange(start, stop, device=device)  # x of every query
        if low < self.t - start - 1:
            split.masked_fill_(torch.arange(low, high, device=device) < newest[:, None], -math.inf)
        part = slice(self.s - high, self.s - low)
        if self.mask is not None:
            own = slice(start, stop) if self.mask.shape[2] > 1 else slice(None)
            split.masked_fill_(~self.mask[:, :, None, own, part].flip(-1), -math.inf)
        if self.documents is not None:
            mine = self.documents[:, self.s - self.t + start : self.s - self.t + stop]
            other = mine[:, :, None] != self.documents[:, None, part].flip(-1)
            split.masked_fill_(other[:, None, None], -math.inf)
        return out

    def weights(self, logits: Tensor, odds: Tensor, passed: Tensor | None) -> tuple[Tensor, Tensor]:
        """(log of what is left after each key, negated, in place of the odds; weights, in place of the logits).

        `odds` are 2 to the power of the logits; `passed` (b g, n rows, 1) is what newer blocks have taken.
        """
        taken = odds.log1p_()
        if passed is not None:
            taken[..., :1] += passed
        torch.cumsum(taken, -1, out=taken)
        logits.sub_(taken, alpha=_LOG2E)
        F.threshold(logits, _GONE * _LOG2E, -math.inf, inplace=True).exp2_()
        return taken, logits

    def odds(self, logits: Tensor, rows: int) -> Tensor:
        """`beta / (1 - beta)` of every key, in a buffer."""
        return torch.exp2(logits, out=self.buffer("taken", rows, logits.shape[-1]))


def _kernels(query: Tensor, key: Tensor, value: Tensor) -> ModuleType | None:
    """The Triton form, where it runs and takes these inputs."""
    if not kernels.available(query.device):
        return None
    from growlm.layers.kernels import stickbreaking

    return stickbreaking if stickbreaking.fits(query, key, value) else None


def _blocked(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (b, h, t, e); the same in float32, where that is another dtype, for the backward pass; and how many blocks
    of keys every panel of queries read (nought where kernels computed it, which count for themselves)."""
    with torch.autocast(query.device.type, enabled=False):
        walk = _Walk(query, key, value, scale, mask, documents)
        exact = query.new_empty(*query.shape[:3], value.shape[-1], dtype=torch.float32)
        folded = exact.view(walk.b * walk.g, walk.n, walk.t, value.shape[-1])
        read = torch.zeros(len(walk.panels), dtype=torch.int64)
        for panel, (start, stop) in enumerate(walk.panels):
            queries, total, passed = walk.queries(start, stop), None, None
            for low, high in walk.blocks(start, stop):
                logits = walk.logits(queries, start, stop, low, high)
                taken, weights = walk.weights(logits, walk.odds(logits, stop - start), passed)
                part = torch.bmm(weights, walk.keys(low, high)[1])
                total = part if total is None else total.add_(part)
                passed = taken[..., -1:].clone()
                read[panel] += 1
                if walk.on_cpu and float(passed.min()) > -_GONE:
                    break
            assert total is not None
            folded[:, :, start:stop] = total.view(walk.b * walk.g, walk.n, stop - start, value.shape[-1])
        if query.dtype == torch.float32:
            return exact, exact.new_empty(0), read
        return exact.to(query.dtype), exact, read


_stickbreaking = torch.library.custom_op("growlm::stickbreaking", _blocked, mutates_args=())


@_stickbreaking.register_kernel("cuda")
def _triton(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    compiled = _kernels(query, key, value)
    if compiled is None:
        return _blocked(query, key, value, scale, mask, documents)
    out, exact = compiled.attention(query, key, value, scale, mask, documents)
    read = torch.zeros((query.shape[2] + _PANEL - 1) // _PANEL, dtype=torch.int64)
    return out, exact.new_empty(0) if exact is out else exact, read


@_stickbreaking.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    panels = (query.shape[2] + _PANEL - 1) // _PANEL
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    exact = out.new_empty(0 if query.dtype == torch.float32 else out.shape, dtype=torch.float32)
    return out, exact, torch.empty(panels, dtype=torch.int64, device="cpu")


def _blocked_backward(
    grad: Tensor,
    out: Tensor,
    read: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    With a_i = p_i (grad . v_i): the gradient of logit j is a_j - sigmoid(l_j) * sum of a_i over the keys i that are not
    newer than j, and that sum is all of them, grad . out, less those of newer keys.
    """
    with torch.autocast(query.device.type, enabled=False):
        walk = _Walk(query, key, value, scale, mask, documents)
        fold = (walk.b * walk.g, walk.n, walk.t)
        grads, outs = (x.reshape(*fold, value.shape[-1]) for x in (grad, out))
        grad_query = torch.empty(*fold, walk.d, dtype=torch.float32, device=query.device)
        grad_key, grad_value = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (key, value))
        folded_key, folded_value = grad_key.flatten(0, 1), grad_value.flatten(0, 1)
        for (start, stop), limit in zip(walk.panels, read.tolist(), strict=True):
            rows = stop - start
            queries, passed, newer = walk.queries(start, stop), None, None
            upper = grads[:, :, start:stop].float().flatten(1, 2)
            narrow, narrow_upper = queries.to(walk.dtype), upper.to(walk.dtype)
            whole = (upper * outs[:, :, start:stop].float().flatten(1, 2)).sum(-1, keepdim=True)
            own = torch.zeros(queries.shape, dtype=torch.float32, device=queries.device)
            for low, high in walk.blocks(start, stop, limit):
                keys, values = walk.keys(low, high)
                part = slice(walk.s - high, walk.s - low)
                logits = walk.logits(queries, start, stop, low, high)
                odds, share = walk.odds(logits, rows), walk.buffer("share", rows, high - low)
                torch.add(odds, 1.0, out=share)
                torch.div(odds, share, out=share)  # beta
                taken, weights = walk.weights(logits, odds, passed)
                # Of every key, whether nothing was left when it was reached.
                broken = torch.empty(taken.shape, dtype=torch.bool, device=taken.device)
                torch.gt(taken[..., :-1], _BROKEN, out=broken[..., 1:])
                broken[..., :1] = False if passed is None else passed > _BROKEN
                passed = taken[..., -1:].clone()
                folded_value[:, part] += torch.bmm(weights.to(walk.dtype).transpose(1, 2), narrow_upper).flip(1)
                pull = walk.buffer("pull", rows, high - low)
                torch.bmm(upper, values.transpose(1, 2), out=pull)
                pull.mul_(weights)  # a
                torch.cumsum(pull, -1, out=taken)
                if newer is not None:
                    taken += newer
                newer = taken[..., -1:].clone()
                # a - share * (whole - (taken - a)), in place; no rounding error of `whole` on what is left of a stick
                taken.sub_(pull).sub_(whole).mul_(share).masked_fill_(broken, 0.0).add_(pull)
                change = taken.to(walk.dtype)
                own.add_(torch.bmm(change, keys.to(walk.dtype)))
                folded_key[:, part] += torch.bmm(change.transpose(1, 2), narrow).flip(1)
            grad_query[:, :, start:stop] = own.view(walk.b * walk.g, walk.n, rows, -1) * scale
        grad_key *= 1 / _LOG2E
        return (
            grad_query.view(query.shape).to(query.dtype),
            grad_key.to(key.dtype),
            grad_value.to(value.dtype),
        )


_stickbreaking_backward = torch.library.custom_op("growlm::stickbreaking_backward", _blocked_backward, mutates_args=())


@_stickbreaking_backward.register_kernel("cuda")
def _triton_backward(
    grad: Tensor,
    out: Tensor,
    read: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    compiled = _kernels(query, key, value)
    if compiled is None:
        return _blocked_backward(grad, out, read, query, key, value, scale, mask, documents)
    return compiled.backward(grad, out, query, key, value, scale, mask, documents)


@_stickbreaking_backward.register_fake
def _(
    grad: Tensor,
    out: Tensor,
    read: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, scale, mask, documents = inputs
    out, exact, read = output
    ctx.scale = scale
    ctx.save_for_backward(query, key, value, mask, documents, exact if len(exact) else out, read)
    ctx.mark_non_differentiable(exact, read)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, mask, documents, out, read = ctx.saved_tensors
    grads = torch.ops.growlm.stickbreaking_backward(grad, out, read, query, key, value, ctx.scale, mask, documents)
    return (*grads, None, None, None)


_stickbreaking.register_autograd(_backward, setup_context=_setup)
