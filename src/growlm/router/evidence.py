"""Evidence: what the router keeps of a domain, or of general text: pooled states of beginnings, as whole numbers.

Knows texts as token ids, the base that reads them, and the files that hold what it said; fits nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from growlm.base.padding import pad_right
from growlm.disk.tensors import read_tensors, require_kinds
from growlm.errors import IntegrityError
from growlm.progress import Phase, phase
from growlm.router.states import base_states, mean_pool
from growlm.store import GENERAL, ROUTER_DERIVED

if TYPE_CHECKING:
    from growlm.base import Base
    from growlm.store import Store, StoredModule

# b batch, t tokens, d hidden size, n samples

# Kept in a module's own folder: gone with it, and with nothing else.
EVIDENCE = "router.safetensors"  # what every fit reads: the sum of the vectors, and the held-out texts
VECTORS = "router-vectors.safetensors"

SCALE = 1024  # what 1 is kept as: pooled states have root mean square 1 and are kept as int16

_KINDS = {
    EVIDENCE: {"heldout": (torch.int16, 2), "sum": (torch.int64, 1), "count": (torch.int64, 1)},
    VECTORS: {"vectors": (torch.int16, 2)},
    GENERAL: {
        "vectors": (torch.int16, 2),
        "heldout": (torch.int16, 2),
        "forms": (torch.int64, 1),
        "frames": (torch.int16, 2),
        "silent": (torch.int64, 1),
    },
}
_SHORTEST, _LONGEST = 8, 64  # tokens of the texts that the router is shown while learning
_CUTS = 4  # lengths that each passage is cut to
_WHOLE = 2 * _SHORTEST  # a text that is no longer is shown once, whole: its beginnings say little


def gather_evidence(
    base: Base,
    train: Sequence[Sequence[int]],
    heldout: Sequence[Sequence[int]],
    *,
    layer: int | None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """What the router needs to know of a domain: pooled states of the beginnings of passages, and of short texts.

    Args:
        train, heldout: token ids, at least one text each.
        layer: after how many of the base's layers, as the store's manifest says; None: after the final norm.

    Returns:
        `vectors` and `heldout`, int16 (n, d) each; no text, no tokens.
    """
    with phase("showing the router the text", len(train) + len(heldout), "passages") as showing:
        return {
            "vectors": _pooled_beginnings(base, train, layer, showing, seed=seed),
            "heldout": _pooled_beginnings(base, heldout, layer, showing, seed=seed + 1),
        }


def evidence_bytes(train: Sequence[Sequence[int]], heldout: Sequence[Sequence[int]], width: int) -> int:
    """What the files of such evidence hold (`files_of`).

    Args:
        width: of the base's states.
    """
    vectors = sum(1 if len(text) <= _WHOLE else _CUTS for text in (*train, *heldout))
    return 2 * width * vectors + 8 * width + 8


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
def _pooled_beginnings(
    base: Base, passages: Sequence[Sequence[int]], layer: int | None, showing: Phase, *, seed: int
) -> Tensor:
    """Pooled states (n, d) of each passage cut to several lengths, and of each short text. Prompts are short, so that
    lengths are log-uniform; one forward pass gives them all, because attention is causal."""
    generator = torch.Generator().manual_seed(seed)
    vectors: list[Tensor] = []
    for at in range(0, len(passages), 16):
        some = [list(p[:_LONGEST]) for p in passages[at : at + 16]]
        ids, real = pad_right(some)
        lengths = real.sum(-1)
        states, _ = base_states(base, ids.tolist(), layer)
        shortest, whole = lengths.clamp(max=_SHORTEST), lengths <= _WHOLE
        for number in range(_CUTS):
            share = torch.rand(len(some), generator=generator)
            cut = torch.where(whole, lengths, (shortest * (lengths / shortest) ** share).round().long())
            pooled = mean_pool(states, torch.arange(ids.shape[1]) < cut[:, None]).cpu()
            vectors.append(pooled if number == 0 else pooled[~whole])
        showing.advance(len(some))
    return (torch.cat(vectors) * SCALE).round().clamp(-32768, 32767).to(torch.int16)


def read_evidence(module: StoredModule, file: str, width: int) -> dict[str, Tensor]:
    """What was kept of a module's domain.

    Args:
        file: `EVIDENCE` or `VECTORS`.
        width: of the base's states.

    Raises:
        IntegrityError: the file is not what the manifest says, or not such a file.
    """
    digest = module.manifest.files.get(file)
    if digest is None:
        raise IntegrityError(f"{module.folder}: holds no {file}; learn {module.name!r} again")
    with module.reading():
        kept = read_tensors(module.folder / file, sha256=digest)
    require_kinds(module.folder / file, kept, _KINDS[file])
    count = kept.get("count", torch.ones(1))
    if len(count) != 1 or count[0] < 1 or any(t.shape[-1] != width for name, t in kept.items() if name != "count"):
        raise IntegrityError(
            f"{module.folder / file}: not of states of {width} numbers, or of no text; learn {module.name!r} again"
        )
    return kept


def of_same_states(store: Store, module: StoredModule) -> bool:
    """Whether what was kept of a module's text is of the states that the store's routers read."""
    return module.manifest.routing_layer == store.manifest.routing_layer


def require_same_states(store: Store, module: StoredModule) -> None:
    """
    Raises:
        IntegrityError: it is of others, as of a module that was copied from another store.
    """
    if not of_same_states(store, module):
        kept, read = (_place(m.routing_layer) for m in (module.manifest, store.manifest))
        raise IntegrityError(
            f"{module.folder}: what the router keeps of it is of {kept}, the router of this store reads {read}; learn "
            f"{module.name!r} here, with --update"
        )


def _place(layer: int | None) -> str:
    return "the base's last states" if layer is None else f"its states after layer {layer}"


class Framed(NamedTuple):
    """One text as it is, and in each of the frames that people put around what they ask, as token ids."""

    plain: Sequence[int]
    framed: Sequence[Sequence[int]]


def write_general(
    store: Store,
    base: Base,
    forms: Sequence[tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]],
    framed: Sequence[Framed] = (),
) -> None:
    """Records what general text, the class *none*, looks like to this base.

    Args:
        forms: kinds of general text that are unlike each other, questions and stories, say: token ids of texts that
            the router is fitted to, and of held-out ones, of each.
        framed: texts in frames, of which it learns what says nothing of what a text is about.
    """
    layer = store.manifest.routing_layer
    seen = [gather_evidence(base, train, heldout, layer=layer) for train, heldout in forms]
    tensors = {key: torch.cat([s[key] for s in seen]) for key in seen[0]}
    tensors["forms"] = torch.tensor([len(s["vectors"]) for s in seen])
    if framed:
        tensors |= frames_of(base, framed, layer)
    with store.lock():
        store.router_files(GENERAL).write(tensors)
        for derived in ROUTER_DERIVED:
            store.router_files(derived).drop()


@torch.no_grad()
def frames_of(base: Base, texts: Sequence[Framed], layer: int | None) -> dict[str, Tensor]:
    """What frames do to texts, one at least: `frames`, differences of pooled states (n, d) int16, and `silent`, the
    token ids that stand in all texts in a frame, and not in all plain ones."""
    pools: list[Tensor] = []
    tokens: set[int] = set()
    for text in texts:
        states, visible = base_states(base, [text.plain, *text.framed], layer)
        pooled = mean_pool(states, visible).cpu()
        pools.append(pooled[1:] - pooled[0])
    for one_frame in zip(*(text.framed for text in texts), strict=True):
        tokens |= _shared(one_frame)
    tokens -= _shared([text.plain for text in texts])
    return {
        "frames": (torch.cat(pools) * SCALE).round().clamp(-32768, 32767).to(torch.int16),
        "silent": torch.tensor(sorted(tokens) or [-1], dtype=torch.int64),  # a file holds no empty tensor
    }


def _shared(texts: Sequence[Sequence[int]]) -> set[int]:
    """Tokens that stand in all of them."""
    shared = set(texts[0])
    for text in texts[1:]:
        shared &= set(text)
    return shared


def read_general(store: Store) -> dict[str, Tensor]:
    """What was recorded of general text: `vectors` and `heldout` (n, d); `forms`, how many of the vectors, in their
    order, are of each form; `frames` and `silent`, as `frames_of` gives them.

    Raises:
        IntegrityError: it is missing, or not what its manifest says.
    """
    path = store.router_path / GENERAL
    general = store.router_files(GENERAL).read()
    if general is None:
        raise IntegrityError(f"{path}: is missing; restore it, or make the store again")
    general.setdefault("forms", torch.tensor([len(general["vectors"])]))  # recorded before there were several
    known = _KINDS[GENERAL]
    framed = {"frames", "silent"} & general.keys()  # not of all stores
    require_kinds(path, general, known if framed else {k: known[k] for k in ("vectors", "heldout", "forms")})
    general.setdefault("frames", general["vectors"][:0])
    general.setdefault("silent", torch.zeros(0, dtype=torch.int64))
    if general["frames"].shape[-1] != general["vectors"].shape[-1]:
        raise IntegrityError(f"{path}: its frames are not of its vectors' width; restore it, or make the store again")
    if int(general["forms"].sum()) != len(general["vectors"]) or int(general["forms"].min()) < 1:
        raise IntegrityError(f"{path}: its forms are not those of its vectors; restore it, or make the store again")
    return general


def has_general(store: Store) -> bool:
    return store.router_files(GENERAL).digest() is not None
