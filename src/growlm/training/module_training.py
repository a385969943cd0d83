"""Training of one module: base frozen below the fork, module above it, from cached features where text is read again.

Knows token rows, a base and a kind of module; nothing of stores, files of text or the router.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from growlm import data as text_data
from growlm.base import Base
from growlm.base.placement import Placement
from growlm.layers.cross_entropy import linear_cross_entropy
from growlm.layers.losses import load_concentration
from growlm.layers.pools import imitation
from growlm.layers.routing import watched
from growlm.modules import KnowledgeModule, ModuleSet
from growlm.modules.scoring import passage_losses
from growlm.modules.vocabulary import choose_rows
from growlm.progress import phase
from growlm.training.config import LearnConfig, ModuleTrainConfig
from growlm.training.corpus import sample_passages
from growlm.training.features import FeatureCache
from growlm.training.loop import matrices, module_rate, train

_SAMPLE_ROWS = 64  # rows of training text on which the base is asked what it knows
_CHECKPOINTS = 3  # that the feature cache leaves room for: the last one, the next one, and what is learned


class ModuleTraining:
    """One run: a module in float32, the base in the dtype of the matrix products.

    Args:
        module: a kind, of which a new one is made and all of it trained; or one in float32, of which what requires a
            gradient is trained and the rest stays as it is, batch statistics too.
        begin: what every prompt begins with.
        replay: other text, of which rows are read along.
    """

    def __init__(
        self,
        base: Base,
        module: type[KnowledgeModule] | KnowledgeModule,
        config: ModuleTrainConfig,
        packed: text_data.PackedTokens,
        work: Path,
        begin: Sequence[int] = (),
        replay: text_data.PackedTokens | None = None,
    ) -> None:
        self.base, self.config, self.text, self.work = base, config, packed, work
        self.dtype = Placement.of(base.device, config.precision).dtype
        torch.manual_seed(config.seed)
        # Parameters alone change their dtype: buffers, the frequencies of rotary positions among them, stay as exact as
        # they are served. A tied weight is one parameter.
        weights = list(base.model.parameters())
        stored = [p.data for p in weights]
        rounded = [p.data.to(self.dtype) for p in weights]
        _set(weights, rounded)
        if isinstance(module, KnowledgeModule):
            self.module = module
        else:
            assert isinstance(config, LearnConfig)
            row_ids = self._least_known(config, begin)
            # The module is made from the base's weights as they are stored.
            _set(weights, stored)
            self.module = module.create(base, config.shape, row_ids)
            _set(weights, rounded)
            self.module.enable_new_experts()
            self.module.begin_training()
        del stored
        self.modules = ModuleSet(base, [self.module])
        self.fork = self.modules.fork
        self._upper = _Upper(self.modules)
        wanted = config.rows_wanted(len(packed))
        self.packed, self._steps = (
            packed,
            text_data.schedule(len(packed), config.batch_size, wanted=wanted, seed=config.seed),
        )
        if replay is not None:
            self.packed, self._steps = _with_replay(packed, replay, self._steps, config)
        self._imitated = round(self.module.imitation_share * len(self._steps))
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

    def run(self, decay: Callable[[str, nn.Parameter], bool] = matrices) -> float:
        """Trains, and returns the seconds that it took.

        Args:
            decay: which parameters get weight decay.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        try:
            return train(
                {name: p for name, p in self.module.named_parameters() if p.requires_grad},
                self._loss,
                len(self._steps),
                self._tokens_of,
                self.config,
                self.config.learning_rate or module_rate(self.base.hidden_size),
                folder=self.work,
                resume_hint="run the same command again to go on",
                decay=decay,
                buffers=dict(self.module.named_buffers()),
            )
        finally:
            if self._cache is not None:
                self._cache.close()

    def _least_known(self, config: LearnConfig, begin: Sequence[int]) -> Tensor | None:
        """Of the tokens that the domain uses, those that the base knows least."""
        if config.shape.vocabulary == "none":
            return None
        vocab = self.base.vocab_size
        lost = torch.zeros(vocab, dtype=torch.float64)

        def per_token(labels: Tensor, losses: Tensor) -> None:
            lost.index_add_(0, labels.cpu(), losses.cpu().double())

        sample = sample_passages(self.text, _SAMPLE_ROWS, config.seed, begin)
        with phase("choosing vocabulary rows", len(sample), "passages"):
            passage_losses(ModuleSet(self.base), sample, per_token=per_token)
        counts = np.bincount(self.text.tokens[:, 1:].reshape(-1), minlength=vocab)
        return choose_rows(lost, torch.from_numpy(counts), config.max_rows or min(max(vocab // 4, 1), 8192))

    def _tokens_of(self, step: int) -> int:
        return len(self._steps[step]) * self.config.sequence_length

    def _features(self, rows: np.ndarray) -> Tensor:
        input_ids = self.packed[rows][:, :-1].to(self.base.device)
        with torch.no_grad():
            hidden, shared = self.base.begin(input_ids)
            hidden = self.base.embed_positions(hidden, shared.positions)
            return self.base.run(hidden, self.modules.layers[: self.fork], shared)

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
        # Tables stay as they are: a step reads a few of their rows.
        weights = {
            f"module.{name}": p.to(self.dtype)
            for name, p in self.module.named_parameters()
            if not name.startswith("rows.head.") and not self.module.is_table(name)
        }
        if step < self._imitated:
            with imitation() as errors:
                torch.func.functional_call(self._upper, weights, (given,))
            return torch.stack(errors).sum()
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
        if not isinstance(self.config, LearnConfig):
            return loss
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
        return base.norm(base.run(given, self._set.layers[fork:], shared))


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
    both = text_data.PackedTokens(np.concatenate([packed.tokens, replay.tokens]))
    return both, [np.concatenate(pair) for pair in zip(steps, shares, strict=True)]


def _set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.data = value
