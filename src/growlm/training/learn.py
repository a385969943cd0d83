"""Learn: one body of text becomes one module, trained beside the frozen base on its own data alone (IP-LLM, phase 2).

Below the fork the base runs without gradient, and its output is kept where it will be read again. Knows the contract of
modules and nothing of any one kind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from growlm import data as text_data
from growlm import router
from growlm.errors import ConfigError, DataError, StoreError
from growlm.layers.cross_entropy import linear_cross_entropy
from growlm.layers.experts import watched
from growlm.layers.losses import load_concentration
from growlm.modules import KnowledgeModule, ModuleSet, kind_of
from growlm.modules.base import Base
from growlm.modules.probe import probe
from growlm.modules.scoring import num_labels, passage_losses
from growlm.modules.vocabulary import choose_rows
from growlm.store import LEAST_SAMPLES, Store, StoredModule
from growlm.training.config import LearnConfig
from growlm.training.features import FeatureCache
from growlm.training.general import ensure_general
from growlm.training.loop import compute_dtype, module_rate, require_finite, train
from growlm.training.progress import say, training_bar
from growlm.training.router import require_samples, train_router
from growlm.training.runs import empty, run_folder

_HELDOUT_SAMPLES = 64  # passages from which the router learns how far its own text may be
_SAMPLE_ROWS = 64  # rows of training text on which the base is asked what it knows
_CHECKPOINTS = 3  # that the feature cache leaves room for: the last one, the next one, and what is learned


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
        if base.max_positions is not None and config.sequence_length > base.max_positions:
            raise ConfigError(
                f"sequence_length is {config.sequence_length}; {base.where} has {base.max_positions} positions"
            )
        # The router is only shown what the engine will show it: the base in the store's dtype.
        served = base.dtype
        if not router.has_general(store):
            ensure_general(store, base, tokenizer, progress)
        begin = text_data.start_tokens(tokenizer)
        learning = _Learning(base, kind, config, packed, work, begin, replay)
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
        crops = _sample_passages(packed, config.router_samples, config.seed, begin)
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
            samples = router.pack_samples(_sample_passages(packed, rows, config.seed, begin), keep)
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


class _Learning:
    """One run: a module in float32, the base in the dtype of the matrix products."""

    def __init__(
        self,
        base: Base,
        kind: type[KnowledgeModule],
        config: LearnConfig,
        packed: text_data.PackedTokens,
        work: Path,
        begin: Sequence[int] = (),
        replay: text_data.PackedTokens | None = None,
    ) -> None:
        self.base, self.config, self.text, self.work = base, config, packed, work
        self.dtype = compute_dtype(config.precision, base.device.type)
        torch.manual_seed(config.seed)
        # Parameters alone change their dtype: buffers, the frequencies of rotary positions among them, stay as exact as
        # they are served. A tied weight is one parameter.
        weights = list(base.model.parameters())
        stored = [p.data for p in weights]
        rounded = [p.data.to(self.dtype) for p in weights]
        _set(weights, rounded)
        row_ids = self._least_known(begin)
        # The module is made from the base's weights as they are stored.
        _set(weights, stored)
        settings = {k: getattr(config, k) for k in kind.Config.model_fields if hasattr(config, k)}
        self.module = kind.create(base, kind.Config(**settings), row_ids)
        _set(weights, rounded)
        del stored
        self.modules = ModuleSet(base, [self.module])
        self.fork = self.modules.fork
        self._upper = _Upper(self.modules)
        self.module.open()
        wanted = config.rows_wanted(len(packed))
        self.packed, self._steps = (
            packed,
            text_data.schedule(len(packed), config.batch_size, wanted=wanted, seed=config.seed),
        )
        if replay is not None:
            self.packed, self._steps = _with_replay(packed, replay, self._steps, config)
        self._cache: FeatureCache | None = None
        if wanted > len(packed) and self.fork > 0:
            checkpoint = 3 * 4 * self.module.num_parameters()  # weights and both moments, in float32
            self._cache = FeatureCache(
                work / "features.bin",
                len(self.packed),
                (config.sequence_length, base.hidden_size),
                self.dtype,
                limit=int(config.feature_cache),
                reserve=_CHECKPOINTS * checkpoint,
            )

    @property
    def num_tokens(self) -> int:
        return sum(self._tokens_of(i) for i in range(len(self._steps)))

    def run(self, report: Callable[[Any], None]) -> float:
        self.work.mkdir(parents=True, exist_ok=True)
        try:
            return train(
                dict(self.module.named_parameters()),
                self._loss,
                len(self._steps),
                self._tokens_of,
                self.config,
                self.config.learning_rate or module_rate(self.base.hidden_size),
                folder=self.work,
                resume_hint="run the same command again to go on",
                report=report,
            )
        finally:
            if self._cache is not None:
                self._cache.close()

    def _least_known(self, begin: Sequence[int]) -> Tensor | None:
        """Of the tokens that the domain uses, those that the base knows least."""
        if self.config.vocabulary == "none":
            return None
        vocab = self.base.vocab_size
        lost = torch.zeros(vocab, dtype=torch.float64)

        def per_token(labels: Tensor, losses: Tensor) -> None:
            lost.index_add_(0, labels.cpu(), losses.double().cpu())

        sample = _sample_passages(self.text, _SAMPLE_ROWS, self.config.seed, begin)
        passage_losses(ModuleSet(self.base), sample, per_token=per_token)
        counts = np.bincount(self.text.tokens[:, 1:].reshape(-1), minlength=vocab)
        return choose_rows(lost, torch.from_numpy(counts), self.config.max_rows or min(max(vocab // 4, 1), 8192))

    def _tokens_of(self, step: int) -> int:
        return len(self._steps[step]) * self.config.sequence_length

    def _features(self, rows: np.ndarray) -> Tensor:
        input_ids = self.packed[rows][:, :-1].to(self.base.device)
        with torch.no_grad():
            hidden, shared = self.base.begin(input_ids)
            hidden = self.base.embed_positions(hidden, shared.positions)
            return self.base.run(hidden, self.modules.steps[: self.fork], shared)

    def _loss(self, step: int) -> Tensor:
        base, rows = self.base, self._steps[step]
        labels = self.packed[rows][:, 1:].to(base.device)
        if self.fork == 0:
            given = self.packed[rows][:, :-1].to(base.device)
        elif self._cache is None:
            given = self._features(rows)
        else:
            given = self._cache.get(rows, self._features).to(base.device)
        # The module's weights are float32; each step runs on a copy of them in the dtype of the matrix products. Unlike
        # autocast this keeps norms and activations in that dtype too, and casts each weight once.
        weights = {
            f"module.{name}": p.to(self.dtype)
            for name, p in self.module.named_parameters()
            if not name.startswith("rows.head.")
        }
        with watched() as routings:
            hidden = torch.func.functional_call(self._upper, weights, (given,))
        own = self.module.rows.head
        loss = linear_cross_entropy(
            hidden.flatten(0, 1),
            base.head_weight,
            labels.flatten(),
            rows=None if own is None else own.rows,
            ids=None if own is None else own.ids,
            softcap=base.softcap,
        )
        if self.config.load_concentration:
            loss = loss + self.config.load_concentration * sum(load_concentration(r.logits) for r in routings)
        if self.config.routing_regularisation and (weight := self.module.regularisation()) is not None:
            loss = loss + self.config.routing_regularisation * weight
        return loss


class _Upper(nn.Module):
    """What runs above the fork: features (b, t, d), or token ids (b, t) at fork 0, to final states (b, t, d)."""

    def __init__(self, modules: ModuleSet) -> None:
        super().__init__()
        self.module = modules.modules[0]
        self._set = modules

    def forward(self, given: Tensor) -> Tensor:
        base, fork = self._set.base, self._set.fork
        if fork == 0:
            return base.norm(self._set.hidden(given))
        shared = base.pass_for(given, torch.arange(given.shape[1], device=given.device)[None])
        return base.norm(base.run(given, self._set.steps[fork:], shared))


def _with_replay(
    packed: text_data.PackedTokens, replay: text_data.PackedTokens, steps: list[np.ndarray], config: LearnConfig
) -> tuple[text_data.PackedTokens, list[np.ndarray]]:
    """Rows of both texts, and steps to which as many rows of `replay` were added as make its share of them all."""
    many = sum(map(len, steps))
    extra = max(round(many * config.replay_ratio / (1 - config.replay_ratio)), 1)
    order = text_data.schedule(len(replay), extra, wanted=extra, seed=config.seed)
    drawn = np.concatenate(order)[:extra] + len(packed)
    shares = np.array_split(drawn, len(steps))
    both = text_data.PackedTokens(np.concatenate([packed.tokens, replay.tokens]))
    return both, [np.concatenate(pair) for pair in zip(steps, shares, strict=True)]


def _set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.data = value


def _sample_passages(packed: text_data.PackedTokens, count: int, seed: int, begin: Sequence[int]) -> list[list[int]]:
    """Rows of the text in random order, less their last token, each beginning with `begin` as prompts do and no longer
    for it."""
    rows = np.random.default_rng(seed).permutation(len(packed))[:count]
    chosen = packed.tokens[rows][:, :-1].tolist()
    return [[*begin, *row][: len(row)] if row[: len(begin)] != [*begin] else row for row in chosen]


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
