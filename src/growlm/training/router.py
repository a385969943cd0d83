"""Training of a transformer router: decoder layers that name the domain of a text, from kept text of all domains.

Every token of a passage is asked for the passage's domain, so that short prompts are learned with long ones. The
modules' names, not the order in which they were learned, decide what is trained: the same store gives the same router.
Which passages are held out depends on the text alone: no version was trained on those by which another is measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from growlm import data as text_data
from growlm.base import Base
from growlm.base.padding import pad_right
from growlm.base.placement import Placement
from growlm.errors import ConfigError, IntegrityError, NotBetterError, StoreError
from growlm.progress import reporting, say, track
from growlm.router import EVIDENCE, NONE, SAMPLES, of_same_states, read_samples
from growlm.router.transformer import RouterLayers, compare, samples_of
from growlm.store import ROUTER_TRAINED, Store, StoredModule
from growlm.store.manifests import RouterManifest
from growlm.store.versions import ROUTER_MANIFEST
from growlm.training.admission import Comparison, require_no_worse
from growlm.training.config import RouterConfig
from growlm.training.general import general_samples
from growlm.training.loop import module_rate, require_finite, train
from growlm.training.runs import run_folder

_FIRST = 4  # tokens from which on a passage's domain is asked for: fewer say nothing
_HELDOUT = 8  # one passage in so many is not trained on


@dataclass(frozen=True)
class RouterResult:
    """What was trained. `accuracy` is the share of held-out passages whose last token names their domain, None where
    the kept text is too little to hold any out."""

    version: int
    modules: int
    accuracy: float | None
    heldout: int
    tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def train_router(
    store: Store,
    config: RouterConfig | None = None,
    *,
    base: Base | None = None,
    restart: bool = False,
    progress: bool | None = None,
) -> RouterResult:
    """Trains a transformer router on the kept text of all modules; it becomes the newest version and is not chosen
    by this: `Store.set_router` does that.

    A run that was stopped goes on where it was when it is called again with the same arguments. Where modules were
    added meanwhile and a newer version knows them already, that version stays the newest and is the result.

    Args:
        config: by default that of the newest version.
        base: the store's base as it is served, where it is loaded already; its device is then the config's.
        restart: forget what a stopped run had done.
        progress: False is silent; by default there are bars on stderr, or where it is no terminal, lines, one in ten
            seconds at most.

    Raises:
        StoreError: a store without modules, modules whose text was not kept, or the same training under way.
        NotBetterError: it does worse than the newest version, which knows all that it knows; nothing is saved.
        TrainingError: the loss became NaN or infinite; nothing is saved.
        Interrupted: stopped by the user; progress is saved.
    """
    with reporting("router", progress):
        return _train_router(store, config or last_config(store), base, restart)


def _train_router(store: Store, config: RouterConfig, base: Base | None, restart: bool) -> RouterResult:
    placement = Placement.of(config.device if base is None else base.device, config.precision)
    modules = list(store.modules.values())
    if not modules:
        raise StoreError(f"{store.path}: holds no modules; learn one before its router is trained")
    require_samples(store, modules)
    base = base or store.load_base(device=placement.device)
    tokenizer = store.load_tokenizer()
    samples = {m.name: m.manifest.files[SAMPLES] for m in modules}
    kept = [read_samples(m) for m in modules]
    _require_kept(store, [m.name for m, passages in zip(modules, kept, strict=True) if not passages])
    kept.append(general_samples(store, base, tokenizer))
    begin = text_data.start_tokens(tokenizer)
    base.require_rows([t for passages in kept for p in passages for t in p], f"{store.path}: kept text", tokenizer)
    length = min(config.sequence_length, base.max_positions or config.sequence_length)
    rows = _Rows(kept, config, begin, length)

    run = _run_id(store, modules, kept[-1], config, placement)
    folder = store.work / f"router-{run[:16]}"
    busy = f"{store.path}: the same training of its router is running already"
    with run_folder(folder, busy, restart=restart) as work:
        torch.manual_seed(config.seed)
        layers = RouterLayers.create(base, config.router_layers, len(kept))
        wanted = config.rows_wanted(len(rows))
        order = text_data.schedule(len(rows), config.batch_size, wanted=wanted, seed=config.seed)

        def losses_of_step(step: int) -> list[Tensor]:
            ids, real, targets = rows.batch(order[step])
            hidden = _states(base, ids)
            with placement.autocast():
                logits = layers(hidden).float()
            first = torch.clamp(real.sum(-1) - 1, max=_FIRST)
            asked = real & (torch.arange(ids.shape[1]) >= first[:, None])
            spread = torch.where(asked, targets[:, None], -100).to(base.device)
            return [torch.nn.functional.cross_entropy(logits.flatten(0, 1), spread.flatten(), ignore_index=-100)]

        _, seconds = train(
            dict(layers.named_parameters()),
            losses_of_step,
            len(order),
            lambda step: int(rows.lengths[order[step]].sum()),
            config,
            config.rate_or(module_rate(base.hidden_size)),
            folder=work,
            resume_hint="run the same command again to go on",
        )
        tensors = {k: v.detach().to("cpu", base.dtype) for k, v in layers.state_dict().items()}
        served = RouterLayers.restore(
            base, _shape(layers), {k: v.to(base.device) for k, v in tensors.items()}, "router"
        )
        logits = _last_logits(base, served, [p for p, _ in rows.heldout])
        targets = torch.tensor([c for _, c in rows.heldout])
        accuracy = float((logits.argmax(-1) == targets).float().mean()) if rows.heldout else None
        tokens = sum(int(rows.lengths[step].sum()) for step in order)
        training = {
            "samples": samples,
            "settings": config.to_json(),
            **placement.record(),
            "tokens": tokens,
            "seconds": seconds,
            "accuracy": accuracy,
            "heldout": len(rows.heldout),
            "general": _digest(kept[-1]),
        }
        files = store.router_files(ROUTER_TRAINED)
        while True:
            before = max(files.versions(), default=None)
            found = None
            if before is not None:
                found = _compared(store, before, base, [*samples, NONE], training, rows.heldout, logits)
            if before is not None and found is not None:
                say(f"version {before}, on what both know: {found.told()}")
                require_finite("the router's held-out loss after training", found.after)
            with store.lock():
                if max(files.versions(), default=None) != before:
                    continue  # another training has ended meanwhile
                newest = files.manifest()
                known = _known(store, samples_of(newest))
                if newest is not None and before is not None and known - _known(store, samples):
                    # This one would take modules away from the prompts that they answer.
                    say(f"version {before} knows modules that were added meanwhile; it stays")
                    return _result(before, newest)
                if found is not None and not config.admit_anyway and known >= _known(store, samples):
                    hint = "give more --passages or --epochs"
                    require_no_worse("router", found, f"version {before}, which stays", hint)
                version = files.write(
                    tensors,
                    keep=True,
                    config=_shape(layers),
                    modules={m.name: (m.version, m.manifest.fork) for m in modules},
                    training={**training, **({} if found is None else {"comparison": found.to_json()})},
                )
                written = files.manifest(version)
                assert written is not None
                return _result(version, written)


def _compared(
    store: Store,
    version: int,
    base: Base,
    labels: Sequence[str],
    training: Mapping[str, Any],
    heldout: Sequence[tuple[list[int], int]],
    logits: Tensor,
) -> Comparison | None:
    """A version and a new one on the held-out passages of the modules that both know by the same text, and of general
    text: nats of the right category, among those that both have. Not how often either is right: of a few dozen passages
    most are named by both, and a router that grows unsure, or sure of what is wrong, shows in the loss first.

    Args:
        labels: of the new one's categories.
        training: what will be said of the new one.
        logits: (passages, categories) of the new one.

    Returns:
        None where there is nothing to compare: of an older growlm, damaged, or of other text.
    """
    files = store.router_files(ROUTER_TRAINED)
    try:
        manifest, tensors = files.manifest(version), files.read(version)
        if manifest is None or tensors is None or "general" not in manifest.training:
            return None
        tensors = {k: v.to(base.device) for k, v in tensors.items()}
        old = RouterLayers.restore(base, manifest.config, tensors, str(files.folder / str(version)))
    except IntegrityError:
        return None
    if old.categories.out_features != len(manifest.modules) + 1:
        return None
    theirs = samples_of(manifest)
    both = [name for name in labels if name != NONE and theirs.get(name) == training["samples"][name]]
    if not both:
        return None
    shared = [*both, NONE]
    asked = shared if manifest.training["general"] == training["general"] else both
    chosen = [i for i, (_, category) in enumerate(heldout) if labels[category] in asked]
    if not chosen:
        return None
    before = _last_logits(base, old, [heldout[i][0] for i in chosen])
    targets = torch.tensor([shared.index(labels[heldout[i][1]]) for i in chosen])

    def losses(found: Tensor, names: Sequence[str]) -> Tensor:
        of_both = found[:, [names.index(name) for name in shared]]
        return torch.nn.functional.cross_entropy(of_both, targets, reduction="none")

    theirs_lost, ours_lost = losses(before, [*manifest.modules, NONE]), losses(logits[chosen], labels)
    return Comparison.of(theirs_lost, ours_lost, torch.ones(len(chosen)))


def _digest(passages: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps(passages).encode()).hexdigest()


def require_samples(store: Store, modules: Sequence[StoredModule]) -> None:
    """
    Raises:
        StoreError: text of a module was not kept, so that no router can be trained on it.
    """
    found = store.read_each(lambda m: SAMPLES in m.manifest.files, modules)
    _require_kept(store, [module.name for module, kept in found if not kept])


def _require_kept(store: Store, without: Sequence[str]) -> None:
    if without:
        names = ", ".join(without[:5]) + (" and others" if len(without) > 5 else "")
        raise StoreError(
            f"{store.path}: no text of {names} was kept, and a transformer router is trained on text of every module; "
            "learn again with --update --keep-samples 2MB, or use the gaussian router, which needs none"
        )


def router_after(store: Store, *, restart: bool = False, device: str = "auto", base: Base | None = None) -> int | None:
    """The version of the router trained on what the store holds now; None where its kind is not trained.

    Args:
        device: where it is trained, unless `base` is loaded already.
    """
    if store.manifest.router != ROUTER_TRAINED:
        return None
    config = last_config(store, device) if base is None else None
    try:
        return train_router(store, config, base=base, restart=restart).version
    except NotBetterError as error:  # the module is saved, and can be chosen as before
        say(str(error))
        return max(store.router_files(ROUTER_TRAINED).versions())


def last_config(store: Store, device: str = "auto") -> RouterConfig:
    """The settings of the newest version, which do not say where; the defaults where none was trained.

    Raises:
        IntegrityError: the newest version does not say how it was trained.
    """
    files = store.router_files(ROUTER_TRAINED)
    newest = files.manifest()
    try:
        settings = newest.training["settings"] if newest else {}
        # Of types the class asks nothing.
        TypeAdapter(RouterConfig).validate_json(json.dumps(settings), strict=True)
        return RouterConfig(**{**settings, "device": device})
    except (KeyError, TypeError, ValidationError, ConfigError):
        version = max(files.versions(), default=1)
        raise IntegrityError(
            f"{files.folder / str(version) / ROUTER_MANIFEST}: does not say how it was trained; take it away with "
            f"growlm router {store.path} --remove-version {version}"
        ) from None


def _known(store: Store, samples: Mapping[str, str]) -> set[str]:
    """Modules of the store whose kept text is, by name, the one with these hashes."""
    found = store.read_each(lambda m: m.manifest.files.get(SAMPLES))
    return {module.name for module, kept in found if kept == samples.get(module.name, "")}


def _result(version: int, manifest: RouterManifest) -> RouterResult:
    said = manifest.training
    return RouterResult(
        version,
        len(manifest.modules),
        said.get("accuracy"),
        said.get("heldout", 0),
        said.get("tokens", 0),
        said.get("seconds", 0.0),
    )


def describe_router(store: Store) -> dict[str, Any]:
    """The kind that chooses, how many modules it can choose, which it cannot or knows by the text of an earlier version
    only, and the trained versions."""
    names = list(store.modules)
    files = store.router_files(ROUTER_TRAINED)
    versions = []
    for number in files.versions():
        manifest = files.manifest(number)
        if manifest is not None:
            versions.append(
                {
                    "version": number,
                    "modules": len(manifest.modules),
                    "accuracy": manifest.training.get("accuracy"),
                    "bytes": files.num_bytes(number),
                }
            )
    outdated: list[str] = []
    if store.manifest.router == ROUTER_TRAINED:
        found = compare(store, files.manifest())
        unknown, outdated = [m.name for m in found.unknown], [m.name for m in found.outdated]
    else:
        reads = store.read_each(lambda m: EVIDENCE in m.manifest.files and of_same_states(store, m))
        unknown = [m.name for m, known in reads if not known]
    return {
        "kind": store.manifest.router,
        "modules": len(names),
        "knows": len(names) - len(unknown),
        "unknown": unknown,
        "outdated": outdated,
        "keep_samples": store.manifest.keep_samples,
        "versions": versions,
    }


class _Rows:
    """Passages of every category, as many of each, and some that are held out.

    Attributes:
        lengths: (rows,) tokens of each.
        heldout: passages and their categories that are not among the rows.
    """

    def __init__(
        self, kept: Sequence[list[list[int]]], config: RouterConfig, begin: Sequence[int], length: int
    ) -> None:
        draw = np.random.default_rng(config.seed)
        self._passages: list[list[int]] = []
        self._targets: list[int] = []
        self.heldout: list[tuple[list[int], int]] = []
        for category, passages in enumerate(kept):
            order = sorted(range(len(passages)), key=lambda i: _digest([passages[i]]))
            out = order[: len(passages) // _HELDOUT]
            into = order[len(out) :]
            self.heldout += [(passages[i][:length], category) for i in out]
            # A passage of which there are too few is read again, from another place.
            for number in range(config.passages):
                self._passages.append(_crop(passages[into[number % len(into)]], begin, length, draw))
                self._targets.append(category)
        self.lengths = np.array([len(p) for p in self._passages])

    def __len__(self) -> int:
        return len(self._passages)

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (b, t) padded on the right, where they are real (b, t), categories (b,)."""
        return _batch([self._passages[i] for i in rows], [self._targets[i] for i in rows])


