"""The gaussian router: linear discriminant analysis that grows, one mean a domain and one covariance for all.

Both come from sums of integers, so that they are exact: a domain added later, earlier, or taken out again leaves the
same bits (guarantee 9), and no old text is needed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from growlm.base import tensor_bytes
from growlm.base.padding import pad_right
from growlm.disk.tensors import as_bytes, read_tensors, require_kinds
from growlm.errors import GrowlmError, IntegrityError, StoreError
from growlm.progress import Phase, phase, track
from growlm.router.cells import squared_distances
from growlm.router.interface import NONE, Route, Router
from growlm.router.states import base_states, pool
from growlm.store import GENERAL, MANIFEST, ROUTER_DERIVED, ROUTER_FITTED, ROUTER_SUMS

if TYPE_CHECKING:
    from growlm.base import Base
    from growlm.store import Store, StoredModule

# b batch, t tokens, d hidden size, n samples, c classes

# Kept in a module's own folder: gone with it, and with nothing else.
EVIDENCE = "router.safetensors"  # what every fit reads: the sum of the vectors, and the held-out texts
VECTORS = "router-vectors.safetensors"

_KINDS = {
    EVIDENCE: {"heldout": (torch.int16, 2), "sum": (torch.int64, 1), "count": (torch.int64, 1)},
    VECTORS: {"vectors": (torch.int16, 2)},
    GENERAL: {"vectors": (torch.int16, 2), "heldout": (torch.int16, 2)},
    ROUTER_SUMS: {"gram": (torch.int64, 2), "members": (torch.uint8, 1)},
    ROUTER_FITTED: {
        "means": (torch.float32, 2),
        "whiten": (torch.float32, 2),
        "limits": (torch.float32, 1),
        "forks": (torch.int64, 1),
        "members": (torch.uint8, 1),
    },
}
_SCALE = 1024  # steps a unit: pooled states have root mean square 1 and are kept as int16
_SHORTEST, _LONGEST = 8, 256  # tokens of the texts that the router is shown while learning
_CUTS = 4  # lengths that each passage is cut to
_SHRINK = 0.003  # least share of the covariance between features that is taken away
_FIT = 1  # raise it with every change of what `_fit` computes: a fit that was kept before is then made anew


class GaussianRouter(Router):
    """Class means and one shared covariance of pooled hidden states, with a bound per class for *none*.

    Attributes:
        whiten: (d, d).
        means: (c, d), whitened; the last class is general text.
        limits: (c - 1,) largest squared distance at which a text still belongs.
        fitted: sha256 of the file that holds what was fitted; None where it was not kept, or names were taken out.
    """

    kind = "gaussian"

    def __init__(
        self,
        names: list[str],
        means: Tensor,
        whiten: Tensor,
        limits: Tensor,
        forks: dict[str, int],
        fitted: str | None = None,
    ) -> None:
        self.names = names
        self.forks = forks
        self.fitted = fitted
        self.whiten = whiten
        self.means = means
        self.limits = limits

    def route(self, hidden: Tensor, visible: Tensor | None = None) -> list[Route]:
        return self.route_pooled(pool(hidden, visible))

    def route_pooled(self, vectors: Tensor) -> list[Route]:
        """Answers for pooled vectors (b, d)."""
        if not self.names:
            return [Route(None, {NONE: 1.0}) for _ in vectors]
        distances = squared_distances(vectors.float().cpu() @ self.whiten, self.means)
        return routes_of(self.names, distances, self.limits)

    def without(self, names: Collection[str]) -> GaussianRouter:
        kept = [i for i, name in enumerate(self.names) if name not in names]
        left = [self.names[i] for i in kept]
        means, limits = self.means[[*kept, -1]], self.limits[kept]
        return GaussianRouter(left, means, self.whiten, limits, {name: self.forks[name] for name in left})

    def num_bytes(self) -> int:
        return tensor_bytes((self.means, self.whiten, self.limits))


def routes_of(names: Sequence[str], distances: Tensor, limits: Tensor) -> list[Route]:
    """Answers from squared distances (b, c), of which the last is that to general text, and limits (c - 1,)."""
    # A domain out of its own bound cannot be chosen, however far the others are.
    evidence = -0.5 * distances
    evidence[:, :-1] = evidence[:, :-1].masked_fill(distances[:, :-1] > limits, -math.inf)
    scores = torch.softmax(evidence, dim=-1)
    # By evidence, and not by scores alone: of far domains all scores are 0.
    order = evidence.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, scores.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    labels = [*names, NONE]
    routes = []
    for row, ranks in zip(scores.tolist(), order.tolist(), strict=True):
        best = labels[ranks[0]]
        routes.append(Route(None if best == NONE else best, {labels[i]: row[i] for i in ranks}))
    return routes


# What is kept of a domain


def evidence(
    base: Base, train: Sequence[Sequence[int]], heldout: Sequence[Sequence[int]], *, seed: int = 0
) -> dict[str, Tensor]:
    """What the router needs to know of a domain: pooled states of the beginnings of passages.

    Args:
        train, heldout: token ids of passages, at least one each.

    Returns:
        `vectors` and `heldout`, int16 (n, d) each; no text, no tokens.
    """
    with phase("showing the router the text", len(train) + len(heldout), "passages") as showing:
        return {
            "vectors": _pooled_beginnings(base, train, showing, seed=seed),
            "heldout": _pooled_beginnings(base, heldout, showing, seed=seed + 1),
        }


def files_of(evidence: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Evidence as the files that lie beside a module's weights, for `Store.commit`."""
    vectors = evidence["vectors"]
    summary = {
        "heldout": evidence["heldout"],
        "sum": vectors.long().sum(0),
        "count": torch.tensor([len(vectors)]),
    }
    return {EVIDENCE: summary, VECTORS: {"vectors": vectors}}


