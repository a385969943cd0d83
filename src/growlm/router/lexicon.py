"""The lexicon: how often each token stands in a domain's text, beside what the base makes of a prompt.

Two domains may read alike and differ in their words, and of a short question the words say more than its form. Only
modules that carry their text (`recall`) have words to count here: of all others a store keeps none. Naive Bayes against
general text, whose tokens depend on each other so much that a prompt counts as a few of them, whatever its length.

Knows token ids, and the stored modules' texts; nothing of states.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from growlm.base.sizes import tensor_bytes
from growlm.disk.files import size_of
from growlm.disk.tensors import map_tensors
from growlm.errors import GrowlmError, IntegrityError
from growlm.progress import track
from growlm.router.derived import read_derived
from growlm.router.evidence import read_general
from growlm.router.samples import GENERAL_SAMPLES, unpack_samples
from growlm.store import ROUTER_LEXICON

if TYPE_CHECKING:
    from growlm.store import Store, StoredModule

# c modules, p entries (a token in a module's text), v tokens of the vocabulary

MOST = 4096  # modules; a lexicon of more would take more memory than all else

_COUNTED = 1 << 16  # tokens of a text, from all of it,
_BLOCK = 256  # so many in a row
_ENTRIES = 4096  # tokens of a module, those that say most
_COUNTS_AS = 10  # tokens that a prompt counts as, at the most
_UNSEEN = 0.1  # share of a domain's tokens that its counts say nothing of, at the least
_SHOWN = 0.7  # weight of general text in what any text has; the rest is the same for every token
_HASHED = 1 << 26  # bytes of a file of which the hash is compared before it is counted
_VERSION = 3  # raise it with every change of what is computed: a lexicon that was kept before is made anew
_KINDS = {
    "starts": (torch.int64, 1),
    "owners": (torch.int16, 1),
    "values": (torch.float32, 1),
    "absent": (torch.float32, 1),
    "silent": (torch.int64, 1),
    "members": (torch.uint8, 1),
}


class Lexicon:
    """What tokens say for each of c modules.

    Attributes:
        tensors: `starts` (v + 1,): where each token's entries begin; `owners` and `values` (p,): of which module each
            entry is, and log-likelihood ratios to general text, in nats; `absent` (c,): that of all other tokens;
            `silent` (s,): tokens that say nothing, as those of frames.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self._starts, self._owners = tensors["starts"].numpy(), tensors["owners"].numpy()
        self._values, self._absent = tensors["values"].numpy(), tensors["absent"].numpy()
        self._silent = tensors["silent"].numpy()

    @classmethod
    def of(cls, counts: Iterable[np.ndarray | None], general: np.ndarray, silent: Sequence[int] = ()) -> Lexicon | None:
        """
        Args:
            counts: of each module, how often each token (v,) stands in its text, one at a time; None of one that has
                none, for which no token speaks, nor against it.
            general: the same of general text, some at least.
            silent: tokens that say nothing of what a text is about.

        Returns:
            None where no module has text.
        """
        vocab = len(general)
        speaks = np.ones(vocab, dtype=bool)
        speaks[[token for token in silent if 0 <= token < vocab]] = False
        general = general * speaks
        any_text = _SHOWN * general / general.sum() + (1 - _SHOWN) / vocab
        tokens, owners, values, absent = [], [], [], []
        for owner, count in enumerate(counts):
            if count is None or not (count := count * speaks).any():
                absent.append(0.0)
                continue
            there = np.flatnonzero(count)
            seen = count[there] / count.sum()
            unseen = min(max(_UNSEEN, (count == 1).sum() / count.sum()), 0.9)  # as Good and Turing have it
            ratio = np.log((1 - unseen) * seen / any_text[there] + unseen)
            absent.append(math.log(unseen))
            said = np.sort(np.argsort(-seen * (ratio - absent[-1]), kind="stable")[:_ENTRIES])
            tokens.append(there[said])
            owners.append(np.full(len(said), owner, dtype=np.int16))
            values.append(ratio[said].astype(np.float32))
        if not tokens:
            return None
        token = np.concatenate(tokens)
        order = np.argsort(token, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(token, minlength=vocab))])
        return cls(
            {
                "starts": torch.from_numpy(starts.astype(np.int64)),
                "owners": torch.from_numpy(np.concatenate(owners)[order]),
                "values": torch.from_numpy(np.concatenate(values)[order]),
                "absent": torch.tensor(absent, dtype=torch.float32),
                "silent": torch.tensor([*silent] or [-1], dtype=torch.int64),  # a file holds no empty tensor
            }
        )

    def evidence(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """What the words of texts, as token ids, say for each module, in nats, (b, c) float32."""
        return torch.from_numpy(np.stack([self._of(text) for text in texts]).astype(np.float32))

    def _of(self, text: Sequence[int]) -> np.ndarray:
        ids = np.asarray(text, dtype=np.int64)
        ids = ids[~np.isin(ids, self._silent) & (ids < len(self._starts) - 1)]
        if not len(ids):
            return np.zeros(len(self._absent))
        tokens, times = np.unique(ids, return_counts=True)
        begins, sizes = self._starts[tokens], self._starts[tokens + 1] - self._starts[tokens]
        places = np.repeat(begins - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        owners = self._owners[places]
        above = np.repeat(times, sizes) * (self._values[places] - self._absent[owners])
        said = np.bincount(owners, above, minlength=len(self._absent))
        return min(_COUNTS_AS, len(ids)) * (said / len(ids) + self._absent)

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
                "silent": self.tensors["silent"],
            }
        )

    def num_bytes(self) -> int:
        return tensor_bytes(self.tensors.values())


