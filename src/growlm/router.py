"""Router: hidden states of the base -> ranked modules, or none of them.

Knows what the base's last layer says about a text and what was kept of each domain; never loads a module's weights.
Every kind of router answers through `Router.route`, so that the engine and evaluation need not know which it is.

The `gaussian` kind is linear discriminant analysis that grows: one mean a domain and one covariance for all, both from
sums. The sums are of integers, so that they are exact: a domain added later, earlier, or taken out again leaves the
same bits (guarantee 9), and no old text is needed.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from growlm.errors import GrowlmError, IntegrityError
from growlm.files import as_bytes, read_tensors
from growlm.store import ROUTER_SUMS

if TYPE_CHECKING:
    from growlm.modules.base import Base
    from growlm.store import Store, StoredModule

# b batch, t tokens, d hidden size, n samples, c classes

EVIDENCE = "router.safetensors"  # kept in a module's own folder: gone with it, and with nothing else
NONE = "none"

_SCALE = 1024  # steps a unit: pooled states have root mean square 1 and are kept as int16
_GENERAL = "general"
_SHORTEST, _LONGEST = 8, 256  # tokens of the texts that the router is shown while learning
_CUTS = 4  # lengths that each passage is cut to
_SHRINK = 0.003  # least share of the covariance between features that is taken away


@dataclass(frozen=True)
class Route:
    """The router's answer for one text.

    Attributes:
        module: the chosen module's name, or None for none of these.
        scores: probability of every module and of `"none"`, best first; they sum to 1.
    """

    module: str | None
    scores: dict[str, float]


class Router(ABC):
    """Chooses modules from the base's own hidden states."""

    kind: str
    names: list[str]

    @abstractmethod
    def route(self, hidden: Tensor, visible: Tensor | None = None) -> list[Route]:
        """
        Args:
            hidden: the base's states after its final norm, (b, t, d).
            visible: (b, t) bool, False where padded.
        """

    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes that the router keeps in memory."""


def pool(hidden: Tensor, visible: Tensor | None = None) -> Tensor:
    """One vector a text: the mean over tokens of (b, t, d), scaled to root mean square 1; (b, d) float32.

    The first token is left out of texts that have another: attention parks on it, and its state says little.
    """
    hidden = hidden.float()
    batch, tokens, _ = hidden.shape
    seen = torch.ones(batch, tokens, dtype=torch.bool) if visible is None else visible.bool()
    seen = seen.to(hidden.device)
    first = seen & (seen.cumsum(-1) == 1)
    seen = torch.where(seen.sum(-1, keepdim=True) > 1, seen & ~first, seen)
    mean = (hidden * seen[..., None]).sum(1) / seen.sum(-1, keepdim=True)
    return mean * torch.rsqrt(mean.square().mean(-1, keepdim=True) + 1e-12)


class GaussianRouter(Router):
    """Class means and one shared covariance of pooled hidden states, with a bound per class for *none*."""

    kind = "gaussian"

    def __init__(self, names: list[str], means: Tensor, whiten: Tensor, limits: Tensor) -> None:
        self.names = names
        self._whiten = whiten  # (d, d)
        self._means = means  # (c, d) whitened; the last class is general text
        self._limits = limits  # (c - 1,) largest squared distance at which a text still belongs

    def route(self, hidden: Tensor, visible: Tensor | None = None) -> list[Route]:
        return self.route_pooled(pool(hidden, visible))

    def route_pooled(self, vectors: Tensor) -> list[Route]:
        """Answers for pooled vectors (b, d)."""
        if not self.names:
            return [Route(None, {NONE: 1.0}) for _ in vectors]
        distances = torch.cdist(vectors.float().cpu() @ self._whiten, self._means).square()
        # A domain out of its own bound cannot be chosen, however far the others are.
        outside = distances[:, :-1] > self._limits
        evidence = -0.5 * distances
        evidence[:, :-1] = evidence[:, :-1].masked_fill(outside, -math.inf)
        scores = torch.softmax(evidence, dim=-1)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        labels = [*self.names, NONE]
        routes = []
        for row, ranks in zip(scores.tolist(), order.tolist(), strict=True):
            best = labels[ranks[0]]
            routes.append(Route(None if best == NONE else best, {labels[i]: row[i] for i in ranks}))
        return routes

    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._means, self._whiten, self._limits))


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
    return {
        "vectors": _pooled_beginnings(base, train, seed=seed),
        "heldout": _pooled_beginnings(base, heldout, seed=seed + 1),
    }


@torch.no_grad()
def _pooled_beginnings(base: Base, passages: Sequence[Sequence[int]], *, seed: int) -> Tensor:
    """Pooled states (n, d) of each passage cut to several lengths. Prompts are short, so lengths are log-uniform; one
    forward pass gives them all, because attention is causal."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    for at in range(0, len(passages), 16):
        some = [list(p[:_LONGEST]) for p in passages[at : at + 16]]
        lengths = torch.tensor([len(p) for p in some])
        padded = torch.zeros(len(some), int(lengths.max()), dtype=torch.long)
        for row, tokens in enumerate(some):
            padded[row, : len(tokens)] = torch.tensor(tokens)
        states, _ = base_states(base, padded.tolist())
        shortest = lengths.clamp(max=_SHORTEST)
        for _ in range(_CUTS):
            share = torch.rand(len(some), generator=generator)
            cut = (shortest * (lengths / shortest) ** share).round().long()
            rows.append(pool(states, torch.arange(padded.shape[1]) < cut[:, None]).cpu())
    return (torch.cat(rows) * _SCALE).round().clamp(-32768, 32767).to(torch.int16)


