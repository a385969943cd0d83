"""Splitting: documents -> those that are trained on and those that are held out, the same ones every time."""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_left

from growlm.data.cutting import cut_text, require
from growlm.data.reading import Document, TextData
from growlm.errors import DataError
from growlm.progress import track

HELD_OUT_PASSAGES = 4  # a long held-out document is truncated to so many passages


def split(
    data: TextData,
    *,
    fraction: float = 0.02,
    at_least: int = 16,
    at_most: int = 128,
    seed: int = 0,
    passage_chars: int = 2000,
) -> tuple[list[Document], list[Document]]:
    """(train, held-out), both in the order of `data`.

    Whole documents are held out if at least `4 * at_least` differ, each truncated to a few passages. Conversations
    are held out whole, and never cut.
    Otherwise every document is cut into passages of about `passage_chars` characters, some passages are held
    out, and the stretches between them are the training documents. No copy of a held-out text, white space
    around it aside, stays in train.

    The texts whose hash with `seed` is in the lowest `fraction` are held out, whatever else is in the data.
    The bounds `at_least`, `at_most` and a quarter of all texts take more or fewer of the lowest hashes. At
    the first two bounds, more data can still return a held-out text to train, but never take one out of
    train.

    Raises `DataError` if fewer than four texts differ, `ConfigError` for a setting out of range.
    """
    require("fraction", fraction, 0, 0.25)
    require("at_least", at_least, 1)
    require("at_most", at_most, at_least)
    require("passage_chars", passage_chars, 1)
    units = [[document.text] for document in data.documents]
    if len({document.text.strip() for document in data.documents}) < 4 * at_least:
        units = [
            [document.text] if document.turns else list(cut_text(document.text, passage_chars))
            for document in data.documents
        ]
    ranks = [[_rank(text, seed) for text in unit] for unit in track(units, "holding text out", "documents")]
    candidates = sorted(set(itertools.chain.from_iterable(ranks)) - {_rank("", seed)})
    below = bisect_left(candidates, int(fraction * 2**64).to_bytes(8, "big"))
    count = min(max(below, at_least), at_most, len(candidates) // 4)
    if not count:
        found = f"{len(candidates)} different passages of about {passage_chars} characters, expected 4"
        raise DataError(f"too little text to hold some out for evaluation: {found}; give more text")
    chosen = set(candidates[:count])
    train: list[Document] = []
    held: dict[bytes, Document] = {}
    for document, unit, ranked in zip(data.documents, units, ranks, strict=True):
        if document.turns:
            if ranked[0] in chosen:
                held.setdefault(ranked[0], document)
            else:
                train.append(document)
            continue
        for out, stretch in itertools.groupby(zip(unit, ranked, strict=True), lambda pair: pair[1] in chosen):
            if not out:
                train.append(Document("".join(text for text, _ in stretch), document.source))
                continue
            for text, rank in stretch:
                start = itertools.islice(cut_text(text, passage_chars), HELD_OUT_PASSAGES)
                held.setdefault(rank, Document("".join(start), document.source))
    # Truncating or joining could have made a training text equal to a held-out one after all.
    texts = {document.text.strip() for document in held.values()} | {""}
    return [document for document in train if document.text.strip() not in texts], list(held.values())


def _rank(text: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{text.strip()}".encode()).digest()
