"""Segments: rows of packed text through a whole model in training, with documents kept apart and history between parts.

Knows a base and token ids; nothing of data, optimisers or folders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from growlm.base import Base
from growlm.base.cache import cache_of
from growlm.errors import ConfigError, setting
from growlm.modules import ModuleSet

if TYPE_CHECKING:
    from growlm.model.modeling import LayerRouting

# b batch, t tokens of a row, d hidden size


def document_ids(input_ids: Tensor, end_of_text: int) -> Tensor:
    """The number of every token's document in its row, (b, t): an end of text belongs to the document that it ends."""
    ends = (input_ids == end_of_text).long()
    return ends.cumsum(-1) - ends


def final_states(
    base: Base, input_ids: Tensor, *, documents: Tensor | None = None, segment_length: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """What the head reads, (b, t, d), and the loss on what routers decided, for a model that has one.

    Args:
        documents: (b, t); a token attends to tokens of its own document only.
        segment_length: rows run in segments of so many tokens, each of which reads the last keys and values of those
            before it, as many as the config's `history_length` and without gradient (Transformer-XL).
    """
    if not hasattr(base.model, "auxiliary_loss"):
        return base.norm(ModuleSet(base).hidden(input_ids)), None
    t = input_ids.shape[1]
    states: list[Tensor] = []
    routings: list[tuple[LayerRouting, ...]] = []
    history: Any = None
    for start in range(0, t, segment_length or t):
        stop = min(start + (segment_length or t), t)
        seen = history.get_seq_length() if history is not None else 0
        out = base.decoder(
            input_ids[:, start:stop],
            cache=history,
            use_cache=stop < t or start > 0,
            document_ids=None if documents is None else documents[:, start - seen : stop],
            output_routings=True,
        )
        if stop < t:
            history = base.decoder.history(cache_of(out))
            if not history.get_seq_length():
                raise ConfigError(
                    "segments read the keys of those before, which gradient checkpointing drops; turn one of them off"
                )
        states.append(out.last_hidden_state)
        routings.append(out.routings)
    # A segment's share of the loss is its share of the row.
    losses = [base.model.auxiliary_loss(r) * (len(s[0]) / t) for r, s in zip(routings, states, strict=True)]
    return torch.cat(states, 1), torch.stack(losses).sum()


def check_segments(base: Base, sequence_length: int, *, separate_documents: bool, segment_length: int | None) -> None:
    """
    Raises:
        ConfigError: the model cannot keep documents apart or read history, or the segments do not fit.
    """
    family = base.config.model_type
    if family != "growlm" and (separate_documents or segment_length is not None):
        given = "separate_documents" if separate_documents else "segment_length"
        raise ConfigError(
            f"{setting(given)} is for growlm models, e.g. the preset molm-tiny; {base.where} is a {family}"
        )
    if segment_length is None:
        return
    if segment_length >= sequence_length:
        raise ConfigError(
            f"{setting('segment_length')} is {segment_length}; it must be less than {setting('sequence_length')}, "
            f"{sequence_length}"
        )
    if not base.config.history_length:
        raise ConfigError(f"{base.where}: history_length is 0 in its config, so segments would read nothing; set it")
    if any(base.config.attention_of(i) == "softmax" for i in range(base.num_layers)):
        raise ConfigError(
            f"{base.where}: {setting('segment_length')} needs stick-breaking attention in all layers; a history "
            "would shift rotary positions"
        )
