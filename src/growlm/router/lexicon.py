"""The lexicon: how often each token stands in a domain's text, beside what the base makes of a prompt.

Two domains may read alike and differ in their words, and of a short question the words say more than its form. Only
modules that carry their text (`recall`) have words to count here: of all others a store keeps none. Naive Bayes against
general text, whose tokens depend on each other so much that a prompt counts as a few of them, whatever its length.

Knows token ids, and the stored modules' texts; nothing of states.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from growlm.base.sizes import tensor_bytes
from growlm.disk.tensors import map_tensors, require_kinds
from growlm.errors import GrowlmError, IntegrityError
from growlm.progress import track
from growlm.router.samples import GENERAL_SAMPLES
from growlm.store import ROUTER_LEXICON

if TYPE_CHECKING:
    from growlm.store import Store, StoredModule

# c modules, p entries (a token in a module's text), v tokens of the vocabulary

_COUNTED = 1 << 16  # tokens of a text, from all of it
_ENTRIES = 4096  # tokens of a module, those that say most
_COUNTS_AS = 10.0  # tokens that a prompt counts as
_UNSEEN = 0.1  # share of a domain's tokens that its counts say nothing of, at the least
_SHOWN = 0.7  # weight of general text in what any text has; the rest is the same for every token
_MOST = 4096  # modules; a lexicon of more would take more memory than all else
_VERSION = 1  # raise it with every change of what is computed: a lexicon that was kept before is made anew
_KINDS = {
    "starts": (torch.int64, 1),
    "owners": (torch.int16, 1),
    "values": (torch.float32, 1),
    "absent": (torch.float32, 1),
    "members": (torch.uint8, 1),
}


class Lexicon:
    """What tokens say for each of c modules.

    Attributes:
        tensors: `starts` (v + 1,): where each token's entries begin; `owners` and `values` (p,): of which module each
            entry is, and log-likelihood ratios to general text, in nats; `absent` (c,): that of all other tokens.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self._starts, self._owners = tensors["starts"].numpy(), tensors["owners"].numpy()
        self._values, self._absent = tensors["values"].numpy(), tensors["absent"].numpy()

    @classmethod
    def of(cls, counts: Sequence[np.ndarray | None], general: np.ndarray) -> Lexicon:
        """
        Args:
            counts: of each module, how often each token (v,) stands in its text; None of one that has none, for which
                no token speaks, nor against it.
            general: the same of general text.
        """
        vocab = len(general)
        any_text = _SHOWN * general / max(general.sum(), 1) + (1 - _SHOWN) / vocab
        tokens, owners, values = [], [], []
        absent = np.zeros(len(counts), dtype=np.float32)
        for owner, count in enumerate(counts):
            if count is None:
                continue
            there = np.flatnonzero(count)
            seen = count[there] / count.sum()
            unseen = min(max(_UNSEEN, (count == 1).sum() / count.sum()), 0.9)  # as Good and Turing have it
            ratio = np.log((1 - unseen) * seen / any_text[there] + unseen)
            absent[owner] = math.log(unseen)
            weight = seen * (ratio - absent[owner])
            said = np.sort(np.argsort(-weight, kind="stable")[:_ENTRIES])
            tokens.append(there[said])
            owners.append(np.full(len(said), owner))
            values.append(ratio[said])
        token = np.concatenate(tokens)
        order = np.argsort(token, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(token, minlength=vocab))])
        return cls(
            {
                "starts": torch.from_numpy(starts.astype(np.int64)),
                "owners": torch.from_numpy(np.concatenate(owners)[order].astype(np.int16)),
                "values": torch.from_numpy(np.concatenate(values)[order].astype(np.float32)),
                "absent": torch.from_numpy(absent),
            }
        )

    def evidence(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """What the words of texts, as token ids, say for each module, in nats, (b, c) float32."""
        return torch.from_numpy(np.stack([self._of(text) for text in texts]).astype(np.float32))

    def _of(self, text: Sequence[int]) -> np.ndarray:
        ids = np.asarray(text, dtype=np.int64)
        tokens, times = np.unique(ids[ids < len(self._starts) - 1], return_counts=True)
        begins, sizes = self._starts[tokens], self._starts[tokens + 1] - self._starts[tokens]
        places = np.repeat(begins - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        owners = self._owners[places]
        above = np.repeat(times, sizes) * (self._values[places] - self._absent[owners])
        said = np.bincount(owners, above, minlength=len(self._absent))
        return _COUNTS_AS * (said / max(len(ids), 1) + self._absent)

    def without(self, left: Sequence[int]) -> Lexicon | None:
        """That of the modules of these numbers, ascending; None where none of them has words."""
        gone = np.ones(len(self._absent), dtype=bool)
        gone[list(left)] = False
        number = np.cumsum(~gone) - 1
        kept = ~gone[self._owners]
        if not kept.any():
            return None
        ends = np.concatenate([[0], np.cumsum(kept)])
        return Lexicon(
            {
                "starts": torch.from_numpy(ends[self._starts]),
                "owners": torch.from_numpy(number[self._owners[kept]].astype(np.int16)),
                "values": self.tensors["values"][torch.from_numpy(kept)],
                "absent": self.tensors["absent"][torch.from_numpy(~gone)],
            }
        )

    def num_bytes(self) -> int:
        return tensor_bytes(self.tensors.values())


def load_lexicon(store: Store, modules: Sequence[StoredModule], mark: int | None) -> Lexicon | None:
    """The lexicon of some of the store's modules, in their order; None where none of them carries its text, or where
    they are too many.

    Args:
        mark: tells one state of the store from another; None: nothing is kept.
    """
    if len(modules) > _MOST:
        return None
    members = torch.tensor(list(hashlib.sha256(f"lexicon {_VERSION}, {mark}".encode()).digest()), dtype=torch.uint8)
    if mark is not None and (kept := _read(store, members)) is not None and len(kept["absent"]) == len(modules):
        return Lexicon(kept)
    counts, whole = [], True
    for module in track(modules, "counting words", "modules"):
        try:
            counts.append(_counts(module))
        except (OSError, GrowlmError):  # that its text is damaged is said when it is loaded
            counts.append(None)
            whole = False
    known = [count for count in counts if count is not None]
    if not known:
        return None
    vocab = max(map(len, known))
    counts = [count if count is None else np.pad(count, (0, vocab - len(count))) for count in counts]
    made = Lexicon.of(counts, _general(store, vocab))
    if mark is not None and whole:
        with suppress(OSError, GrowlmError), store.lock():  # a store on a read-only disk still routes
            files = store.router_files(ROUTER_LEXICON)
            files.drop()  # no words stay of a text that is gone
            files.write(made.tensors | {"members": members})
    return made


def _read(store: Store, members: Tensor) -> dict[str, Tensor] | None:
    try:
        kept = store.router_files(ROUTER_LEXICON).read()
        if kept is None:
            return None
        require_kinds(ROUTER_LEXICON, kept, _KINDS)
    except IntegrityError:
        return None  # derived from the modules' own texts: made anew
    return kept if torch.equal(kept.pop("members"), members) else None


def _counts(module: StoredModule) -> np.ndarray | None:
    """How often each token stands in a module's text, (v,); of a long text some of it, from everywhere."""
    if not module.text_files:
        return None
    texts = [
        map_tensors(module.folder / file, lambda name: name == "text")["text"].numpy() for file in module.text_files
    ]
    vocab = int(texts[0][0])  # around every document
    step = max(sum(map(len, texts)) // _COUNTED, 1)
    total = sum(np.bincount(text[::step].astype(np.int64), minlength=vocab + 1) for text in texts)
    return np.asarray(total)[:vocab]


def _general(store: Store, vocab: int) -> np.ndarray:
    kept: Mapping[str, Tensor] | None = None
    with suppress(IntegrityError):
        kept = store.router_files(GENERAL_SAMPLES).read()
    ids = np.zeros(0, dtype=np.int64) if kept is None else kept["tokens"].numpy().astype(np.int64)
    return np.bincount(ids[ids < vocab], minlength=vocab)
