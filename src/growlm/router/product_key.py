"""The product-key router: the gaussian router's answers for stores of very many modules, without comparing with all.

It reads what the gaussian router has fitted, to the bit, and an index of the fitted means (`cells.py`, after PEER's
product keys). The index is made of these means alone and what is found does not depend on it: the order of learning and
what was taken out again leave no trace (guarantee 9), as in the gaussian router.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from growlm.errors import GrowlmError, IntegrityError
from growlm.progress import phase
from growlm.router.cells import Cells, squared_distances
from growlm.router.fitting import load_gaussian
from growlm.router.gaussian import GaussianRouter, domain_evidence, routes_of
from growlm.router.interface import NONE, Route, Router
from growlm.router.lexicon import MOST
from growlm.router.states import mean_pool
from growlm.store import ROUTER_FITTED, ROUTER_INDEX

if TYPE_CHECKING:
    from growlm.store import Store

# b batch, t tokens, d hidden size, c domains

TOP_K = 32  # modules that an answer lists
_FEW = MOST  # modules that are compared one by one in less time than an index takes
_INDEX = 1  # raise it with every change of what `Cells.build` computes: an index that was kept before is made anew


class ProductKeyRouter(Router):
    """The best `top_k` modules of the gaussian router, exactly: the same choice, the same order, equal ones included.

    Scores are the probabilities among these modules and *none*. Where there are no more modules than `top_k` they are
    the gaussian router's own; where there are more, what those that are left out would have had is not taken off.

    Args:
        gaussian: what was fitted.
        cells: the index of its means; None where all are compared.
    """

    kind = "product-key"

    def __init__(self, gaussian: GaussianRouter, cells: Cells | None, top_k: int = TOP_K) -> None:
        self.names, self.forks, self.layer = gaussian.names, gaussian.forks, gaussian.layer
        self.gaussian, self.cells, self.top_k = gaussian, cells, top_k

    @property
    def num_listed(self) -> int:
        return min(self.top_k, len(self.names))

    def route(
        self, hidden: Tensor, visible: Tensor | None = None, texts: Sequence[Sequence[int]] | None = None
    ) -> list[Route]:
        return self.route_pooled(mean_pool(hidden, visible), texts)

    def route_pooled(self, vectors: Tensor, texts: Sequence[Sequence[int]] | None = None) -> list[Route]:
        """Answers for pooled vectors (b, d) of texts, given as token ids."""
        if not self.names:
            return [Route(None, {NONE: 1.0}) for _ in vectors]
        words = self.gaussian.words_of(texts)
        rows = [None] * len(vectors) if words is None else list(words)
        return [self._route(*row) for row in zip(vectors.float().cpu() @ self.gaussian.whiten, rows, strict=True)]

    def _route(self, whitened: Tensor, words: Tensor | None) -> Route:
        """The answer for a whitened vector (d,) and what words say (c,)."""
        means, general, limits = self.gaussian.means, self.gaussian.general, self.gaussian.limits
        found = self._nearest(whitened, words)
        # The gaussian router goes on with those that cannot be chosen, in the names' order.
        room = self.num_listed - len(found)
        if room:
            among = set(found)
            found += [i for i in range(self.top_k) if i not in among][:room]
        listed = torch.tensor(sorted(found))
        distances = squared_distances(whitened[None], means[listed])
        names = [self.names[i] for i in listed.tolist()]
        said = None if words is None else words[None, listed]
        return routes_of(names, distances, limits[listed], squared_distances(whitened[None], general), said)[0]

    def _nearest(self, whitened: Tensor, words: Tensor | None) -> list[int]:
        """Modules that can be chosen, those that most speaks for first, `top_k` at most."""
        means, limits = self.gaussian.means, self.gaussian.limits
        if self.cells is not None and words is None:
            return self.cells.nearest(whitened, means, self.top_k).points.tolist()
        evidence = domain_evidence(squared_distances(whitened[None], means)[0], limits, words)
        within = evidence.isfinite().nonzero()[:, 0]
        return within[evidence[within].argsort(descending=True, stable=True)[: self.top_k]].tolist()

    def without(self, names: Collection[str]) -> ProductKeyRouter:
        cells = self.cells
        if cells is not None:
            cells = cells.without(torch.tensor([name in names for name in self.names]))
        return ProductKeyRouter(self.gaussian.without(names), cells, self.top_k)

    def num_bytes(self) -> int:
        return self.gaussian.num_bytes() + (self.cells.num_bytes() if self.cells is not None else 0)


def load_product_key(store: Store, among: Collection[str] | None = None) -> Router:
    """The store's gaussian router with an index of its means, which is kept and made anew when they have changed.

    Args:
        among: names of modules; the router then is what it would be if the store held no others.

    Raises:
        IntegrityError: a file of the router is not what its manifest says.
    """
    gaussian = load_gaussian(store, among)
    if len(gaussian.names) <= _FEW:
        return ProductKeyRouter(gaussian, None)
    cells = _read_cells(store, gaussian)
    if cells is None:
        with phase("indexing the router"):
            cells = Cells.build(gaussian.means, gaussian.limits)
        if gaussian.fitted is not None:
            with suppress(OSError, GrowlmError), store.lock():  # a store on a read-only disk still routes
                if store.router_files(ROUTER_FITTED).digest() == gaussian.fitted:
                    store.router_files(ROUTER_INDEX).write(cells.tensors | {"members": _members(gaussian.fitted)})
    return ProductKeyRouter(gaussian, cells)


def _read_cells(store: Store, gaussian: GaussianRouter) -> Cells | None:
    if gaussian.fitted is None:
        return None
    try:
        tensors = store.router_files(ROUTER_INDEX).read()
    except IntegrityError:
        return None  # derived from what was fitted: made anew
    if tensors is None or not torch.equal(tensors.pop("members"), _members(gaussian.fitted)):
        return None
    return Cells(tensors)


def _members(fitted: str) -> Tensor:
    """Tells of which fitted file an index is, and made in which way, (32,) uint8."""
    return torch.tensor(list(hashlib.sha256(f"index {_INDEX}, fitted {fitted}".encode()).digest()), dtype=torch.uint8)
