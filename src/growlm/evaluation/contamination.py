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
_RUN = 20  # tokens that are looked for together, which may be a few words or a sentence,
_STRIDE = 2  # so many apart
_CHARACTERS = 80  # that stand there one after another are no chance: a dozen words;
_SHORT = 50  # or a whole text of so many
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
    """Pieces of texts that are looked for, those of a text side by side in its order.

    Attributes:
        contexts: (n, run) token ids, the newest first, -1 where a piece is shorter.
        sizes: (n,) tokens of each.
        ends: (n,) how many of the text's tokens come before its end.
        owners: (n,) the number of the text that each is of.
        widths: by text, characters of a token.
        whole: by text, how many tokens are looked for in all.
    """

    contexts: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray
    owners: np.ndarray
    widths: dict[int, float]
    whole: dict[int, int]

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], characters: Sequence[int]) -> Windows:
        """Of texts in token ids, which have so many characters; without their first and last token, which depend on
        what is around them."""
        contexts, sizes, ends, owners = [np.empty((0, _RUN), dtype=np.int64)], [], [], []
        widths, whole = {}, {}
        for number, (text, count) in enumerate(zip(texts, characters, strict=True)):
            ids = np.asarray(text[1:-1], dtype=np.int64)
            if count < _SHORT or not len(ids):
                continue
            size = min(len(ids), _RUN)
            last = sorted({*range(size, len(ids) + 1, _STRIDE), len(ids)})
            rows = np.full((len(last), _RUN), -1, dtype=np.int64)
            rows[:, :size] = ids[np.array(last)[:, None] - 1 - np.arange(size)]
            contexts.append(rows)
            sizes += [size] * len(last)
            ends += last
            owners += [number] * len(last)
            widths[number], whole[number] = count / len(text), len(ids)
        found = [np.array(values, dtype=np.int64) for values in (sizes, ends, owners)]
        return cls(np.concatenate(contexts), found[0], found[1], found[2], widths, whole)

    def standing(self, text: RecalledText) -> list[int]:
        """The numbers of the texts that stand in another, as a whole or so many characters of them in a row, but for
        that one's very end."""
        hits = np.zeros(len(self.contexts), dtype=bool)
        for at in range(0, len(hits), _AT_A_TIME):
            some = slice(at, at + _AT_A_TIME)
            hits[some] = text.find(self.contexts[some], 1).lengths[:, 0] >= self.sizes[some]
        found: set[int] = set()
        first = -1  # of the windows in a row that were found
        for at in np.flatnonzero(hits).tolist():
            if first < 0 or not hits[at - 1] or self.owners[at - 1] != self.owners[at]:
                first = at
            owner = int(self.owners[at])
            tokens = int(self.ends[at] - self.ends[first] + self.sizes[first])
            if tokens == self.whole[owner] or tokens * self.widths[owner] >= _CHARACTERS:
                found.add(owner)
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
    said = [text for _, text in texts]
    windows = Windows.of(text_data.encode_texts(tokenizer, said), list(map(len, said)))
    standing: dict[int, tuple[str, str]] = {}  # by row: the module, and the text
    for module in track(list(modules), f"looking for {task} in what was learned", "modules"):
        try:
            if not (files := module.text_files):
                continue
            learned = RecalledText.open(module.folder, files, vocab_size, verify=False)
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