@torch.no_grad()
def _pooled_beginnings(base: Base, passages: Sequence[Sequence[int]], showing: Phase, *, seed: int) -> Tensor:
    """Pooled states (n, d) of each passage cut to several lengths. Prompts are short, so lengths are log-uniform; one
    forward pass gives them all, because attention is causal."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    for at in range(0, len(passages), 16):
        some = [list(p[:_LONGEST]) for p in passages[at : at + 16]]
        ids, real = pad_right(some)
        lengths = real.sum(-1)
        states, _ = base_states(base, ids.tolist())
        shortest = lengths.clamp(max=_SHORTEST)
        for _ in range(_CUTS):
            share = torch.rand(len(some), generator=generator)
            cut = (shortest * (lengths / shortest) ** share).round().long()
            rows.append(pool(states, torch.arange(ids.shape[1]) < cut[:, None]).cpu())
        showing.advance(len(some))
    return (torch.cat(rows) * _SCALE).round().clamp(-32768, 32767).to(torch.int16)


# The sums of all domains, and what is fitted to them


def write_general(store: Store, base: Base, train: Sequence[Sequence[int]], heldout: Sequence[Sequence[int]]) -> None:
    """Records what general text, the class *none*, looks like to this base."""
    tensors = evidence(base, train, heldout)
    with store.lock():
        store.router_files(GENERAL).write(tensors)
        for derived in ROUTER_DERIVED:
            store.router_files(derived).drop()


def has_general(store: Store) -> bool:
    return store.router_files(GENERAL).digest() is not None


def add_domain(store: Store, new: StoredModule, old: StoredModule | None) -> None:
    """Adds a domain's evidence to the sums, in time that does not depend on how many there are.

    Sums that do not match the store's modules, after a kill or a removal, are made anew when next read; and so are they
    where the old version's share cannot be read.
    """
    with store.lock():
        sums = _read_sums(store)
        if sums is None:
            return
        gram, digest = sums
        gram += _gram(_read_kept(new, VECTORS, len(gram))["vectors"])
        digest = _combine(digest, new, +1)
        if old is not None:
            try:
                gram -= _gram(_read_kept(old, VECTORS, len(gram))["vectors"])
                digest = _combine(digest, old, -1)
            except StoreError:  # it had no evidence, or is damaged: that is no reason to fail, the new one is saved
                store.router_files(ROUTER_SUMS).drop()
                return
        store.router_files(ROUTER_SUMS).write({"gram": gram, "members": _pack(digest)})


def load_gaussian(store: Store, among: Collection[str] | None = None) -> GaussianRouter:
    """The gaussian router, fitted to the store's current modules.

    What was fitted is kept; it is fitted again when the modules or the general text have changed since.

    Args:
        among: names of modules; the router then is what it would be if the store held no others.

    Raises:
        IntegrityError: a file of the router is not what its manifest says.
    """
    while True:
        modules = [m for m in store.modules.values() if among is None or m.name in among]
        try:
            return _load(store, modules, whole=among is None)
        except FileNotFoundError:
            continue  # a module went between the listing and the look at it
        except IntegrityError:
            # A module that was removed or replaced meanwhile is not a damaged one.
            if all((m.folder / MANIFEST).exists() for m in modules):
                raise


def _load(store: Store, modules: Sequence[StoredModule], *, whole: bool) -> GaussianRouter:
    described = store.router_files(GENERAL).digest()
    mark = _mark(modules, described)
    file = _fitted_digest(store) if whole else None
    fitted = _read_derived(store, ROUTER_FITTED) if whole else None
    if fitted is not None and _unpack(fitted["members"]) == mark and len(fitted["forks"]) == len(modules):
        forks = dict(zip([m.name for m in modules], fitted["forks"].tolist(), strict=True))
        file = file if file == _fitted_digest(store) else None  # another process has replaced it meanwhile
        return _gaussian(forks, fitted["means"], fitted["whiten"], fitted["limits"], file)
    file = None
    # A module that was saved without evidence can be asked for by name, and is never chosen.
    routed = [m for m in modules if EVIDENCE in m.manifest.files]
    if not routed:
        return _gaussian({}, torch.zeros(0, 0), torch.zeros(0, 0), torch.zeros(0))
    general = store.router_files(GENERAL).read()
    if general is None:
        raise IntegrityError(f"{store.router_path / GENERAL}: is missing; restore it, or make the store again")
    require_kinds(store.router_path / GENERAL, general, _KINDS[GENERAL])
    gram = _current_gram(store, routed, general) if whole else _total_gram(routed, general)
    with phase("fitting the router"):
        means, whiten, limits = _fit(routed, general, gram)
    chosen = {m.name for m in routed}
    forks = {m.name: m.manifest.fork if m.name in chosen else -1 for m in modules}
    if whole:
        kept = {"means": means, "whiten": whiten, "limits": limits}
        kept |= {"forks": torch.tensor(list(forks.values())), "members": _pack(mark)}
        with suppress(OSError, GrowlmError), store.lock():  # a store on a read-only disk still routes
            if _mark(list(store.modules.values()), store.router_files(GENERAL).digest()) == mark:
                store.router_files(ROUTER_FITTED).write(kept)
                file = _fitted_digest(store)
    return _gaussian(forks, means, whiten, limits, file)


def _gaussian(
    forks: dict[str, int], means: Tensor, whiten: Tensor, limits: Tensor, fitted: str | None = None
) -> GaussianRouter:
    known = {name: fork for name, fork in forks.items() if fork >= 0}
    return GaussianRouter(list(known), means, whiten, limits, known, fitted)


def _fitted_digest(store: Store) -> str | None:
    try:
        return store.router_files(ROUTER_FITTED).digest()
    except IntegrityError:
        return None


def _current_gram(store: Store, modules: Sequence[StoredModule], general: dict[str, Tensor]) -> Tensor:
    """The sum of squares over all texts: the kept one if it is of these modules, else made anew."""
    wanted = int.from_bytes(hashlib.sha256(as_bytes(general["vectors"])).digest(), "big")
    for module in modules:
        wanted = _combine(wanted, module, +1)
    sums = _read_sums(store)
    if sums is not None and sums[1] == wanted:
        return sums[0]
    gram = _total_gram(modules, general)
    with suppress(OSError, GrowlmError), store.lock():
        store.router_files(ROUTER_SUMS).write({"gram": gram, "members": _pack(wanted)})
    return gram


def _total_gram(modules: Sequence[StoredModule], general: dict[str, Tensor]) -> Tensor:
    gram = _gram(general["vectors"])
    for module in track(modules, "reading the router's evidence", "modules"):
        gram += _gram(_read_kept(module, VECTORS, len(gram))["vectors"])
    return gram


def _fit(modules: Sequence[StoredModule], general: dict[str, Tensor], gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whitened means (c, d), the whitening (d, d), and how far each domain reaches (c - 1,).

    Modules' files are read one at a time: memory does not grow with what is kept of a domain.
    """
    sums, counts = [], []
    for module in track(modules, "means", "modules"):
        kept = _read_kept(module, EVIDENCE, len(gram))
        sums.append(kept["sum"].clone())  # not a view of the whole file
        counts.append(int(kept["count"]))
    total = torch.stack([*sums, general["vectors"].long().sum(0)]).double()
    size = torch.tensor([*counts, len(general["vectors"])], dtype=torch.float64)
    means = total / size[:, None]
    # Scatter within classes: every sample's square, less what the class means explain.
    within = gram.double() - total.T @ means
    covariance = within / max(float(size.sum()) - len(size), 1.0) / _SCALE**2
    # Few samples for many features make a covariance that is sure of too much: keep more of its diagonal alone.
    shrink = min(max(_SHRINK, 0.05 * len(covariance) / float(size.sum())), 0.5)
    variance = covariance.diagonal().clamp(min=1e-9)
    covariance = (1 - shrink) * covariance + torch.diag(shrink * variance + 1e-9)
    # x^T cov^-1 x = |x^T inv(L)^T|^2 with cov = L L^T.
    lower = torch.linalg.cholesky(covariance)
    whiten = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=torch.float64), upper=False).T
    means, whiten = ((means / _SCALE) @ whiten).float(), whiten.float().contiguous()
    other = _whitened(general["heldout"], whiten)
    limits = [
        _limit(_whitened(_read_kept(module, EVIDENCE, len(gram))["heldout"], whiten) - mean, other - mean)
        for module, mean in zip(track(modules, "limits", "modules"), means[:-1], strict=True)
    ]
    return means, whiten, torch.stack(limits)


