"""A published base and the text of domains, as benchmarks on it read them: a folder a domain, with train, valid and
test.txt, documents between blank lines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from growlm import data as text_data
from growlm.base import Base
from growlm.base.checkpoint import load_model, load_tokenizer
from growlm.training.corpus import beginnings

LENGTH, BATCH = 256, 4


class OnPublished:
    """Takes the arguments `data` and `base`, folders both; `rows` takes `text` and `tokens` too."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        self.tokenizer = load_tokenizer(a.base)

    @cached_property
    def base(self) -> Base:
        return Base(load_model(self.a.base, "float32"), str(self.a.base))

    def begun(self, text: Sequence[int]) -> list[int]:
        """A text as the base expects one to begin."""
        return [*text_data.start_tokens(self.tokenizer), *text]

    def documents(self, domain: str, split: str) -> list[text_data.Document]:
        return text_data.read([self.a.data / domain / f"{split}.txt"], separator="\n\n").documents

    def rows(self, domain: str, seed: int) -> tuple[np.ndarray, text_data.PackedTokens]:
        """The rows to train on, `tokens` in all, drawn by the seed from a domain's first `text` tokens; and which."""
        packed = text_data.pack(self.documents(domain, "train"), self.tokenizer, LENGTH, max_tokens=self.a.text)
        drawn = np.random.default_rng(seed).permutation(len(packed))[: self.a.tokens // LENGTH]
        return drawn, text_data.PackedTokens(packed.tokens[drawn])

    def passages(self, domain: str, split: str, tokens: int) -> list[text_data.Passage]:
        """So many tokens of a split, in beginnings of passages."""
        found = text_data.passages(self.documents(domain, split), self.tokenizer, LENGTH)
        return beginnings(found, tokens, 0)
