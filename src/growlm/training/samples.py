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
from growlm.base.cache import KVCache
from growlm.base.padding import pad_left
from growlm.modules import KnowledgeModule, ModuleSet
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
            alone += _written(ModuleSet(base), tokenizer, prompts)
            together += _written(ModuleSet(base, [module]), tokenizer, prompts)
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
def _written(modules: ModuleSet, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The likeliest tokens, one after another."""
    base, ends = modules.base, modules.base.end_tokens(tokenizer)
    ids, visible = pad_left(prompts, base.device)
    seen = ids if visible is None else ids.masked_fill(~visible, -1)
    cache, new = KVCache(modules.cache_slots), ids
    rows: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    while True:
        hidden, shared = base.begin(new, past=seen.shape[1] - new.shape[1], visible=visible, cache=cache)
        hidden = base.embed_positions(modules.embed(hidden, new), shared.positions)
        hidden = base.run(hidden, modules.layers, shared)[:, -1:]
        new = modules.project(hidden, modules.contexts(seen, 1)).argmax(-1)
        going -= {row for row in going if int(new[row]) in ends}
        for row in going:
            rows[row].append(int(new[row]))
        if not going or len(rows[next(iter(going))]) == _NEW:
            return rows
        seen = torch.cat([seen, new], dim=1)
        if visible is not None:
            visible = torch.cat([visible, visible.new_ones(len(rows), 1)], dim=1)