def _whitened(vectors: Tensor, whiten: Tensor) -> Tensor:
    return (vectors.float() / _SCALE) @ whiten


def _limit(own: Tensor, general: Tensor) -> Tensor:
    """How far a text may be from a domain's mean, from the whitened differences of held-out texts to that mean:
    beyond nearly all of the domain's own text, and half way on to general text where that is farther still."""
    reach = own.square().sum(-1).quantile(0.98) * 1.25
    others = general.square().sum(-1).quantile(0.05)
    return torch.maximum(reach, (reach * others).sqrt())


def _gram(vectors: Tensor) -> Tensor:
    """Sum over samples of x x^T, exact: products below 2^30 and their sums below 2^53 are whole in float64."""
    assert len(vectors) < 1 << 22
    x = vectors.double()
    return (x.T @ x).to(torch.int64)


def _read_kept(module: StoredModule, file: str, width: int) -> dict[str, Tensor]:
    """
    Args:
        width: of the base's states.

    Raises:
        IntegrityError: the file is not what the manifest says, or not such a file.
    """
    digest = module.manifest.files.get(file)
    if digest is None:
        raise IntegrityError(f"{module.folder}: holds no {file}; learn {module.name!r} again")
    kept = read_tensors(module.folder / file, sha256=digest)
    require_kinds(module.folder / file, kept, _KINDS[file])
    count = kept.get("count", torch.ones(1))
    if len(count) != 1 or count[0] < 1 or any(t.shape[-1] != width for name, t in kept.items() if name != "count"):
        raise IntegrityError(
            f"{module.folder / file}: not of states of {width} numbers, or of no text; learn {module.name!r} again"
        )
    return kept


