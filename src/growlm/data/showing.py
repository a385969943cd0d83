"""Showing: data as a base will see it, what is learned between « and ». For people, before a long run."""

from __future__ import annotations

import itertools
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
    """A document's beginning as the base will see it; `learned` of its tokens are learned, which `text` has in « »."""

    source: str
    tokens: int
    learned: int
    text: str


@dataclass(frozen=True)
class Shown:
    """How much there is, and some of it. Documents are texts or conversations; tokens of conversations are those within
    a row."""

    documents: int
    conversations: int
    tokens: int
    learned: int
    samples: list[Sample]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        found = [_amount(self.documents, self.conversations, self.tokens, self.learned)]
        for sample in self.samples:
            found += ["", f"{sample.source}: {sample.tokens:,} tokens, {sample.learned:,} learned", sample.text]
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
            )
            for index in sorted(drawn.tolist())
        ],
    )


def summary(documents: Sequence[Document], packed: PackedTokens, tokenizer: Any) -> list[str]:
    """What is about to be learned, in two lines: how much, and a piece of it.

    Args:
        documents: all that were read; `packed` has those that are trained on.
    """
    conversations = sum(bool(d.turns) for d in documents)
    row = packed.tokens[0].tolist()
    counted = None if packed.counted is None else packed.counted[0].tolist()
    piece = marked(tokenizer, row, counted).replace("\n", "\\n")
    return [
        f"{_amount(len(documents), conversations, packed.num_tokens, packed.num_counted)}, in {len(packed):,} rows",
        f"the first of them: {_cut(piece, _LINE)}",
    ]


def marked(tokenizer: Any, tokens: Sequence[int], counted: Sequence[bool] | None = None) -> str:
    """Text of token ids, what is learned between « and »."""
    parts = []
    mask = [True] * len(tokens) if counted is None else counted
    for learned, run in itertools.groupby(zip(tokens, mask, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        parts.append(f"«{text}»" if learned else text)
    return "".join(parts)


def _amount(documents: int, conversations: int, tokens: int, learned: int) -> str:
    kinds = {"document": documents - conversations, "conversation": conversations}
    told = " and ".join(f"{n:,} {kind}{'' if n == 1 else 's'}" for kind, n in kinds.items() if n)
    return f"{told}: {tokens:,} tokens, {'all' if learned == tokens else f'{learned:,}'} of which are learned"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