@torch.no_grad()
def base_states(base: Base, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """The base's states after its final norm (b, t, d) for token ids padded on the left, and which are visible."""
    input_ids, visible = pad_left(texts, base.device)
    hidden, shared = base.begin(input_ids, visible=visible)
    hidden = base.run(base.embed_positions(hidden, shared.positions), base.steps(), shared)
    return base.norm(hidden), visible


def pad_left(texts: Sequence[Sequence[int]], device: Any = "cpu") -> tuple[Tensor, Tensor | None]:
    """Token ids (b, t) padded on the left with id 0, and (b, t) bool, False where padded; None if nowhere."""
    longest = max(len(t) for t in texts)
    input_ids = torch.zeros(len(texts), longest, dtype=torch.long)
    visible = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, tokens in enumerate(texts):
        input_ids[row, longest - len(tokens) :] = torch.tensor(tokens, dtype=torch.long)
        visible[row, longest - len(tokens) :] = True
    return input_ids.to(device), None if visible.all() else visible.to(device)


# The sums of all domains


def write_general(store: Store, base: Base, train: Sequence[Sequence[int]], heldout: Sequence[Sequence[int]]) -> None:
    """Records what general text, the class *none*, looks like to this base."""
    tensors = evidence(base, train, heldout)
    with store.lock():
        store.write_router_file(_GENERAL, tensors)
        store.drop_router_file(ROUTER_SUMS)


def has_general(store: Store) -> bool:
    return store.router_file(_GENERAL) is not None


def add_domain(store: Store, new: StoredModule, old: StoredModule | None) -> None:
    """Adds a domain's evidence to the sums, in time that does not depend on how many there are.

    Sums that do not match the store's modules, after a kill or a removal, are made anew when next read.
    """
    with store.lock():
        sums = _read_sums(store)
        if sums is None:
            return
        gram, digest = sums
        gram += _gram(_read_evidence(new)["vectors"])
        digest = _combine(digest, new, +1)
        if old is not None:
            gram -= _gram(_read_evidence(old)["vectors"])
            digest = _combine(digest, old, -1)
        store.write_router_file(ROUTER_SUMS, {"gram": gram, "members": _pack(digest)})


def load_router(store: Store, among: Collection[str] | None = None) -> Router:
    """The store's router, fitted to its current modules.

    Args:
        among: names of modules; the router then is what it would be if the store held no others.

    Raises:
        IntegrityError: a file of the router is not what its manifest says.
    """
    modules = [m for m in store.modules.values() if among is None or m.name in among]
    entries = [_read_evidence(m) for m in modules]
    general = store.router_file(_GENERAL)
    if modules and general is None:
        raise IntegrityError(f"{store.router_path / _GENERAL}: is missing; restore it, or make the store again")
    names = [m.name for m in modules]
    if among is not None:
        return _fit(names, entries, general, _total_gram(entries, general))
    sums = _read_sums(store)
    wanted = 0
    if general is not None:
        wanted = int.from_bytes(hashlib.sha256(as_bytes(general["vectors"])).digest(), "big")
    for module in modules:
        wanted = _combine(wanted, module, +1)
    if sums is None or sums[1] != wanted:
        sums = _rebuild(store, entries, general, wanted)
    return _fit(names, entries, general, sums[0])


def _rebuild(
    store: Store, entries: list[dict[str, Tensor]], general: dict[str, Tensor] | None, digest: int
) -> tuple[Tensor, int]:
    gram = _total_gram(entries, general)
    if not gram.numel():
        return gram, digest
    try:
        with store.lock():
            store.write_router_file(ROUTER_SUMS, {"gram": gram, "members": _pack(digest)})
    except (OSError, GrowlmError):
        pass  # a store on a read-only disk still routes
    return gram, digest


def _total_gram(entries: list[dict[str, Tensor]], general: dict[str, Tensor] | None) -> Tensor:
    parts = [*entries, *([general] if general else [])]
    if not parts:
        return torch.zeros(0, 0, dtype=torch.int64)
    return sum((_gram(p["vectors"]) for p in parts[1:]), start=_gram(parts[0]["vectors"]))


def _fit(
    names: list[str], entries: list[dict[str, Tensor]], general: dict[str, Tensor] | None, gram: Tensor
) -> GaussianRouter:
    if general is None or not names:
        empty = torch.zeros(0, 0)
        return GaussianRouter([], empty, empty, torch.zeros(0))
    classes = [*entries, general]
    counts = torch.tensor([len(c["vectors"]) for c in classes], dtype=torch.float64)
    sums = torch.stack([c["vectors"].long().sum(0) for c in classes]).double()
    means = sums / counts[:, None]
    # Scatter within classes: every sample's square, less what the class means explain.
    within = gram.double() - sums.T @ means
    covariance = within / max(float(counts.sum()) - len(classes), 1.0) / _SCALE**2
    # Few samples for many features make a covariance that is sure of too much: keep more of its diagonal alone.
    shrink = min(max(_SHRINK, 0.05 * len(covariance) / float(counts.sum())), 0.5)
    variance = covariance.diagonal().clamp(min=1e-9)
    covariance = (1 - shrink) * covariance + torch.diag(shrink * variance + 1e-9)
    # x^T cov^-1 x = |x^T inv(L)^T|^2 with cov = L L^T.
    lower = torch.linalg.cholesky(covariance)
    whiten = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=torch.float64), upper=False).T
    means = (means / _SCALE) @ whiten
    other = _whitened(general["heldout"], whiten)
    limits = torch.stack(
        [
            _limit(_whitened(entry["heldout"], whiten) - mean, other - mean)
            for entry, mean in zip(entries, means[:-1], strict=True)
        ]
    )
    return GaussianRouter(names, means.float(), whiten.float(), limits.float())


