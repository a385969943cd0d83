"""Cells: an index over points that finds the k nearest exactly, by product keys and by bounds that hold.

Knows points, distances and how far each point reaches; nothing of text, modules or files. Space is cut in two halves
with a codebook of 4 sqrt(n) sub-keys each, and a point lies in the cell (a, b) of its nearest sub-keys. The least
distance that a cell can have is a sum of a term for a and one for b: comparing a query with the sub-keys bounds all
cells. In the cells that are left, points are ruled out by a copy of them in one byte a number, whose error is known.
What is left then is compared whole, so that the result is that of comparing with every point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from growlm.base import tensor_bytes
from growlm.progress import track

# n points, d width, s sub-keys a side, c cells that hold a point, r rows: points in the order of their cells

_PER_ROOT = (
    4  # sub-keys a side, times sqrt(n): with fewer, groups that are far apart share one, and its cells say little
)
_SUB_KEYS = 2048  # a side at most: building compares every point with all of them
_SAMPLE = 16_384  # points from which sub-keys are made
_ROUNDS = 6  # of k-means
_AT_ONCE = 16_384  # points that are worked on together while building
_FIRST = 512  # points of the nearest cells that are compared whole first, for a bound to begin with
_GATHERED = 0.2  # share of the points up to which the rows of some cells are copied together; else all are read in turn
_STEPS = 127  # of a number of a point, in one byte, to either side
# Of a number of a query, in each of two bytes. Processors without VNNI add two products of bytes in 16 bits, which hold
# no larger ones: oneDNN makes the point's byte one from 0 to 255, and 2 * 255 * 64 is the most.
_QUERY_STEPS = 63


@dataclass(frozen=True)
class Found:
    """What one search found, and what it cost.

    Attributes:
        points: (k,) int64, the nearest first, of equally near ones the first; fewer where fewer reach the query.
        distances: (k,) float32, squared.
        visited: share of the points in cells that their bound did not rule out.
        compared: share of the points that were compared whole.
    """

    points: Tensor
    distances: Tensor
    visited: float
    compared: float


def squared_distances(queries: Tensor, points: Tensor) -> Tensor:
    """(m, d), (n, d) -> (m, n). The bits of a pair's value do not depend on the other pairs."""
    return torch.cdist(queries, points, compute_mode="donot_use_mm_for_euclid_dist").square()


