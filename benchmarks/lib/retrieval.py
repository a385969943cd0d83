"""Retrieval: the passages of a text that are nearest to a question, by their words or by a sentence encoder.

Knows texts; no base, and nothing of what is asked.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from growlm.base.sizes import tensor_bytes
from growlm.disk.tensors import read_tensors, write_tensors

_ENCODED = 256  # tokens that a sentence encoder reads at most
_BATCH = 32


class Index(Protocol):
    """Passages that are found by a question.

    Attributes:
        num_bytes: of the index, without the text.
        encoder_bytes: of the model that it needs besides.
        seconds: that it took to make.
    """

    num_bytes: int
    encoder_bytes: int
    seconds: float

    def best(self, question: str, count: int) -> list[int]:
        """The numbers of the nearest passages, the nearest first."""
        ...


def cut(documents: Sequence[np.ndarray], tokens: int) -> list[np.ndarray]:
    """Token ids of documents in passages of so many tokens."""
    return [ids[at : at + tokens] for ids in documents for at in range(0, len(ids), tokens)]


class Bm25:
    """By words that are rare in the text (Robertson and others 1994), as bm25s computes it."""

    encoder_bytes = 0

    def __init__(self, passages: Sequence[str]) -> None:
        import bm25s

        start = time.perf_counter()
        self._index = bm25s.BM25()
        self._index.index(self._words(passages), show_progress=False)
        self.seconds = time.perf_counter() - start
        arrays = [a for a in self._index.scores.values() if isinstance(a, np.ndarray)]
        words = sum(len(word.encode()) + 4 for word in self._index.vocab_dict)  # each with its number
        self.num_bytes = sum(a.nbytes for a in arrays) + words

    def best(self, question: str, count: int) -> list[int]:
        found, _ = self._index.retrieve(self._words([question]), k=count, show_progress=False)
        return [int(number) for number in found[0]]

    @staticmethod
    def _words(texts: Sequence[str]) -> Any:
        import bm25s

        return bm25s.tokenize(list(texts), stopwords=None, return_ids=False, show_progress=False)


class Encoder:
    """A sentence encoder: the mean of a BERT's last states, of length 1."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.num_bytes = tensor_bytes(self.model.parameters())

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """(n, d) float32."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        for at in range(0, len(order), _BATCH):
            some = order[at : at + _BATCH]
            read = self.tokenizer(
                [texts[i] for i in some], padding=True, truncation=True, max_length=_ENCODED, return_tensors="pt"
            )
            states, there = self.model(**read).last_hidden_state, read["attention_mask"][..., None]
            means = torch.nn.functional.normalize((states * there).sum(1) / there.sum(1), dim=-1)
            for i, mean in zip(some, means, strict=True):
                found[i] = mean
        return torch.stack(found)


class Embedding:
    """By a sentence encoder: the largest of all inner products.

    Args:
        kept: where the passages' vectors lie, or are left once they are made.
    """

    def __init__(self, passages: Sequence[str], encoder: Encoder, kept: Path) -> None:
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            vectors = encoder.encode(passages)
            seconds = torch.tensor(time.perf_counter() - start)
            write_tensors(kept.with_suffix(".part"), {"vectors": vectors, "seconds": seconds})
            kept.with_suffix(".part").replace(kept)
        read = read_tensors(kept)
        self._vectors, self.seconds = read["vectors"], float(read["seconds"])
        self._encoder = encoder
        self.num_bytes, self.encoder_bytes = self._vectors.nbytes, encoder.num_bytes

    def best(self, question: str, count: int) -> list[int]:
        near = self._vectors @ self._encoder.encode([question])[0]
        return near.topk(count).indices.tolist()
