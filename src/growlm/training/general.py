"""General text: what the router is shown as *none of the modules*, once a store.

Comes from the user, from beside the base, or is a sample that is shipped with growlm (`general.txt`). Kept as vectors,
and as token ids in every store: a router that is trained later, on text that is kept from then on, must be shown the
same text as none of the modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from growlm import data as text_data
from growlm import router
from growlm.base import Base
from growlm.errors import DataError
from growlm.router.samples import GENERAL_SAMPLES, pack_samples, unpack_samples
from growlm.store import Store
from growlm.training.corpus import prompts_of

HELDOUT_FILE = "heldout.jsonl"  # what pretrain leaves beside a base
_SAMPLE = Path(__file__).with_name("general.txt")  # everyday text in seven languages, written for growlm
_SAMPLES = 512
_LENGTH = 256  # tokens of a sample; whatever is learned first, none of the modules is the same class to the router
_SHOWN = 96  # of those that are trained on, to a router that is not trained
_KEPT = _SAMPLES * (_LENGTH + 1) * 4  # bytes in which all of it has room


def ensure_general(store: Store, base: Base, tokenizer: Any) -> None:
    """Shows the router general text: what lies beside the base, or else the sample."""
    _show(store, base, *_texts(store, base, tokenizer))


def general_shown(store: Store, base: Base, tokenizer: Any) -> list[list[int]]:
    """The passages of which `ensure_general` keeps vectors."""
    train, heldout = _texts(store, base, tokenizer)
    return [*train[:_SHOWN], *heldout[: _SHOWN // 3]]


def describe_general(store: Store, base: Base, tokenizer: Any, paths: Sequence[str | Path]) -> None:
    """Shows the router general text from files: what is none of the modules' business.

    Args:
        base: in the store's own dtype, as it is served.

    Raises:
        DataError: the files are missing, malformed or empty.
    """
    _show(store, base, *_from_files(base, tokenizer, paths))


def general_samples(store: Store, base: Base, tokenizer: Any) -> list[list[int]]:
    """General text for a router that is trained on it: what was kept, or else what `ensure_general` would show."""
    kept = store.router_files(GENERAL_SAMPLES).read()
    if kept is not None and (passages := unpack_samples(kept, store.router_path / GENERAL_SAMPLES)):
        return passages
    train, heldout = _texts(store, base, tokenizer)
    return [*train, *heldout]


def _show(store: Store, base: Base, train: list[list[int]], heldout: list[list[int]]) -> None:
    # The vectors last: a store that has them is not shown general text again, so that a kill must not leave them alone.
    with store.lock():
        store.router_files(GENERAL_SAMPLES).write(pack_samples([*train, *heldout], _KEPT))
    router.write_general(store, base, train[:_SHOWN], heldout[: _SHOWN // 3])


def _texts(store: Store, base: Base, tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    beside = store.base_folder / HELDOUT_FILE
    if beside.is_file():
        return _from_files(base, tokenizer, [beside])
    documents = text_data.read([_SAMPLE], separator="\n\n").documents
    found = [p.tokens for p in text_data.passages(documents, tokenizer, _length(base))]
    # Of a tokenizer that knows more tokens than the base has rows for.
    found = [tokens for tokens in found if max(tokens) < base.vocab_size]
    return _parted(found, f"{base.where}: the sample of general text")


def _length(base: Base) -> int:
    return min(_LENGTH, base.max_positions or _LENGTH)


def _from_files(base: Base, tokenizer: Any, paths: Sequence[str | Path]) -> tuple[list[list[int]], list[list[int]]]:
    found = prompts_of(text_data.read(paths, format="auto").documents, tokenizer, _length(base))
    if found:
        base.require_rows([t for tokens in found for t in tokens], ", ".join(map(str, paths)), tokenizer)
    return _parted(found, ", ".join(map(str, paths)))


def _parted(found: Sequence[list[int]], where: str) -> tuple[list[list[int]], list[list[int]]]:
    """Passages to train on, and held-out ones.

    Raises:
        DataError: too few.
    """
    if len(found) < 4:
        raise DataError(f"{where}: too little text to learn what general text is; give more (growlm new --general)")
    order = np.random.default_rng(0).permutation(len(found))[:_SAMPLES]
    chosen = [found[i] for i in order]
    heldout = max(len(chosen) // 4, 1)
    return chosen[heldout:], chosen[:heldout]