def _crop(passage: list[int], begin: Sequence[int], length: int, draw: np.random.Generator) -> list[int]:
    start = int(draw.integers(max(len(passage) - length, 0) + 1))
    if start == 0:
        return passage[:length]
    return [*begin, *passage[start:]][:length]


def _batch(passages: Sequence[list[int]], targets: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    ids, real = pad_right(passages)
    return ids, real, torch.tensor(targets)


@torch.no_grad()
def _states(base: Base, ids: Tensor) -> Tensor:
    """The base's states after its final norm (b, t, d). Padding on the right needs no mask: attention is causal."""
    hidden, shared = base.begin(ids.to(base.device))
    return base.norm(base.run(base.embed_positions(hidden, shared.positions), base.layers_to_run(), shared))


@torch.no_grad()
def _last_logits(base: Base, layers: RouterLayers, passages: Sequence[list[int]]) -> Tensor:
    """Logits of the categories (passages, categories) at the last token of each."""
    found = [torch.empty(0, layers.categories.out_features)]
    for at in track(range(0, len(passages), 16), "scoring held-out passages", "batches"):
        some = passages[at : at + 16]
        ids, real = pad_right(some)
        found.append(layers(_states(base, ids))[torch.arange(len(some)), real.sum(-1) - 1].float().cpu())
    return torch.cat(found)


def _shape(layers: RouterLayers) -> dict[str, Any]:
    return layers.blocks.config.model_dump(mode="json")


def _run_id(
    store: Store,
    modules: Sequence[StoredModule],
    general: list[list[int]],
    config: RouterConfig,
    placement: Placement,
) -> str:
    """Tells a run from every other: what decides its result, and nothing else."""
    settings = config.to_json()
    for key in ("checkpoint_seconds", "precision"):
        settings.pop(key)
    parts = [
        [(m.name, m.version, m.manifest.files[SAMPLES]) for m in modules],
        general,
        settings,
        store.manifest.base_fingerprint,
        placement.device.type,
        str(placement.dtype),
        torch.get_num_threads(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
