"""Fitting: a store's evidence -> the gaussian router, kept until the evidence changes.

Means and covariance come from sums of integers, so that they are exact: a domain added later, earlier, or taken out
again leaves the same bits (guarantee 9), and no old text is needed. Knows evidence and files; reads no text.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from growlm.disk.tensors import as_bytes
from growlm.errors import GrowlmError, GrowlmWarning, IntegrityError, StoreError, UnknownModuleError
from growlm.progress import phase, track
from growlm.router.derived import read_derived
from growlm.router.evidence import EVIDENCE, SCALE, VECTORS, read_evidence, read_general, require_same_states
from growlm.router.gaussian import GaussianRouter
from growlm.router.lexicon import Lexicon, drop_lexicon, load_lexicon
from growlm.store import GENERAL, MANIFEST, ROUTER_FITTED, ROUTER_SUMS

if TYPE_CHECKING:
    from growlm.store import Store, StoredModule

# d hidden size, n samples, c classes

_KINDS = {
    ROUTER_SUMS: {"gram": (torch.int64, 2), "members": (torch.uint8, 1)},
    ROUTER_FITTED: {
        "means": (torch.float32, 2),
        "general": (torch.float32, 2),
        "whiten": (torch.float32, 2),
        "limits": (torch.float32, 1),
        "forks": (torch.int64, 1),
        "worded": (torch.uint8, 1),
        "members": (torch.uint8, 1),
    },
}
_SHRINK = 0.003  # least share of the covariance between features that is taken away
_FRAMED = 0.2  # what changes by frames count, of all texts: the same share however many domains there are
_FIT = 3  # raise it with every change of what `_fit` computes: a fit that was kept before is then made anew


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
        gram += gram_of(read_evidence(new, VECTORS, len(gram))["vectors"])
        digest = _combine(digest, new, +1)
        if old is not None:
            try:
                gram -= gram_of(read_evidence(old, VECTORS, len(gram))["vectors"])
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
        except UnknownModuleError:
            continue  # a module went between the listing and the look at it


def _load(store: Store, modules: Sequence[StoredModule], *, whole: bool) -> GaussianRouter:
    described = store.router_files(GENERAL).digest()
    mark = _mark(store, modules, described)

    def current() -> int:
        return _mark(store, list(store.modules.values()), store.router_files(GENERAL).digest())

    file = _fitted_digest(store) if whole else None
    fitted = read_derived(store, ROUTER_FITTED, _KINDS[ROUTER_FITTED]) if whole else None
    if fitted is not None and _unpack(fitted["members"]) == mark and len(fitted["forks"]) == len(modules):
        forks = dict(zip([m.name for m in modules], fitted["forks"].tolist(), strict=True))
        file = file if file == _fitted_digest(store) else None  # another process has replaced it meanwhile
        parts = Fitted(fitted["means"], fitted["general"], fitted["whiten"], fitted["limits"])
        worded = bool(fitted["worded"][0])  # told here, so that no module's manifest is opened
        if worded:
            lexicon = load_lexicon(store, [m for m in modules if forks[m.name] >= 0], mark, current)
        else:
            lexicon = None
            drop_lexicon(store)
        return _gaussian(store, forks, parts, file, lexicon)
    file = None
    # A module that was saved without evidence can be asked for by name, and is never chosen.
    routed = []
    for module in modules:
        if EVIDENCE in module.manifest.files:
            try:
                require_same_states(store, module)
                routed.append(module)
            except IntegrityError as error:
                warnings.warn(f"{error}; until then it is never chosen", GrowlmWarning, stacklevel=2)
    if not routed:
        empty = torch.zeros(0, 0)
        return _gaussian(store, {}, Fitted(empty, empty, empty, torch.zeros(0)))
    general = read_general(store)
    gram = _current_gram(store, routed, general) if whole else _total_gram(routed, general)
    with phase("fitting the router"):
        parts = fit([partial(read_evidence, module, EVIDENCE, len(gram)) for module in routed], general, gram)
    chosen = {m.name for m in routed}
    forks = {m.name: m.manifest.fork if m.name in chosen else -1 for m in modules}
    if whole:
        kept = parts._asdict() | {"forks": torch.tensor(list(forks.values())), "members": _pack(mark)}
        kept["worded"] = torch.tensor([any(m.text_files for m in routed)], dtype=torch.uint8)
        with suppress(OSError, GrowlmError), store.lock():  # a store on a read-only disk still routes
            if current() == mark:
                store.router_files(ROUTER_FITTED).write(kept)
                file = _fitted_digest(store)
    return _gaussian(store, forks, parts, file, load_lexicon(store, routed, mark if whole else None, current))


def _gaussian(
    store: Store, forks: dict[str, int], parts: Fitted, fitted: str | None = None, lexicon: Lexicon | None = None
) -> GaussianRouter:
    known = {name: fork for name, fork in forks.items() if fork >= 0}
    return GaussianRouter(list(known), *parts, known, fitted, store.manifest.routing_layer, lexicon)


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
    gram = gram_of(general["vectors"])
    for module in track(modules, "reading the router's evidence", "modules"):
        gram += gram_of(read_evidence(module, VECTORS, len(gram))["vectors"])
    return gram


class Fitted(NamedTuple):
    """What is fitted to c domains and f forms of general text.

    Attributes:
        means: (c, d), of domains, whitened.
        general: (f, d), of forms of general text, whitened.
        whiten: (d, d).
        limits: (c,) how far each domain reaches, a squared distance.
    """

    means: Tensor
    general: Tensor
    whiten: Tensor
    limits: Tensor


def fit(evidence: Sequence[Callable[[], Mapping[str, Tensor]]], general: Mapping[str, Tensor], gram: Tensor) -> Fitted:
    """Fits means, one covariance for all classes, and limits. Every form of general text is a class: one mean of
    questions and stories would lie among neither. What a frame changes in a text counts as scatter within classes,
    since it says nothing of what the text is about (nuisance attributes: Solomonoff et al., 2005).

    Args:
        evidence: of each domain in turn, what reads its summary (`EVIDENCE`): one is in memory at a time.
        general: `vectors`, `forms`, `heldout` and `frames`, as `read_general` gives them.
        gram: (d, d) int64, the sum of squares over all vectors, general ones too.
    """
    sums, counts = [], []
    for read in track(evidence, "means", "modules"):
        kept = read()
        sums.append(kept["sum"].clone())  # not a view of the whole file
        counts.append(int(kept["count"]))
    forms = general["vectors"].split(general["forms"].tolist())
    total = torch.stack([*sums, *(form.long().sum(0) for form in forms)]).double()
    size = torch.tensor([*counts, *map(len, forms)], dtype=torch.float64)
    means = total / size[:, None]
    # Scatter within classes: every sample's square, less what the class means explain.
    within = gram.double() - total.T @ means
    if len(frames := general["frames"]):
        within += _FRAMED * size.sum() / len(frames) * gram_of(frames).double()
    covariance = within / max(float(size.sum()) - len(size), 1.0) / SCALE**2
    # Few samples for many features make a covariance that is sure of too much: keep more of its diagonal alone.
    shrink = min(max(_SHRINK, 0.05 * len(covariance) / float(size.sum())), 0.5)
    variance = covariance.diagonal().clamp(min=1e-9)
    covariance = (1 - shrink) * covariance + torch.diag(shrink * variance + 1e-9)
    # x^T cov^-1 x = |x^T inv(L)^T|^2 with cov = L L^T.
    lower = torch.linalg.cholesky(covariance)
    whiten = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=torch.float64), upper=False).T
    whitened, whiten = ((means / SCALE) @ whiten).float(), whiten.float().contiguous()
    means, of_general = whitened[: len(evidence)].clone(), whitened[len(evidence) :].clone()
    other = _whitened(general["heldout"], whiten)
    limits = [
        _limit(_whitened(read()["heldout"], whiten) - mean, other - mean)
        for read, mean in zip(track(evidence, "limits", "modules"), means, strict=True)
    ]
    return Fitted(means, of_general, whiten, torch.stack(limits))


def _whitened(vectors: Tensor, whiten: Tensor) -> Tensor:
    return (vectors.float() / SCALE) @ whiten


def _limit(own: Tensor, general: Tensor) -> Tensor:
    """How far a text may be from a domain's mean, from the whitened differences of held-out texts to that mean:
    beyond nearly all of the domain's own text, and half way on to general text where that is farther still."""
    reach = own.square().sum(-1).quantile(0.98) * 1.25
    others = general.square().sum(-1).quantile(0.05)
    return torch.maximum(reach, (reach * others).sqrt())


def gram_of(vectors: Tensor) -> Tensor:
    """Sum over samples of x x^T, exact: products below 2^30 and their sums below 2^53 are whole in float64."""
    assert len(vectors) < 1 << 22
    x = vectors.double()
    return (x.T @ x).to(torch.int64)


def _read_sums(store: Store) -> tuple[Tensor, int] | None:
    tensors = read_derived(store, ROUTER_SUMS, _KINDS[ROUTER_SUMS])
    return None if tensors is None else (tensors["gram"], _unpack(tensors["members"]))


def _mark(store: Store, modules: Sequence[StoredModule], general: str | None) -> int:
    """Tells one state of the store from another, and one way to fit from another, without opening a module's file."""
    layer = store.manifest.routing_layer
    digest = hashlib.sha256(f"fit {_FIT}, layer {layer}, general {general}".encode())
    for module in modules:
        with module.reading():
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
