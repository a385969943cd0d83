"""Showing: data as a base will see it, what is learned between « and ». For people, before a long run."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from growlm.data.packing import PackedTokens, passages
from growlm.data.reading import Document

_LONGEST = 1000  # characters of a sample
_LINE = 160  # and of one in a line


@dataclass(frozen=True)
class Sample:
    """A document's first passage of so many as the base will see it; `learned` of its tokens are learned, which `text`
    has in « »."""

    source: str
    tokens: int
    learned: int
    text: str
    passages: int


@dataclass(frozen=True)
class Shown:
    """How much there is, and some of it. Documents are texts or conversations; tokens of conversations are those within
    a row."""

    documents: int
    conversations: int
    tokens: int
    learned: int
    samples: list[Sample]
    sequence_length: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        cut = f" (each up to {self.sequence_length:,} tokens)" if self.conversations else ""
        read = _kinds(self.documents - self.conversations, self.conversations)
        found = [f"read: {read}{cut}, none held out; {_learned(self.learned, self.tokens)}"]
        for sample in self.samples:
            which = f", the first of {sample.passages:,} passages" if sample.passages > 1 else ""
            found += ["", f"{sample.source}{which}: {_learned(sample.learned, sample.tokens)}", sample.text]
        return found


def show(
    documents: Sequence[Document],
    tokenizer: Any,
    sequence_length: int,
    *,
    loss: str = "answers",
    samples: int = 3,
    seed: int = 0,
) -> Shown:
    """Counts documents as `passages` cuts them, and shows some that are drawn by the seed.

    Raises:
        DataError, ConfigError: as `pack`.
    """
    found = passages(documents, tokenizer, sequence_length, loss=loss)
    first = {p.document_index: p for p in reversed(found)}
    number = Counter(p.document_index for p in found)
    drawn = np.random.default_rng(seed).permutation(sorted(first))[:samples]
    return Shown(
        documents=len(documents),
        conversations=sum(bool(d.turns) for d in documents),
        tokens=sum(len(p.tokens) for p in found),
        learned=sum(len(p.tokens) if p.counted is None else sum(p.counted) for p in found),
        samples=[
            Sample(
                documents[index].source,
                len(first[index].tokens),
                len(first[index].tokens) if first[index].counted is None else sum(first[index].counted or ()),
                _cut(marked(tokenizer, first[index].tokens, first[index].counted), _LONGEST),
                number[index],
            )
            for index in sorted(drawn.tolist())
        ],
        sequence_length=sequence_length,
    )


def split_told(documents: Sequence[Document], train: Sequence[Document], heldout: Sequence[Document]) -> str:
    """For people: how many documents were read, and what `split` has held out of them."""
    left = {d.source for d in train}
    texts, talks = _numbers(heldout)
    sources = {d.source for d in heldout if not d.turns}
    whole = len(sources) == texts and not sources & left
    return f"read: {_kinds(*_numbers(documents))}; held out: {_kinds(texts, talks, 'document' if whole else 'passage')}"


def summary(packed: PackedTokens, tokenizer: Any, limit: str | None = None) -> list[str]:
    """What is about to be learned, in two lines: how much, and a piece of it.

    Args:
        limit: what keeps it from being more.
    """
    row = packed.tokens[0].tolist()
    counted = None if packed.counted is None else packed.counted[0].tolist()
    piece = marked(tokenizer, row, counted).replace("\n", "\\n")
    rows = f"{len(packed):,} row{'' if len(packed) == 1 else 's'} of {packed.tokens.shape[1] - 1:,} tokens"
    if limit is not None:
        rows = f"{'the first ' if len(packed) > 1 else ''}{rows} ({limit} ends there)"
    return [
        f"to train on: {rows}; {_learned(packed.num_counted, packed.num_tokens)}",
        f"the first row: {_cut(piece, _LINE)}",
    ]


def marked(tokenizer: Any, tokens: Sequence[int], counted: Sequence[bool] | None = None) -> str:
    """Text of token ids, what is learned between « and »."""
    parts = []
    mask = [True] * len(tokens) if counted is None else counted
    for learned, run in itertools.groupby(zip(tokens, mask, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        parts.append(f"«{text}»" if learned else text)
    return "".join(parts)


def _numbers(documents: Sequence[Document]) -> tuple[int, int]:
    """How many texts, and how many conversations."""
    talks = sum(bool(d.turns) for d in documents)
    return len(documents) - talks, talks


def _kinds(texts: int, talks: int, text: str = "document") -> str:
    kinds = {text: texts, "conversation": talks}
    return " and ".join(f"{n:,} {kind}{'' if n == 1 else 's'}" for kind, n in kinds.items() if n)


def _learned(learned: int, tokens: int) -> str:
    return f"{'all' if learned == tokens else f'{learned:,} of'} {tokens:,} tokens are learned"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