def _read_sums(store: Store) -> tuple[Tensor, int] | None:
    tensors = _read_derived(store, ROUTER_SUMS)
    return None if tensors is None else (tensors["gram"], _unpack(tensors["members"]))


def _read_derived(store: Store, name: str) -> dict[str, Tensor] | None:
    try:
        tensors = store.router_files(name).read()
        if tensors is not None:
            require_kinds(name, tensors, _KINDS[name])
        return tensors
    except IntegrityError:
        return None  # derived from the modules' own evidence: made anew


def _mark(modules: Sequence[StoredModule], general: str | None) -> int:
    """Tells one state of the store from another, and one way to fit from another, without opening a module's file."""
    digest = hashlib.sha256(f"fit {_FIT}, general {general}".encode())
    for module in modules:
        stat = (module.folder / MANIFEST).stat()
        digest.update(f"\n{module.name}/{module.version} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}".encode())
    return int.from_bytes(digest.digest(), "big")


def _combine(digest: int, module: StoredModule, sign: int) -> int:
    """A hash of a set that does not depend on order, and from which a member can be taken out again."""
    content = module.manifest.files.get(VECTORS)
    member = hashlib.sha256(f"{module.name}/{module.version}/{content}".encode()).digest()
    return (digest + sign * int.from_bytes(member, "big")) % (1 << 256)


def _pack(digest: int) -> Tensor:
    return torch.tensor(list(digest.to_bytes(32, "big")), dtype=torch.uint8)


def _unpack(members: Tensor) -> int:
    return int.from_bytes(bytes(members.tolist()), "big")
