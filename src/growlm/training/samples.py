"""Samples: how base and module go on after beginnings of held-out text, side by side.

Knows a base, a module and passages. What they write is told and kept nowhere: a store holds no text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from growlm import data as text_data
from growlm.base import Base
from growlm.base.padding import pad_left
from growlm.modules import KnowledgeModule
from growlm.modules.attachment import attached
from growlm.progress import phase

_PROMPT = 32  # tokens of a text's beginning; of a conversation all before its first answer,
_LONGEST = 512  # if it is no longer than so many
_NEW = 40  # tokens that are written
_LEAST = 4  # that the text goes on for
_BATCH = 4  # prompts that are answered together


@dataclass(frozen=True)
class Sample:
    """One prompt and what follows: in the text that was held out, from the base, and from base and module."""

    prompt: str
    text: str
    base: str
    module: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def side_by_side(
    base: Base,
    module: KnowledgeModule,
    tokenizer: Any,
    passages: Sequence[text_data.Passage],
    count: int,
    *,
    seed: int = 0,
) -> tuple[Sample, ...]:
    """Answers to at most `count` prompts without sampling; of as many documents as there are."""
    found = _prompts(passages, count, seed, base.max_positions or base.trained_positions or math.inf)
    if not found:
        return ()
    alone: list[list[int]] = []
    together: list[list[int]] = []
    with phase("answering held-out prompts", len(found), "prompts") as answering:
        for at in range(0, len(found), _BATCH):
            prompts = [prompt for prompt, _ in found[at : at + _BATCH]]
            alone += _written(base, tokenizer, prompts)
            with attached(base.model, module):
                together += _written(base, tokenizer, prompts)
            answering.advance(len(prompts))

    def text(tokens: Sequence[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True)

    return tuple(
        Sample(text(prompt), text(rest), text(one), text(other))
        for (prompt, rest), one, other in zip(found, alone, together, strict=True)
    )


def _prompts(
    passages: Sequence[text_data.Passage], count: int, seed: int, positions: float
) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts that leave room for an answer, and of what the text says next."""
    first: dict[int, tuple[list[int], list[int]]] = {}  # by document
    others = []
    for index in np.random.default_rng(seed).permutation(len(passages)):
        passage = passages[index]
        counted = passage.counted
        if not passage.num_scored:  # a conversation of which no answer is left
            continue
        # Of a conversation of which all is learned nothing says where an answer begins.
        cut = _PROMPT if counted is None or counted[0] else counted.index(True)
        if cut > min(_LONGEST, positions - _NEW) or len(passage.tokens) < cut + _LEAST:
            continue
        end = cut + _NEW
        if counted is not None and False in counted[cut:end]:  # of an answer that ends before
            end = counted.index(False, cut)
        found = passage.tokens[:cut], passage.tokens[cut:end]
        if first.setdefault(passage.document_index, found) is not found:
            others.append(found)
    return [*first.values(), *others][:count]


@torch.inference_mode()
def _written(base: Base, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    from transformers import GenerationConfig

    model, ends = base.model, sorted(base.end_tokens(tokenizer))
    ids, visible = pad_left(prompts, base.device)
    mask = torch.ones_like(ids) if visible is None else visible.long()
    # Of the base's own settings, such as a penalty on repetition, none counts: `growlm generate` knows none either.
    own = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=_NEW, do_sample=False, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    try:
        written = model.generate(ids, attention_mask=mask)[:, ids.shape[1] :].tolist()
    finally:
        model.generation_config = own
    return [row[: next((at for at, token in enumerate(row) if token in ends), len(row))] for row in written]