def _whitened(vectors: Tensor, whiten: Tensor) -> Tensor:
    return (vectors.double() / _SCALE) @ whiten


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


def _read_evidence(module: StoredModule) -> dict[str, Tensor]:
    digest = module.manifest.files.get(EVIDENCE)
    if digest is None:
        raise IntegrityError(f"{module.folder}: holds no {EVIDENCE}; learn {module.name!r} again")
    return read_tensors(module.folder / EVIDENCE, sha256=digest)


def _read_sums(store: Store) -> tuple[Tensor, int] | None:
    try:
        tensors = store.router_file(ROUTER_SUMS)
    except IntegrityError:
        return None  # derived from the modules' own evidence: made anew
    return None if tensors is None else (tensors["gram"], _unpack(tensors["members"]))


def _combine(digest: int, module: StoredModule, sign: int) -> int:
    """A hash of a set that does not depend on order, and from which a member can be taken out again."""
    content = module.manifest.files.get(EVIDENCE)
    member = hashlib.sha256(f"{module.name}/{module.version}/{content}".encode()).digest()
    return (digest + sign * int.from_bytes(member, "big")) % (1 << 256)


def _pack(digest: int) -> Tensor:
    return torch.tensor(list(digest.to_bytes(32, "big")), dtype=torch.uint8)


def _unpack(members: Tensor) -> int:
    return int.from_bytes(bytes(members.tolist()), "big")


def names_of(routes: Iterable[Route]) -> list[str]:
    return [r.module or NONE for r in routes]