def load_lexicon(
    store: Store, modules: Sequence[StoredModule], mark: int | None, current: Callable[[], int]
) -> Lexicon | None:
    """The lexicon of some of the store's modules, in their order; None where none of them carries its text, where they
    are too many, or where no general text is kept to compare with.

    Args:
        mark: tells one state of the store from another; None: nothing is kept.
        current: that of the store now, asked while nobody changes it.
    """
    files = store.router_files(ROUTER_LEXICON)
    samples = _digest(store)
    made = None
    if len(modules) <= MOST and samples is not None:
        told = f"lexicon {_VERSION}, {mark}, {samples}"
        members = torch.tensor(list(hashlib.sha256(told.encode()).digest()), dtype=torch.uint8)
        kept = None if mark is None else read_derived(store, ROUTER_LEXICON, _KINDS)
        if kept is not None and torch.equal(kept.pop("members"), members) and len(kept["absent"]) == len(modules):
            return Lexicon(kept)
        made, whole = _made(store, modules)
        if made is not None and mark is not None and whole:
            with suppress(OSError, GrowlmError), store.lock():  # a store on a read-only disk still routes
                files.drop()  # no words stay of a text that is gone
                if current() == mark:
                    files.write(made.tensors | {"members": members})
    if made is None and mark is not None:
        drop_lexicon(store)
    return made


def drop_lexicon(store: Store) -> None:
    """Forgets the lexicon that is kept, where there is one: none of the modules has words."""
    with suppress(OSError, GrowlmError):
        if store.router_files(ROUTER_LEXICON).versions():
            with store.lock():
                store.router_files(ROUTER_LEXICON).drop()


def _digest(store: Store) -> str | None:
    try:
        return store.router_files(GENERAL_SAMPLES).digest()
    except IntegrityError:
        return None


def _made(store: Store, modules: Sequence[StoredModule]) -> tuple[Lexicon | None, bool]:
    """The lexicon, and whether no module was left out because its text is damaged, which is said when it is loaded."""
    damaged: list[str] = []

    def read(module: StoredModule) -> np.ndarray | None:
        try:
            return _counts(module)
        except (OSError, IntegrityError):
            damaged.append(module.name)
            return None

    first, known = next(((m, count) for m in modules if (count := read(m)) is not None), (None, None))
    general = None if known is None else _general(store, len(known))
    if known is None or general is None:
        return None, not damaged

    def counts() -> Iterator[np.ndarray | None]:
        for module in track(modules, "counting words", "modules"):
            found = known if module is first else read(module)
            yield None if found is None or len(found) != len(known) else found

    return Lexicon.of(counts(), *general), not damaged


def _counts(module: StoredModule) -> np.ndarray | None:
    """How often each token stands in a module's text, (v,); of a long text some of it, from everywhere.

    Raises:
        IntegrityError: a file is damaged.
    """
    total: np.ndarray | None = None
    share = len(module.text_files)
    for name, digest in module.text_files.items():
        path = module.folder / name
        tensors = map_tensors(path, lambda _: True, sha256=digest if (size_of(path) or 0) <= _HASHED else None)
        text = tensors.get("text", torch.empty(0)).numpy()
        if text.ndim != 1 or not len(text) or text.dtype not in (np.uint16, np.int32):
            raise IntegrityError(f"{path}: holds no text; restore it or learn it again")
        vocab = int(text[0])  # it stands around every document
        blocks = max(_COUNTED // (share * _BLOCK), 1)
        if len(text) <= blocks * _BLOCK:
            ids = text.astype(np.int64)
        else:
            begins = np.linspace(0, len(text) - _BLOCK, blocks).astype(np.int64)
            ids = np.concatenate([text[at : at + _BLOCK] for at in begins]).astype(np.int64)
        if ids.min() < 0 or ids.max() > vocab or (total is not None and len(total) != vocab):
            raise IntegrityError(f"{path}: is no text of this base's tokens; restore it or learn it again")
        found = np.bincount(ids, minlength=vocab + 1)[:vocab]
        total = found if total is None else total + found
    return None if total is None or not total.any() else total


def _general(store: Store, vocab: int) -> tuple[np.ndarray, list[int]] | None:
    """How often each token stands in general text, (v,), and the tokens that say nothing: those of frames, and one that
    every text begins with. None where there is no general text."""
    try:
        kept = store.router_files(GENERAL_SAMPLES).read()
        texts = [] if kept is None else [text for text in unpack_samples(kept) if text]
        silent = set(read_general(store)["silent"].tolist()) if texts else set()
    except IntegrityError:
        return None
    first = {text[0] for text in texts}
    if len(first) == 1 and len(texts) > 1:
        silent |= first
    ids = np.array([token for text in texts for token in text if token not in silent], dtype=np.int64)
    count = np.bincount(ids[ids < vocab], minlength=vocab)
    return (count, sorted(silent)) if count.any() else None
