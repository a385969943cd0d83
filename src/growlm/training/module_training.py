"""Training of one module: base frozen below the fork, module above it, from cached features where text is read again.

Knows token rows, a base and a kind of module; nothing of stores, files of text or the router.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from growlm import data as text_data
from growlm.base import Base, tensor_bytes
from growlm.base.padding import pad_right
from growlm.base.placement import Placement, out_of_memory
from growlm.disk.files import read_json, write_atomic
from growlm.layers.cross_entropy import linear_cross_entropy, token_losses
from growlm.layers.losses import load_concentration
from growlm.layers.pools import imitation
from growlm.layers.routing import watched
from growlm.modules import KnowledgeModule, ModuleSet
from growlm.modules.scoring import passage_losses
from growlm.modules.vocabulary import choose_rows
from growlm.progress import phase, say
from growlm.training import history
from growlm.training.config import AUTO, LearnConfig, ModuleTrainConfig
from growlm.training.corpus import beginnings, sample_passages, validation_tokens
from growlm.training.features import FeatureCache
from growlm.training.loop import matrices, module_rate, rate_at, train
from growlm.training.memory import what_fits
from growlm.training.optim import clip_gradients, make_optimizer
from growlm.training.parallel import ALONE, Ranks
from growlm.training.rates import Trial, find_rate, trials_for
from growlm.training.runs import require_same_rows
from growlm.training.upper import Upper, unchanged
from growlm.training.validation import Validation

_ROWS = "rows.json"
_SAMPLE_SHARE = 20  # rows that are trained on for each one on which the base is asked what it knows
_TRIAL_LENGTH = 4  # a trial step reads one row of a batch, and of that such a part: no less than
_LEAST_TRIAL = 32  # tokens
_TRIALS_A_STEP = 8  # trial steps that are taken to cost as much as one of the run, at most: the optimiser's part stays
_TRIAL_WARMUP = 0.5  # share of a trial's steps: the first ones of a whole run are as small
_SCORED = 8  # passages that are scored at a time
_STEPS = 100  # that a run should have, where the batch may be chosen
_LARGEST_BATCH = 8
_CHECKPOINTS = 3  # that the feature cache leaves room for: the last one, the next one, and what is learned


class ModuleTraining:
    """One run: a module in float32, the base in the dtype of the matrix products.

    Args:
        module: a kind, of which a new one is made and all of it trained; or one in float32, of which what requires a
            gradient is trained and the rest stays as it is, batch statistics too.
        begin: what every prompt begins with.
        replay: other text, of which rows are read along.
        validation: held-out passages by which rate and step are chosen; of several ranks, the first one's alone.
        ranks: that train it together; rate and step are the first one's choice.
        whole: gives the base as it is stored, in main memory, where `base` lies in parts on the ranks.

    Attributes:
        sample_rows: rows of training text, at most, on which the base is asked what it knows.
        rate: the peak learning rate, once `run` has found it.
        trials: what was tried for it.
        scores: held-out loss by steps done, after `run`.
        history: of every step, as `history.History` writes it, after `run`.
        steps_done: steps that `run` made; those after the best one are not in the module.
    """

    sample_rows = 64

    def __init__(
        self,
        base: Base,
        module: type[KnowledgeModule] | KnowledgeModule,
        config: ModuleTrainConfig,
        packed: text_data.PackedTokens,
        work: Path,
        begin: Sequence[int] = (),
        replay: text_data.PackedTokens | None = None,
        validation: Sequence[text_data.Passage] = (),
        ranks: Ranks = ALONE,
        whole: Callable[[], Base] | None = None,
    ) -> None:
        self.ranks = ranks
        self.base, self.config, self.text, self.work, self._begin = base, config, packed, work, begin
        self.dtype = Placement.of(base.device, config.precision).dtype
        torch.manual_seed(config.seed)
        # Parameters alone change their dtype: buffers, the frequencies of rotary positions among them, stay as exact as
        # they are served. A tied weight is one parameter. A base in parts has it already.
        weights = [] if whole is not None else list(base.model.parameters())
        stored = [p.data for p in weights]
        rounded = [p.data.to(self.dtype) for p in weights]
        _set(weights, rounded)
        if isinstance(module, KnowledgeModule):
            self.module = module
        else:
            assert isinstance(config, LearnConfig)
            row_ids = self._row_ids(config, begin)
            if ranks.size > 1:
                rows = ranks.first_says(None if row_ids is None else row_ids.tolist())
                row_ids = None if rows is None else torch.tensor(rows, dtype=torch.long)
            # The module is made from the base's weights as they are stored.
            _set(weights, stored)
            self.module = module.create(base if whole is None else whole(), config.shape, row_ids).to(base.device)
            _set(weights, rounded)
            self.module.enable_new_experts()
            self.module.begin_training()
        del stored
        self.modules = ModuleSet(base, [self.module])
        self.fork = self.modules.fork
        self._upper = Upper(self.modules)
        wanted = config.rows_wanted(len(packed))
        batch = batch_of(config.batch_size, wanted, ranks)
        self.packed = packed
        self._steps = text_data.schedule(len(packed), batch, wanted=wanted, seed=config.seed)
        if replay is not None:
            self.packed, self._steps = _with_replay(packed, replay, self._steps, config)
        self._imitated = round(self.module.imitation_share * len(self._steps))
        self._cache: FeatureCache | None = None
        # Of a base in parts all ranks run the same layers each time.
        if wanted > len(packed) and self.fork > 0 and whole is None:
            self._cache = FeatureCache(
                work / ("features.bin" if ranks.first else f"features-{ranks.rank}.bin"),
                len(self.packed),
                (config.sequence_length, base.hidden_size),
                self.dtype,
                limit=int(config.feature_cache),
                reserve=_CHECKPOINTS * self._checkpoint_bytes,
            )

        self._validation: _Passages | None = _Passages(
            self,
            beginnings(
                validation if ranks.first else (), validation_tokens(wanted * config.sequence_length), config.seed
            ),
        )
        self.rate: float | None = None
        self.trials: list[Trial] = []
        self.scores: dict[int, float] = {}
        self.history: list[dict[str, Any]] = []
        self.steps_done = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that were trained on."""
        return sum(self._tokens_of(i) for i in range(self.steps_done))

    @property
    def _checkpoint_bytes(self) -> int:
        return 3 * 4 * self.module.num_parameters()  # weights and both moments, in float32

    def scratch_bytes(self) -> int:
        """What the run takes of the disk at the most."""
        return _CHECKPOINTS * self._checkpoint_bytes + (self._cache.num_bytes if self._cache is not None else 0)

    def run(self, decay: Callable[[str, nn.Parameter], bool] = matrices) -> float:
        """Trains, and returns the seconds that it took. The module is that of the step with the lowest held-out loss.

        Args:
            decay: which parameters get weight decay.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        buffers = dict(self.module.named_buffers())
        if self.ranks.first:
            require_same_rows(self.work, self.text.tokens, self._begin)
        start = time.monotonic()
        score = self._validation.loss if self._validation else None
        validation = Validation(self.work, lambda: {**trained, **buffers}, score) if score else None
        try:
            found = self._given_or_found_rate(trained, buffers, decay) if self.ranks.first else None
            self.rate = self.ranks.first_says(found)
            assert self.rate is not None
            trying = time.monotonic() - start
            self.steps_done, seconds = train(
                trained,
                self._losses,
                len(self._steps),
                self._tokens_of,
                self.config,
                self.rate,
                folder=self.work,
                resume_hint="run the same command again to go on",
                decay=decay,
                buffers=buffers,
                validation=validation,
                ranks=self.ranks,
            )
        except RuntimeError as error:
            if out_of_memory(error) is not None:
                error.add_note(self._what_fits())
            raise
        finally:
            self._validation = None  # it holds this object, which holds the base
            if self._cache is not None:
                self._cache.close()
        self.scores = dict(validation.losses) if validation else {}
        # Imitation has another loss: of what a pool replaces, not of the text.
        self.history = [line for line in history.read(self.work) if line["step"] > self._imitated]
        return trying + seconds

    def _what_fits(self) -> str:
        """What to tell a user whose memory was full."""
        for p in self.module.parameters():
            p.grad = None
        trained = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        local = [p.to_local() if hasattr(p, "to_local") else p for p in self.base.model.parameters()]

        def one_row() -> None:
            row = self._steps[0][:1]
            labels = self.packed.labels(row).flatten().to(self.base.device)
            self._loss_of(self._features(row), labels).backward()

        return what_fits(
            self.base.device,
            tensor_bytes(local),
            self.module.num_bytes() + 3 * 4 * trained,  # gradients and both moments
            self.config.sequence_length,
            max(map(len, self._steps)),
            one_row if self.ranks.size == 1 else None,
        )

    def record(self) -> dict[str, Any]:
        """What a manifest says of how it was trained."""
        after = {step: loss for step, loss in self.scores.items() if step}
        return {
            "learning_rate": self.rate,
            "trials": [asdict(trial) for trial in self.trials],
            "batch_size": max(map(len, self._steps)),
            "steps": self.steps_done,
            "best_step": min(after, key=lambda step: (after[step], step), default=self.steps_done),
            "validation": {str(step): loss for step, loss in sorted(self.scores.items())},
            "losses": history.shortened(self.history),
        }

    # The rate

    def _given_or_found_rate(
        self, trained: Mapping[str, nn.Parameter], buffers: Mapping[str, Tensor], decay: Callable[..., bool]
    ) -> float:
        computed = module_rate(self.base.hidden_size)
        if self.config.learning_rate != AUTO:
            return self.config.rate_or(computed)
        rates, plan = self._trials_for(computed)
        if not plan or self._imitated:  # what a pool imitates first says nothing of the rest
            why = "trials would only see it imitate" if plan else "the run is too short for trials"
            say(f"learning rate {computed:.2g}, computed from the base's width: {why}")
            return computed
        start = {name: t.detach().clone() for name, t in {**trained, **buffers}.items()}
        rows: list[tuple[Tensor, Tensor]] = []

        def trial(rate: float, steps: int) -> float:
            _put(start, {**trained, **buffers})
            while len(rows) < steps:
                rows.append(self._trial_row(len(rows)))
            return self._trial(rows[:steps], rate, trained, decay)

        device = self.base.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            found, self.trials = find_rate(rates, plan, trial, self.work / "trials.json")
        _put(start, {**trained, **buffers})
        return found

    def _trials_for(self, computed: float) -> tuple[list[float], list[tuple[int, int]]]:
        """Rates to try, and in rounds how many of them for how many trial steps."""
        per_step = min(self._tokens_of(0) // self._trial_length, _TRIALS_A_STEP)
        return trials_for(computed, len(self._steps), per_step)

    @property
    def _trial_length(self) -> int:
        """Tokens of a row that a trial step reads."""
        length = self.config.sequence_length
        return min(max(length // _TRIAL_LENGTH, _LEAST_TRIAL), length)

    def _trial_row(self, step: int) -> tuple[Tensor, Tensor]:
        """What a trial step reads: what the layers above the fork are given, and labels (t,)."""
        row = self._steps[step % len(self._steps)][:1]
        labels, length = self.packed.labels(row), self._trial_length
        if not bool((labels[:, :length] >= 0).any()):  # of a conversation whose first answer comes later
            length = labels.shape[1]
        given = self._given(self.packed[row][:, :-1][:, :length].to(self.base.device))
        return given, labels[0, :length].to(self.base.device)

    def _trial(
        self,
        rows: Sequence[tuple[Tensor, Tensor]],
        rate: float,
        trained: Mapping[str, nn.Parameter],
        decay: Callable[..., bool],
    ) -> float:
        torch.manual_seed(self.config.seed)
        optimizer = make_optimizer(trained, lr=rate, weight_decay=self.config.weight_decay, decay=decay)
        losses = []
        for step, (given, labels) in enumerate(rows):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, len(rows), rate, _TRIAL_WARMUP)
            loss = self._loss_of(given, labels)
            loss.backward()
            losses.append(float(loss.detach()))
            norm = clip_gradients(trained.values(), self.config.clip or math.inf)
            if not math.isfinite(losses[-1]) or not math.isfinite(float(norm)):
                optimizer.zero_grad(set_to_none=True)
                return math.inf
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        later = losses[len(losses) // 2 :]
        return sum(later) / len(later)

    @property
    def sample_wanted(self) -> int:
        """Rows of text that suit a run of this size, to ask the base on what it knows."""
        return max(self.config.rows_wanted(len(self.text)) // _SAMPLE_SHARE, 4)

    def _row_ids(self, config: LearnConfig, begin: Sequence[int]) -> Tensor | None:
        """Ids of the vocabulary rows of its own that a module gets, if it gets any. A run that goes on has chosen."""
        if config.shape.vocabulary == "none" or not self.ranks.first:
            return None
        file = self.work / _ROWS
        with suppress(OSError, ValueError, TypeError, KeyError):
            known = read_json(file)
            if known["sha256"] == _digest(known["rows"]):
                return torch.tensor(known["rows"], dtype=torch.long)
        chosen = self._least_known(config, begin)
        self.work.mkdir(parents=True, exist_ok=True)
        rows = chosen.tolist()
        write_atomic(file, json.dumps({"rows": rows, "sha256": _digest(rows)}).encode())
        return chosen

    def _least_known(self, config: LearnConfig, begin: Sequence[int]) -> Tensor:
        """Of the tokens that the domain uses, those that the base knows least."""
        vocab = self.base.vocab_size
        lost = torch.zeros(vocab, dtype=torch.float64)

        def per_token(labels: Tensor, losses: Tensor) -> None:
            lost.index_add_(0, labels.cpu(), losses.cpu().double())

        count = min(self.sample_wanted, self.sample_rows)
        sample, counted = sample_passages(self.text, count, config.seed, begin), None
        used = self.text.tokens[:, 1:]
        if self.text.counted is not None:  # tokens that are not learned need no rows
            rows = np.random.default_rng(config.seed).permutation(len(self.text))[:count]
            sample, counted = self.text.tokens[rows].tolist(), self.text.counted[rows].tolist()
            used = used[self.text.counted[:, 1:]]
        with phase("choosing vocabulary rows", len(sample), "passages"):
            passage_losses(ModuleSet(self.base), sample, counted=counted, per_token=per_token)
        counts = np.bincount(used.reshape(-1), minlength=vocab)
        return choose_rows(lost, torch.from_numpy(counts), config.max_rows or min(max(vocab // 4, 1), 8192))

    def _tokens_of(self, step: int) -> int:
        return len(self._steps[step]) * self.config.sequence_length

    def _features(self, rows: np.ndarray) -> Tensor:
        return self._given(self.packed[rows][:, :-1].to(self.base.device))

    @torch.no_grad()
    def _given(self, ids: Tensor) -> Tensor:
        """What runs above the fork is given for token ids (b, t): features (b, t, d), or at fork 0 the ids."""
        if self.fork == 0:
            return ids
        hidden, shared = self.base.begin(ids)
        hidden = self.base.embed_positions(hidden, shared.positions)
        return self.base.run(hidden, self.modules.layers[: self.fork], shared)

    def _losses(self, step: int) -> Iterator[Tensor]:
        parts = self.config.gradient_accumulation_steps
        for rows, share in self.ranks.parts_of(self._steps[step], self.packed.labels, parts):
            labels = self.packed.labels(rows).flatten().to(self.base.device)
            if self._cache is None:
                given = self._features(rows)
            else:
                given = self._cache.get(rows, self._features).to(self.base.device)
            # A part without a share is there for what other ranks gather, and leaves nothing else.
            with self._traceless() if share == 0 else nullcontext():
                if step < self._imitated:
                    with imitation() as errors:
                        self._upper.states(given, self._weights())
                    yield share * torch.stack(errors).sum()
                else:
                    yield share * self._loss_of(given, labels)

    @contextmanager
    def _traceless(self) -> Iterator[None]:
        """Running statistics and random numbers go on as if nothing had been computed inside."""
        device = self.base.device
        random = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with random, unchanged(dict(self.module.named_buffers())):
            yield

    def _weights(self) -> dict[str, Tensor]:
        """The module's weights are float32; each step runs on a copy of them in the dtype of the matrix products.
        Unlike autocast this keeps norms and activations in that dtype too, and casts each weight once. Tables stay as
        they are: a step reads a few of their rows."""
        return {
            f"module.{name}": p.to(self.dtype)
            for name, p in self.module.named_parameters()
            if not name.startswith("rows.head.") and not self.module.is_table(name)
        }

    def _loss_of(self, given: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of labels (n,), those that count, for what the layers above the fork are given, with what the
        config adds."""
        with watched() as routings:
            hidden = self._upper.states(given, self._weights(), recompute=self.config.activation_checkpointing)
        own = self.module.rows.head
        loss = linear_cross_entropy(
            hidden.flatten(0, 1),
            self.base.head_weight,
            labels,
            rows=None if own is None else own.rows,
            ids=None if own is None else own.ids,
            softcap=self.base.softcap,
        )
        if not isinstance(self.config, LearnConfig):
            return loss
        if self.config.load_concentration:
            loss = loss + self.config.load_concentration * sum(load_concentration(r.logits) for r in routings)
        if self.config.routing_regularisation and (weight := self.module.regularisation()) is not None:
            loss = loss + self.config.routing_regularisation * weight
        return loss

    @torch.no_grad()
    def heldout_losses(self, given: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        """Losses (n,) of the labels (b, t) that count, for what the layers above the fork are given, without dropout
        and by running statistics."""
        training = [m for m in self.module.modules() if m.training]
        self.module.eval()
        try:
            hidden = self._upper.states(given, self._weights())
        finally:
            for module in training:
                module.training = True
        own = self.module.rows.head
        return token_losses(
            hidden[counted],
            self.base.head_weight,
            labels[counted],
            rows=None if own is None else own.rows,
            ids=None if own is None else own.ids,
            softcap=self.base.softcap,
        )


class _Passages:
    """Held-out passages, with what is computed of them below the fork once.

    Attributes:
        num_tokens: of all passages.
    """

    def __init__(self, training: ModuleTraining, passages: Sequence[text_data.Passage]) -> None:
        self._training, self._batches = training, []
        self.num_tokens = sum(len(p.tokens) for p in passages)
        order = sorted(passages, key=lambda p: len(p.tokens))
        for at in range(0, len(order), _SCORED):
            some = order[at : at + _SCORED]
            ids, scored = pad_right([p.tokens for p in some], training.base.device)
            if (masks := text_data.masks_of(some)) is not None:
                scored = scored & pad_right([[int(c) for c in mask] for mask in masks], training.base.device)[0].bool()
            self._batches.append((training._given(ids[:, :-1]), ids[:, 1:], scored[:, 1:]))

    def __bool__(self) -> bool:
        return bool(self._batches)

    def loss(self) -> float:
        """Nats a token with the module as it is now."""
        losses = [self._training.heldout_losses(*batch) for batch in self._batches]
        return float(torch.cat(losses).double().mean()) if losses else math.nan


def batch_of(given: int | None, rows: int, ranks: Ranks) -> int:
    """Rows of a step, of a run of so many rows in all: as many for each rank.

    Raises:
        ConfigError: what was given cannot be shared out.
    """
    if given is not None:
        ranks.require_divisor(given)
        return given
    chosen = min(max(round(rows / _STEPS), 1), _LARGEST_BATCH)
    return math.ceil(chosen / ranks.size) * ranks.size


def _digest(rows: Sequence[int]) -> str:
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def as_served(base: Base, module: KnowledgeModule, where: str) -> KnowledgeModule:
    """A trained module as the store will give it back: in the base's dtype."""
    tensors = {k: v.detach().to(base.dtype) if v.is_floating_point() else v for k, v in module.state_dict().items()}
    return type(module).restore(base, module.config, tensors, where)


def _with_replay(
    packed: text_data.PackedTokens, replay: text_data.PackedTokens, steps: list[np.ndarray], config: ModuleTrainConfig
) -> tuple[text_data.PackedTokens, list[np.ndarray]]:
    """Rows of both texts, and steps to which as many rows of `replay` were added as make its share of them all."""
    many = sum(map(len, steps))
    extra = max(round(many * config.replay_ratio / (1 - config.replay_ratio)), 1)
    order = text_data.schedule(len(replay), extra, wanted=extra, seed=config.seed)
    drawn = np.concatenate(order)[:extra] + len(packed)
    shares = np.array_split(drawn, len(steps))
    both = text_data.PackedTokens.joined([packed, replay])
    return both, [np.concatenate(pair) for pair in zip(steps, shares, strict=True)]


@torch.no_grad()
def _put(values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])


def _set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.data = value
