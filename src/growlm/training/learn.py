"""Learn: one body of text becomes one module, trained beside the frozen base on its own data alone (IP-LLM, phase 2).

Below the fork the base runs without gradient, and its output is kept where it will be read again. Knows the contract of
modules and nothing of any one kind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from growlm import data as text_data
from growlm import router
from growlm.errors import ConfigError, DataError, StoreError
from growlm.modules import ModuleSet, kind_of
from growlm.modules.probe import probe
from growlm.modules.scoring import num_labels, passage_losses
from growlm.store import LEAST_SAMPLES, Store, StoredModule
from growlm.training.config import LearnConfig
from growlm.training.general import ensure_general
from growlm.training.loop import compute_dtype, require_finite
from growlm.training.module_training import ModuleTraining, sample_passages
from growlm.training.progress import say, training_bar
from growlm.training.router import require_samples, train_router
from growlm.training.runs import empty, run_folder

_HELDOUT_SAMPLES = 64  # passages from which the router learns how far its own text may be


@dataclass(frozen=True)
class LearnResult:
    """What was learned. Losses are in nats a token on held-out text; `tokens` counts every token trained on."""

    name: str
    version: int
    loss_before: float
    loss_after: float
    tokens: int
    seconds: float
    tokens_per_second: float
    router: int | None = None  # version of the router that was trained with it, where the store's kind is trained

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def learn(
    store: Store,
    name: str,
    data: Sequence[str | Path],
    config: LearnConfig | None = None,
    *,
    update: bool = False,
    restart: bool = False,
    progress: bool | None = None,
) -> LearnResult:
    """Trains a new module on `data` and adds it to the store and its router.

    A run that was stopped goes on where it was when it is called again with the same arguments; once its module is
    saved, with the router's training.

    Args:
        data: files, folders or `hub:owner/name`.
        update: allow `name` to exist; the module becomes its next version.
        restart: forget what a stopped run with the same arguments had done.
        progress: show a bar on stderr; by default where stderr is a terminal.

    Raises:
        StoreError: `name` is not allowed or is taken, or the disk is full.
        DataError: data that is missing, malformed or too little.
        TrainingError: the loss is no number any more; nothing is saved.
        BaseModelError: the store's base is missing or has changed.
        Interrupted: stopped by the user; progress is saved.
    """
    config = config or LearnConfig()
    old = store.find(name)
    unfinished = _unfinished(store, old)
    if unfinished is None and not update:
        _require_free(store, old)
    kind = kind_of(config.kind)
    keep = int(config.keep_samples) if config.keep_samples is not None else store.manifest.keep_samples
    trains_router = store.manifest.router == "transformer"
    if trains_router:
        if keep < LEAST_SAMPLES:
            raise StoreError(
                f"{store.path}: its transformer router is trained on kept text; without any, {name!r} could never be "
                f"chosen: leave out --keep-samples {keep}, or change to the gaussian router (growlm router --kind "
                "gaussian)"
            )
        require_samples(store, [m for m in store.modules.values() if m.name != name])
    device = "cuda" if torch.cuda.is_available() else "cpu"

    corpus = text_data.read(data, text_key=config.text_key, separator=config.separator)
    other = None
    if config.replay is not None:
        other = text_data.read([config.replay], text_key=config.text_key, separator=config.separator)
    digest = corpus.digest if other is None else f"{corpus.digest} {other.digest}"
    dtype = compute_dtype(config.precision, device)
    busy = f"{store.path}: the same learning of {name!r} is running already"
    if old is not None and unfinished is not None:
        # Whichever version was current when it began.
        runs = (_run_id(store, name, before, digest, config, device, dtype) for before in range(old.version))
        if unfinished in runs:
            folder = _folder(store, name, unfinished)
            with run_folder(folder, name, busy, restart=True, progress=progress):  # its checkpoints are of no use now
                say(f"{name}: version {old.version} is saved already", progress)
                version = train_router(store, restart=restart, progress=progress).version if trains_router else None
            return _result(old, version)
        if not update:
            _require_free(store, old)
    train_documents, heldout_documents = text_data.split(corpus, seed=config.seed)
    store.check_base()
    tokenizer = store.load_tokenizer()
    say(f"{name}: {len(corpus.documents):,} documents; tokenizing", progress)
    packed = text_data.pack(
        train_documents,
        tokenizer,
        config.sequence_length,
        max_tokens=config.max_tokens,
    )
    replay = None
    if other is not None:
        replay = text_data.pack(other.documents, tokenizer, config.sequence_length, max_tokens=config.max_tokens)
    heldout = [p.tokens for p in text_data.passages(heldout_documents, tokenizer, config.sequence_length)]
    if not heldout:
        raise DataError(f"{', '.join(map(str, data))}: held-out text is shorter than two tokens; give more text")

    run = _run_id(store, name, old.version if old else 0, digest, config, device, dtype)
    with run_folder(_folder(store, name, run), name, busy, restart=restart, progress=progress) as work:
        base = store.load_base(device=device)
        made_for = base.max_positions or base.trained_positions
        if made_for is not None and config.sequence_length > made_for:
            raise ConfigError(f"sequence_length is {config.sequence_length}; {base.where} has {made_for} positions")
        # The router is only shown what the engine will show it: the base in the store's dtype.
        served = base.dtype
        if not router.has_general(store):
            ensure_general(store, base, tokenizer, progress)
        begin = text_data.start_tokens(tokenizer)
        learning = ModuleTraining(base, kind, config, packed, work, begin, replay)
        with training_bar(name, progress) as report:
            seconds = learning.run(report)
        trained, tokens = learning.module, learning.num_tokens
        del learning
        if dtype != served:
            del base
            base = store.load_base(device=device)
        weights = {k: v.detach().to(served) if v.is_floating_point() else v for k, v in trained.state_dict().items()}
        module = kind.restore(base, trained.config, weights, name)
        alone, together = ModuleSet(base), ModuleSet(base, [module])
        before, after = (float(passage_losses(m, heldout).sum()) / num_labels(heldout) for m in (alone, together))
        require_finite(f"{name}: the held-out loss after training", after)
        crops = sample_passages(packed, config.router_samples, config.seed, begin)
        evidence = router.evidence(base, crops, heldout[:_HELDOUT_SAMPLES], seed=config.seed)
        training = {
            "sources": [asdict(s) for s in corpus.sources],
            "replayed": [asdict(s) for s in other.sources] if other is not None else [],
            "documents": len(corpus.documents),
            "tokens": tokens,
            "seed": config.seed,
            "settings": config.to_json(),
            "run": run,
            "loss_before": before,
            "loss_after": after,
            "seconds": seconds,
            "probe": {"base": probe(alone), "module": probe(together)},
        }
        now = store.find(name)
        if now is not None and not update and (old is None or now.version != old.version):
            raise StoreError(f"{store.path}: module {name!r} exists (learned meanwhile); use --update")
        files = router.files_of(evidence)
        if keep:
            # Two bytes a token at the least. Where tokens take four, half of these rows fit: any half, since they are
            # in no order.
            rows = -(-keep // (2 * config.sequence_length))
            samples = router.pack_samples(sample_passages(packed, rows, config.seed, begin), keep)
            if len(samples["tokens"]):  # so few bytes that nothing fits keep nothing
                files[router.SAMPLES] = samples
        stored = store.commit(name, module, training, files)
        router.add_domain(store, stored, old)
        empty(work)  # the disk is needed; the folder stays until the router knows the module as well
        version = train_router(store, base=base, restart=restart, progress=progress).version if trains_router else None
    return _result(stored, version)


def _require_free(store: Store, current: StoredModule | None) -> None:
    if current is not None:
        raise StoreError(
            f"{store.path}: module {current.name!r} exists (version {current.version}); use --update to learn its next "
            "version"
        )


def _unfinished(store: Store, current: StoredModule | None) -> str | None:
    """Of the run that made a module, the id, if that run has not ended: its folder goes last."""
    if current is None:
        return None
    try:
        run = current.manifest.training.get("run")
    except StoreError:  # damaged; to learn the name again is the cure
        return None
    return run if isinstance(run, str) and _folder(store, current.name, run).is_dir() else None


def _folder(store: Store, name: str, run: str) -> Path:
    return store.path / "work" / f"{name}-{run[:16]}"


def _result(stored: StoredModule, trained_router: int | None) -> LearnResult:
    said = stored.manifest.training
    tokens, seconds = said["tokens"], said["seconds"]
    speed = tokens / max(seconds, 1e-9)
    return LearnResult(
        stored.name, stored.version, said["loss_before"], said["loss_after"], tokens, seconds, speed, trained_router
    )


def _run_id(
    store: Store, name: str, before: int, data_digest: str, config: LearnConfig, device: str, dtype: torch.dtype
) -> str:
    """Tells a run from every other: what decides its result, and nothing else.

    Args:
        before: the version that was current when it began; 0 for none.
    """
    settings = config.to_json()
    for key in ("checkpoint_seconds", "feature_cache", "keep_samples", "precision"):
        settings.pop(key)
    parts = [
        name,
        before,
        data_digest,
        settings,
        store.manifest.base_fingerprint,
        device,
        str(dtype),
        torch.get_num_threads(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
