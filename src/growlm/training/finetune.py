"""Finetune: all parameters of a checkpoint trained further on a body of text, as before or after pruning.

Overwrites what the model knew, as finetuning does: for knowledge that is kept apart there is `learn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from growlm import data as text_data
from growlm.base.checkpoint import fingerprint, load_model, load_tokenizer, resolve, tokenizer_fingerprint
from growlm.errors import ConfigError
from growlm.layers.losses import load_concentration
from growlm.layers.routing import ExpertRouter
from growlm.progress import reporting
from growlm.training.config import FinetuneConfig
from growlm.training.parallel import joined
from growlm.training.pretrain import default_rate
from growlm.training.whole_model import TrainedModel, train_whole

if TYPE_CHECKING:
    from growlm.model.modeling import LayerRouting


def finetune(
    source: str | Path,
    out: str | Path,
    data: Sequence[str | Path],
    config: FinetuneConfig | None = None,
    *,
    restart: bool = False,
    shard_model: bool = False,
    progress: bool | None = None,
) -> TrainedModel:
    """Trains a checkpoint on `data` and saves the result to `out`, in float32.

    A growlm model trains with the auxiliary loss of its config; with `load_concentration` with that one instead
    (ModuleFormer, equation 8), so that it comes to use fewer experts.

    Args:
        shard_model: of several ranks each has a part of the model's layers, of their gradients and optimiser state.
        progress: False is silent; by default there are bars on stderr, or where it is no terminal, lines, one in ten
            seconds at most.

    Raises:
        BaseModelError: `source` is no checkpoint of a supported family.
        ConfigError: `load_concentration` for a model without experts.
        Other errors, and resuming, are those of `train_whole`.
    """
    config = config or FinetuneConfig()
    folder, out = resolve(source), Path(out).expanduser()

    def make(documents: list[text_data.Document]) -> tuple[Any, Any]:
        torch.manual_seed(config.seed)  # for dropout
        model = load_model(folder, "float32").requires_grad_(True)
        if config.load_concentration:
            if not any(isinstance(m, ExpertRouter) for m in model.modules()):
                family = model.config.model_type
                raise ConfigError(
                    f"{folder}: a model of the family {family!r} without experts; --load-concentration needs some"
                )
            # Of this run: the config, which is saved, keeps the loss that the model was made with.
            model.auxiliary_loss = partial(_concentration, config.load_concentration)
        return model, load_tokenizer(folder)

    with joined() as ranks, reporting(out.name, progress if ranks.first else False):
        return train_whole(
            out,
            data,
            config,
            make,
            verb="finetune",
            rate=lambda width: default_rate(width) / 2,
            identity=f"{fingerprint(folder)} {tokenizer_fingerprint(folder)}",
            restart=restart,
            never_worse=not config.load_concentration,  # which trades loss for fewer experts
            ranks=ranks,
            shard_model=shard_model,
        )


def _concentration(weight: float, routings: Sequence[LayerRouting]) -> Tensor:
    decisions = [d for r in routings for d in (r.attention, r.feed_forward) if d is not None]
    return weight * torch.stack([load_concentration(d.logits) for d in decisions]).sum()
