"""General text: what the router is shown as *none of the modules*, once a store.

Comes from the user, from beside the base, or from the base itself. Kept as vectors, and as token ids in every store: a
router that is trained later, on text that is kept from then on, must be shown the same text as none of the modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from growlm import data as text_data
from growlm import router
from growlm.base import Base
from growlm.base.cache import KVCache
from growlm.errors import DataError
from growlm.progress import say, track
from growlm.router.samples import GENERAL_SAMPLES, pack_samples, unpack_samples
from growlm.store import Store

HELDOUT_FILE = "heldout.jsonl"  # what pretrain leaves beside a base
_SAMPLES = 512
_LENGTH = 256  # tokens of a sample; whatever is learned first, none of the modules is the same class to the router
_KEPT = _SAMPLES * (_LENGTH + 1) * 4  # bytes in which all of it has room


def ensure_general(store: Store, base: Base, tokenizer: Any) -> None:
    """Shows the router general text: what lies beside the base, or else what the base itself writes."""
    _show(store, base, *_texts(store, base, tokenizer))


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
    router.write_general(store, base, train, heldout)


def _texts(store: Store, base: Base, tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    beside = store.base_folder / HELDOUT_FILE
    if beside.is_file():
        return _from_files(base, tokenizer, [beside])
    say("no general text was given; for the router the base writes some (see growlm new --general)")
    texts = _written_by_base(base, tokenizer)
    return texts[::2], texts[1::2]


def _from_files(base: Base, tokenizer: Any, paths: Sequence[str | Path]) -> tuple[list[list[int]], list[list[int]]]:
    """Passages to train on, and held-out ones."""
    documents = text_data.read(paths).documents
    length = min(_LENGTH, base.max_positions or _LENGTH)
    found = [p.tokens for p in text_data.passages(documents, tokenizer, length)]
    if found:
        base.require_rows([t for tokens in found for t in tokens], ", ".join(map(str, paths)), tokenizer)
    if len(found) < 4:
        raise DataError(f"{', '.join(map(str, paths))}: too little text to learn what general text is; give more")
    order = np.random.default_rng(0).permutation(len(found))[:_SAMPLES]
    chosen = [found[i] for i in order]
    heldout = max(len(chosen) // 4, 1)
    return chosen[heldout:], chosen[:heldout]


@torch.no_grad()
def _written_by_base(base: Base, tokenizer: Any, *, texts: int = 96, tokens: int = 64) -> list[list[int]]:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise DataError(f"{base.where}: its tokenizer has no end-of-text token; give general text with --general")
    base.require_rows([start], f"{base.where}: a text of its own", tokenizer)
    generator = torch.Generator(base.device).manual_seed(0)
    tokens = min(tokens, base.max_positions or tokens)
    ids = new = torch.full((texts, 1), start, device=base.device)
    cache = KVCache(base.num_layers)
    for past in track(range(tokens), "writing general text", "tokens of every text"):
        hidden, shared = base.begin(new, past=past, cache=cache)
        hidden = base.run(base.embed_positions(hidden, shared.positions), base.layers_to_run(), shared)
        logits = base.cap(base.head(base.norm(hidden)))[:, -1].float()
        new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, new], dim=-1)
    begin = text_data.start_tokens(tokenizer)
    return [[*begin, *row][:tokens] for row in ids[:, 1:].tolist()]