class Cells:
    """The index of some points, which it does not hold itself. The same points give the same index, to the bit.

    Attributes:
        tensors: all there is to it, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """
        Args:
            tensors: those of another one.
        """
        t = self.tensors = dict(tensors)
        self._sizes = t["starts"].diff()
        self._half = t["sub_keys_a"].shape[1]
        # Greatest lengths, for what rounding can do: of a point, and of a point from the origin as it is coded.
        self._longest = float(t["squares"].max()) ** 0.5
        self._farthest = float(t["origin"].norm()) + self._longest

    @classmethod
    def build(cls, points: Tensor, reaches: Tensor) -> Self:
        """
        Args:
            points: (n, d) float32, at least one, of width 2 at least.
            reaches: (n,) the largest squared distance at which each may still be found.
        """
        n, d = points.shape
        assert n
        assert d > 1
        origin = points[:: math.ceil(n / _SAMPLE)].mean(0)
        count = min(_PER_ROOT * math.isqrt(n), n, _SUB_KEYS)
        halves = [slice(0, d // 2), slice(d // 2, d)]
        keys = [_sub_keys(points[:, half], count) for half in halves]
        chosen = [_nearest_keys(points[:, half], key) for half, key in zip(halves, keys, strict=True)]
        cell = chosen[0] * count + chosen[1]
        order = cell.argsort(stable=True)
        occupied, sizes = torch.unique_consecutive(cell[order], return_counts=True)
        cell_of = torch.repeat_interleave(torch.arange(len(occupied)), sizes)

        def of_cells(values: Tensor, how: str) -> Tensor:
            return torch.zeros(len(occupied)).scatter_reduce(0, cell_of, values, how, include_self=False)

        codes = torch.empty(n, d, dtype=torch.int8)
        steps, errors, squares = torch.empty(n), torch.empty(n), torch.empty(n)
        for at in track(range(0, n, _AT_ONCE), "codes", "parts"):
            part = slice(at, at + _AT_ONCE)
            away = (points[order[part]] - origin).double()
            step = (away.abs().amax(-1) / _STEPS).clamp(min=1e-30).float()
            code = (away / step[:, None]).round().clamp(-_STEPS, _STEPS)
            codes[part], steps[part] = code.to(torch.int8), step
            errors[part] = (away - code * step[:, None]).norm(dim=-1)
            squares[part] = away.square().sum(-1)
        tensors = {
            "order": order.to(torch.int32),
            "codes": codes,
            "steps": steps,
            "errors": errors,
            "squares": squares,
            "reaches": reaches[order].float(),
            "origin": origin,
            "starts": torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]),
            "cell_a": (occupied // count).to(torch.int32),
            "cell_b": (occupied % count).to(torch.int32),
            "cell_reach": of_cells(reaches[order].float(), "amax"),
        }
        for name, half, key, nearest in zip("ab", halves, keys, chosen, strict=True):
            pieces = zip(points[:, half].split(_AT_ONCE), nearest.split(_AT_ONCE), strict=True)
            away = torch.cat([(piece - key[chosen_here]).norm(dim=-1) for piece, chosen_here in pieces])[order]
            tensors[f"sub_keys_{name}"] = key
            tensors[f"inner_{name}"] = of_cells(away, "amin")
            tensors[f"outer_{name}"] = of_cells(away, "amax")
        return cls(tensors)

    def __len__(self) -> int:
        return len(self.tensors["order"])

    def nearest(self, query: Tensor, points: Tensor, top_k: int) -> Found:
        """The `top_k` nearest of those points that reach as far as the query.

        Args:
            query: (d,) float32.
            points: (n, d), those of which this is the index.
        """
        t = self.tensors
        away = (query - t["origin"]).double()
        length = float(away.norm())
        # What rounding can add to a bound: sums of d products, of vectors no longer than these.
        slack = 8 * len(query) * 2.0**-24 * (float(query.norm()) + self._farthest) ** 2
        best = _Best(query, points, t["order"], t["reaches"], top_k)

        from_a, from_b = self._to_sub_keys(query)
        cells = self._nearest_cells(from_a.square(), from_b.square(), _FIRST)
        best.compare(self._rows(cells))
        bounds = _gap(from_a, t["cell_a"], t["inner_a"], t["outer_a"])
        bounds += _gap(from_b, t["cell_b"], t["inner_b"], t["outer_b"])
        live = bounds <= t["cell_reach"].clamp(max=best.limit) + slack
        visited = int(self._sizes[live].sum())
        # Some cells' rows, or all of them, which takes no copy.
        rows = self._rows(live.nonzero()[:, 0]) if visited < _GATHERED * len(self) else None

        if visited:
            step, code, left = _in_two_bytes(away)
            products = torch._int_mm(_at(t["codes"], rows), code).float()
            products = torch.addcmul(products[:, 0], products[:, 1], products.new_tensor(0.5 / _QUERY_STEPS)).mul_(step)
            near = torch.addcmul(_at(t["squares"], rows), products, _at(t["steps"], rows), value=-2).add_(length**2)
            first = near.topk(min(2 * top_k, len(near)), largest=False).indices
            best.compare(first if rows is None else rows[first])
            # <m, x> = <code, x> + <error, x>, and the same again for what is left of x; Cauchy and Schwarz.
            near.sub_(_at(t["errors"], rows), alpha=2 * length)
            bound = _at(t["reaches"], rows).clamp(max=best.limit)
            keep = (near <= bound + (slack + 2 * left * (2 * self._longest))).nonzero()[:, 0]
            best.compare(keep if rows is None else rows[keep])
        found, distances = best.result()
        return Found(found, distances, visited / len(self), best.compared / len(self))

    def by_keys_alone(self, query: Tensor, count: int) -> Tensor:
        """The points of the cells whose sub-keys are nearest to a query, `count` or a few more: what product keys
        propose without a bound, for comparison."""
        from_a, from_b = self._to_sub_keys(query)
        return self.tensors["order"][self._rows(self._nearest_cells(from_a.square(), from_b.square(), count))].long()

    def without(self, gone: Tensor) -> Self | None:
        """The index of the points that are left, in the same cells, whose bounds hold for fewer too; None if none is.

        Args:
            gone: (n,) bool.
        """
        if gone.all():
            return None
        t = dict(self.tensors)
        order = t["order"].long()
        keep = ~gone[order]
        numbers = (~gone).cumsum(0) - 1  # of the points that are left
        cell_of = torch.repeat_interleave(torch.arange(len(self._sizes)), self._sizes)
        sizes = torch.bincount(cell_of[keep], minlength=len(self._sizes))
        held = sizes > 0
        t["order"] = numbers[order[keep]].to(torch.int32)
        t["starts"] = torch.cat([torch.zeros(1, dtype=torch.int64), sizes[held].cumsum(0)])
        for name in ("codes", "steps", "errors", "squares", "reaches"):
            t[name] = t[name][keep]
        for name in ("cell_a", "cell_b", "cell_reach", "inner_a", "outer_a", "inner_b", "outer_b"):
            t[name] = t[name][held]
        return type(self)(t)

    def num_bytes(self) -> int:
        return tensor_bytes((*self.tensors.values(), self._sizes))

    def _to_sub_keys(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Distances of both halves of a query to their sub-keys, (s,) each."""
        halves = query.split([self._half, len(query) - self._half])
        keys = self.tensors["sub_keys_a"], self.tensors["sub_keys_b"]
        a, b = ((key - half).norm(dim=-1) for key, half in zip(keys, halves, strict=True))
        return a, b

    def _nearest_cells(self, from_a: Tensor, from_b: Tensor, count: int) -> Tensor:
        """The cells of least sum that hold `count` points together, or all of them."""
        t = self.tensors
        sums = from_a.index_select(0, t["cell_a"]) + from_b.index_select(0, t["cell_b"])
        cells = sums.topk(min(count, len(sums)), largest=False).indices  # each holds at least one
        before = self._sizes[cells].cumsum(0) - self._sizes[cells]
        return cells[before < count]

    def _rows(self, cells: Tensor) -> Tensor:
        """The rows of the points in some cells, (r,)."""
        sizes = self._sizes[cells]
        shift = self.tensors["starts"][cells] - (sizes.cumsum(0) - sizes)
        return torch.repeat_interleave(shift, sizes) + torch.arange(int(sizes.sum()))


