"""Contamination: tests that stand in a text which a module has learned, so that an answer is remembered and not found.

Only modules that carry their text (`recall`) can be looked through: of all others a store keeps no words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from growlm.errors import DataError
from growlm.progress import track
from growlm.recall.text import RecalledText
from growlm.store import StoredModule

_RUN = 20  # tokens in a row that are no chance,
_STRIDE = 4  # looked for so many apart: a run of _RUN + _STRIDE - 1 is always found
_WHOLE = 12  # tokens of a shorter text that must stand there as a whole; what is shorter still is a phrase
_CHANCE = 0.01  # share of a task's rows that may stand in any text: phrases, sums, lists of numbers
_AT_A_TIME = 4096  # contexts that are looked for together


def strings(value: Any) -> Iterator[str]:
    """Every text in a row of a task, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from strings(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from strings(part)


def standing(text: RecalledText, items: Sequence[Sequence[Sequence[int]]]) -> list[int]:
    """The numbers of the items of which a text, in token ids, stands in another: 20 tokens of it in a row, or all of a
    shorter one of at least 14. Their first and last token may differ, which depend on what is around them."""
    contexts: list[np.ndarray] = []
    wanted: list[int] = []
    owners: list[int] = []
    for number, parts in enumerate(items):
        for ids in {tuple(part[1:-1]) for part in parts}:
            size = min(len(ids), _RUN)
            if size < _WHOLE:
                continue
            for end in {*range(size, len(ids) + 1, _STRIDE), len(ids)}:
                context = np.full(_RUN, -1, dtype=np.int64)
                context[:size] = ids[end - size : end][::-1]
                contexts.append(context)
                wanted.append(size)
                owners.append(number)
    found: set[int] = set()
    for at in range(0, len(contexts), _AT_A_TIME):
        some = slice(at, at + _AT_A_TIME)
        lengths = text.find(np.stack(contexts[some]), 1).lengths[:, 0]
        found |= set(np.array(owners[some])[lengths >= wanted[some]].tolist())
    return sorted(found)


def require_unlearned(
    task: str, rows: Sequence[Any], modules: Iterable[StoredModule], tokenizer: Any, vocab_size: int
) -> None:
    """
    Args:
        task: its name, for the message.
        rows: of the task, as mappings or texts.
        modules: that may answer.

    Raises:
        DataError: more than one row of a hundred stands in a module's text; says how many, in which, and shows one.
        IntegrityError: a module's text is damaged.
    """
    texts = [list(dict.fromkeys(strings(row))) for row in rows]
    items = [[tokenizer.encode(text, add_special_tokens=False) for text in some] for some in texts]
    carrying = [module for module in modules if module.text_files]
    for module in track(carrying, f"looking for {task} in what was learned", "modules"):
        text = RecalledText.open(module.folder, module.text_files, vocab_size, verify=False)
        found = standing(text, items)
        if len(found) > _CHANCE * len(rows):
            longest = " ".join(max(texts[found[0]], key=len).split())
            shown = longest if len(longest) <= 60 else f"{longest[:60]}..."
            raise DataError(
                f"{task}: {len(found)} of {len(rows)} rows stand in the text that module {module.name!r} has learned, "
                f"{shown!r} for one: it would remember, not answer; ask another task, or allow it with "
                "allow_contaminated=true"
            )
