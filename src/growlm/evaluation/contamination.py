"""Contamination: tests that stand in a text which a module has learned, so that an answer is remembered and not found.

Only modules that carry their text (`recall`) can be looked through: of all others a store keeps no words.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from growlm import data as text_data
from growlm.errors import DataError, StoreError
from growlm.progress import track
from growlm.recall.text import RecalledText
from growlm.store import StoredModule

_log = logging.getLogger(__name__)
_RUN = 20  # tokens in a row that are no chance,
_STRIDE = 2  # looked for so many apart
_WHOLE = 12  # tokens of a shorter text that must stand there as a whole; what is shorter still is a phrase
_CHANCE = 0.01  # share of a task's rows that may stand in any text: phrases, sums, lists of numbers
_AT_A_TIME = 4096  # windows that are looked for together


def strings(value: Any) -> Iterator[str]:
    """Every text in a row of a task, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from strings(part)


@dataclass(frozen=True)
class Windows:
    """Pieces of texts that are looked for, the newest token first.

    Attributes:
        contexts: (n, run) token ids, -1 where a piece is shorter.
        sizes: (n,) tokens of each.
        owners: (n,) the number of the text that each is of.
    """

    contexts: np.ndarray
    sizes: np.ndarray
    owners: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]]) -> Windows:
        """Of texts in token ids, without their first and last token, which depend on what is around them: runs of 20,
        or all of a text that has fewer, and a dozen at the least."""
        contexts, sizes, owners = [], [], []
        for number, text in enumerate(texts):
            ids = np.asarray(text[1:-1], dtype=np.int64)
            size = min(len(ids), _RUN)
            if size < _WHOLE:
                continue
            ends = sorted({*range(size, len(ids) + 1, _STRIDE), len(ids)})
            rows = np.full((len(ends), _RUN), -1, dtype=np.int64)
            rows[:, :size] = ids[np.array(ends)[:, None] - 1 - np.arange(size)]
            contexts.append(rows)
            sizes.append(np.full(len(ends), size))
            owners.append(np.full(len(ends), number))
        if not contexts:
            return cls(np.empty((0, _RUN), dtype=np.int64), np.empty(0), np.empty(0, dtype=np.int64))
        return cls(np.concatenate(contexts), np.concatenate(sizes), np.concatenate(owners))

    def standing(self, text: RecalledText) -> list[int]:
        """The numbers of the texts of which a piece stands in another, but for that one's very end."""
        found: set[int] = set()
        for at in range(0, len(self.contexts), _AT_A_TIME):
            some = slice(at, at + _AT_A_TIME)
            lengths = text.find(self.contexts[some], 1).lengths[:, 0]
            found |= set(self.owners[some][lengths >= self.sizes[some]].tolist())
        return sorted(found)


def require_unlearned(
    task: str, rows: Sequence[Any], modules: Iterable[StoredModule], tokenizer: Any, vocab_size: int
) -> None:
    """
    Args:
        task: its name, for the message.
        rows: of the task, as mappings or texts.
        modules: that may answer; one that is damaged or gone is left out.

    Raises:
        DataError: more than one row of a hundred stands in modules' texts; says how many, in which, and shows one.
    """
    texts = [(number, text) for number, row in enumerate(rows) for text in dict.fromkeys(strings(row))]
    windows = Windows.of(text_data.encode_texts(tokenizer, [text for _, text in texts]))
    standing: dict[int, tuple[str, str]] = {}  # by row: the module, and the text
    carrying = list(modules)
    for module in track(carrying, f"looking for {task} in what was learned", "modules"):
        try:
            learned = RecalledText.open(module.folder, module.text_files, vocab_size, verify=False)
        except (OSError, StoreError):
            continue
        for number in windows.standing(learned):
            row, text = texts[number]
            standing.setdefault(row, (module.name, text))
    if not standing:
        return
    names = sorted({name for name, _ in standing.values()})
    first = " ".join(standing[min(standing)][1].split())
    shown = first if len(first) <= 60 else f"{first[:60]}..."
    told = (
        f"{task}: {len(standing)} of {len(rows)} rows stand in the text that {', '.join(map(repr, names))} "
        f"{'has' if len(names) == 1 else 'have'} learned, {shown!r} for one"
    )
    if len(standing) > _CHANCE * len(rows):
        raise DataError(
            f"{told}: a module would remember, not answer; ask another task, or allow it with allow_contaminated=true"
        )
    _log.warning("%s", told)
