"""Samples: how base and module go on after beginnings of held-out text, side by side.

Knows a base, a module and passages. What they write is told and kept nowhere: a store holds no text.
"""

from __future__ import annotations

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
    found = _prompts(passages, count, seed)
    if not found:
        return ()
    prompts = [prompt for prompt, _ in found]
    with phase("answering held-out prompts", 2, "models") as answering:
        alone = _written(base.model, base, tokenizer, prompts)
        answering.advance()
        with attached(base.model, module):
            together = _written(base.model, base, tokenizer, prompts)
        answering.advance()

    def text(tokens: Sequence[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True)

    return tuple(
        Sample(text(prompt), text(rest), text(one), text(other))
        for (prompt, rest), one, other in zip(found, alone, together, strict=True)
    )


def _prompts(passages: Sequence[text_data.Passage], count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts, and of what the text says next."""
    first: dict[int, tuple[list[int], list[int]]] = {}  # by document
    others = []
    for index in np.random.default_rng(seed).permutation(len(passages)):
        passage = passages[index]
        counted = passage.counted
        cut = _PROMPT if counted is None else counted.index(True)
        if not 0 < cut <= _LONGEST or len(passage.tokens) < cut + _LEAST:
            continue
        end = cut + _NEW
        if counted is not None and False in counted[cut:end]:  # of an answer that ends before
            end = counted.index(False, cut)
        found = passage.tokens[:cut], passage.tokens[cut:end]
        if first.setdefault(passage.document_index, found) is not found:
            others.append(found)
    return [*first.values(), *others][:count]


@torch.inference_mode()
def _written(model: Any, base: Base, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    from transformers import GenerationConfig

    ids, visible = pad_left(prompts, base.device)
    how = GenerationConfig(
        max_new_tokens=_NEW, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id
    )
    mask = torch.ones_like(ids) if visible is None else visible.long()
    written = model.generate(ids, attention_mask=mask, generation_config=how)[:, ids.shape[1] :]
    return [row.tolist() for row in written]
