"""What a user would do instead of growlm: finetune, LoRA, train on everything. One training step for all of them.

Knows a transformers model, documents and a folder for checkpoints; nothing of stores or domains.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from growlm import data as text_data
from growlm.base import Base
from growlm.base.placement import Placement
from growlm.layers.cross_entropy import linear_cross_entropy
from growlm.modules import ModuleSet
from growlm.modules.scoring import num_labels, passage_losses
from growlm.progress import reporting
from growlm.training.config import TrainConfig
from growlm.training.loop import train


class Baseline:
    """A model that is trained in place.

    Args:
        model: a transformers causal LM; it is copied.
        lora_parameters: train a LoRA of about so many parameters over all linear layers; None trains everything.
        vocabulary: of these parameters, spend first what it takes to train the whole input embedding (and the output
            head that is tied to it), as a module has rows of its own.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, lora_parameters: int | None = None, vocabulary: bool = False, seed: int = 0
    ) -> None:
        torch.manual_seed(seed)  # of a LoRA's first weights
        self.model = copy.deepcopy(model).float()
        self._adapter: Any = None
        self.tokenizer = tokenizer
        if lora_parameters is None:
            self.model.requires_grad_(True)
        else:
            one = sum(
                sum(m.weight.shape)
                for n, m in self.model.named_modules()
                if isinstance(m, torch.nn.Linear) and "lm_head" not in n
            )
            embedding = self.model.get_input_embeddings().weight
            left = lora_parameters - (embedding.numel() if vocabulary else 0)
            rank = max(round(left / one), 1)
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0)
            self._adapter = get_peft_model(self.model, config)  # puts its layers into the model
            embedding.requires_grad_(vocabulary)
        self.base = Base(self.model, freeze=False)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def merged(self) -> Any:
        """The model without PEFT's layers, their differences in its weights; nothing can be trained after it."""
        return self.model if self._adapter is None else self._adapter.merge_and_unload()

    def learn(
        self,
        text: Sequence[text_data.Document] | text_data.PackedTokens,
        config: TrainConfig,
        folder: Path,
        title: str,
    ) -> float:
        """Trains on documents, or on rows that are packed already, and returns the seconds it took. A run that was
        killed goes on from `folder`."""
        if isinstance(text, text_data.PackedTokens):
            packed = text
        else:
            packed = text_data.pack(text, self.tokenizer, config.sequence_length, max_tokens=config.max_tokens)
        wanted = config.rows_wanted(len(packed))
        order = text_data.schedule(len(packed), config.batch_size, wanted=wanted, seed=config.seed)
        dtype = Placement.of("cpu", config.precision).dtype

        def losses_of_step(step: int) -> list[torch.Tensor]:
            batch = packed[order[step]]
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                hidden = self.base.norm(ModuleSet(self.base).hidden(batch[:, :-1])).to(dtype)
            return [linear_cross_entropy(hidden.flatten(0, 1), self.base.head_weight, batch[:, 1:].flatten())]

        self.model.train()
        with reporting(title):
            _, seconds = train(
                self.parameters,
                losses_of_step,
                len(order),
                lambda step: len(order[step]) * config.sequence_length,
                config,
                config.rate_or(1e-3),
                folder=folder,
                resume_hint="run the same command again to go on",
            )
        self.model.eval()
        return seconds

    def loss(self, passages: Sequence[Sequence[int]]) -> float:
        """Nats a token."""
        return float(passage_losses(ModuleSet(self.base), passages).sum()) / num_labels(passages)