class _Best:
    """The nearest points so far, among those that were compared whole."""

    def __init__(self, query: Tensor, points: Tensor, order: Tensor, reaches: Tensor, top_k: int) -> None:
        self._query, self._points, self._order, self._reaches = query[None], points, order, reaches
        self._top_k = top_k
        self._rows = torch.empty(0, dtype=torch.int64)
        self._distances = torch.empty(0)
        self._seen: Tensor = torch.empty(0, dtype=torch.int64)
        self.compared = 0
        self.limit = math.inf  # nothing beyond it is among the best

    def compare(self, rows: Tensor) -> None:
        """Compares some rows whole, but for those that it has been given before."""
        rows = rows[~torch.isin(rows, self._seen)]
        self._seen = torch.cat([self._seen, rows])
        self.compared += len(rows)
        found = self._order.index_select(0, rows)
        distances = squared_distances(self._query, self._points.index_select(0, found))[0]
        within = distances <= self._reaches[rows]
        self._rows = torch.cat([self._rows, rows[within]])
        self._distances = torch.cat([self._distances, distances[within]])
        if len(self._rows) >= self._top_k:
            self.limit = float(self._distances.kthvalue(self._top_k).values)

    def result(self) -> tuple[Tensor, Tensor]:
        """Points (k,) and distances (k,), the nearest first, of equally near ones the first."""
        points, by_number = self._order[self._rows].long().sort()
        distances, nearest = self._distances[by_number].sort(stable=True)
        return points[nearest[: self._top_k]], distances[: self._top_k]


def _at(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values.index_select(0, rows)


def _gap(distances: Tensor, keys: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """Least squared distance of a query's half to points whose distance to a sub-key is between `inner` and `outer`,
    from the query's own distance to it: (s,) and (c,) -> (c,)."""
    own = distances.index_select(0, keys)
    return torch.maximum(own - outer, inner - own).clamp_(min=0).square_()


def _in_two_bytes(vector: Tensor) -> tuple[float, Tensor, float]:
    """A vector as step * (high + low / 126): the step, both (d, 2) int8, and the length of what is left."""
    step = float(vector.abs().max()) / _QUERY_STEPS or 1.0
    high = (vector / step).round()
    low = ((vector / step - high) * (2 * _QUERY_STEPS)).round()
    left = vector - step * (high + low / (2 * _QUERY_STEPS))
    return step, torch.stack([high, low], 1).to(torch.int8), float(left.norm())


def _sub_keys(half: Tensor, count: int) -> Tensor:
    """k-means from evenly spaced points: (n, w) -> (s, w)."""
    sample = half[:: math.ceil(len(half) / _SAMPLE)].contiguous()
    keys = sample[torch.linspace(0, len(sample) - 1, count).round().long()].clone()
    for _ in track(range(_ROUNDS), "sub-keys", "rounds"):
        at = _nearest_keys(sample, keys)
        sums = torch.zeros_like(keys).index_add_(0, at, sample)
        members = torch.bincount(at, minlength=count)[:, None]
        keys = torch.where(members > 0, sums / members.clamp(min=1), keys)
    return keys


def _nearest_keys(half: Tensor, keys: Tensor) -> Tensor:
    """(n, w), (s, w) -> (n,) int64."""
    squares = keys.square().sum(-1)
    parts = track(half.split(_AT_ONCE), "cells", "parts")
    return torch.cat([torch.addmm(squares, part, keys.T, alpha=-2).argmin(-1) for part in parts])
