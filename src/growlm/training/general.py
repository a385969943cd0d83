"""General text: what the router is shown as *none of the modules*, once a store.

Comes from beside the base, or from the user and a sample that is shipped with growlm (`general/`). It has forms, since
no one kind of text stands for all that is no module's: talk, questions, requests, exams, stories, articles, news, one
a file; and of every text questions made of its words, as the router is shown them of modules' texts. Short ones are
shown in frames besides ("Question: ... Answer:"): what a frame changes says nothing of what a text is about.

Kept as vectors, and as token ids in every store: a router that is trained later, on text that is kept from then on,
must be shown the same text as none of the modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from growlm import data as text_data
from growlm import router
from growlm.base import Base
from growlm.errors import DataError
from growlm.router import Framed
from growlm.router.samples import GENERAL_SAMPLES, pack_samples, unpack_samples
from growlm.store import Store
from growlm.training.corpus import prompts_of, questions_about

HELDOUT_FILE = "heldout.jsonl"  # what pretrain leaves beside a base
_SHIPPED = Path(__file__).with_name("general")  # in seven languages, written for growlm; a form a file
_SAMPLES, _FEWEST = 512, 4  # of a form, at most and at least
_LENGTH = 256  # tokens of a sample; whatever is learned first, none of the modules is the same class to the router
_SHOWN = 96  # of those that are trained on, to a router that is not trained
# What people, and the tasks of benchmarks, put around what they ask, whatever it is about.
FRAMES = (
    "Question: {}\nAnswer:",
    "Q: {}\nA:",
    "{}\nAnswer:",
    "### Instruction:\n{}\n\n### Response:\n",
)
_FRAMED, _SHORT = 48, 160  # texts that are shown in them, of so many characters at the most
_ASKED, _ABOUT = 128, "asked"  # questions made of the words of a text, and the end of their form's name

Form = tuple[list[list[int]], list[list[int]]]  # passages to train on, and held-out ones


def ensure_general(store: Store, base: Base, tokenizer: Any) -> None:
    """Shows the router general text: what lies beside the base, or else the sample."""
    _show(store, base, tokenizer, _forms(store, base, tokenizer))


def general_shown(store: Store, base: Base, tokenizer: Any) -> list[list[int]]:
    """The passages of which `ensure_general` keeps vectors."""
    forms = _forms(store, base, tokenizer).values()
    return [p for train, heldout in forms for p in (*train[:_SHOWN], *heldout[: _SHOWN // 3])]


def describe_general(store: Store, base: Base, tokenizer: Any, paths: Sequence[str | Path]) -> None:
    """Shows the router general text from files, what is none of the modules' business, and the sample besides.

    Args:
        base: in the store's own dtype, as it is served.

    Raises:
        DataError: the files are missing, malformed or empty.
    """
    _show(store, base, tokenizer, _from_files(base, tokenizer, paths) | shipped_forms(base, tokenizer))


def general_samples(store: Store, base: Base, tokenizer: Any) -> list[list[int]]:
    """General text for a router that is trained on it: what was kept, or else what `ensure_general` would show."""
    kept = store.router_files(GENERAL_SAMPLES).read()
    if kept is not None and (passages := unpack_samples(kept, store.router_path / GENERAL_SAMPLES)):
        return passages
    return _kept(_forms(store, base, tokenizer))


def _show(store: Store, base: Base, tokenizer: Any, forms: Mapping[str, Form]) -> None:
    framed = framed_texts(base, tokenizer)
    passages = _kept(forms)
    room = sum(4 * (len(p) + 1) for p in passages)  # bytes in which all of it has room
    # The vectors last: a store that has them is not shown general text again, so that a kill must not leave them alone.
    with store.lock():
        store.router_files(GENERAL_SAMPLES).write(pack_samples(passages, room))
    shown = [(train[:_SHOWN], heldout[: _SHOWN // 3]) for train, heldout in forms.values()]
    router.write_general(store, base, shown, framed)


def _kept(forms: Mapping[str, Form]) -> list[list[int]]:
    """All text: of modules, questions made of their words are not kept either."""
    return [p for name, halves in forms.items() if not name.endswith(_ABOUT) for half in halves for p in half]


def _forms(store: Store, base: Base, tokenizer: Any) -> dict[str, Form]:
    beside = store.base_folder / HELDOUT_FILE
    if beside.is_file():
        return _from_files(base, tokenizer, [beside])
    forms = shipped_forms(base, tokenizer)
    if not forms:
        raise DataError(_too_little(f"{base.where}: the sample of general text"))
    return forms


def shipped_forms(base: Base, tokenizer: Any) -> dict[str, Form]:
    """The sample that is shipped with growlm, as this base reads it: its forms by name, without what a tokenizer writes
    in tokens that the base has no rows for."""
    forms: dict[str, Form] = {}
    whole: list[text_data.Document] = []

    def add(name: str, found: Sequence[list[int]]) -> None:
        known = [tokens for tokens in found if tokens and max(tokens) < base.vocab_size]
        if len(known) >= _FEWEST:
            forms[name] = _parted(known)

    for file in sorted(_SHIPPED.glob("*.txt")):
        documents = text_data.read([file], separator="\n\n").documents
        add(file.stem, [p.tokens for p in text_data.passages(documents, tokenizer, _length(base))])
        whole += documents
    add(_ABOUT, questions_about(whole, _ASKED, tokenizer, _length(base), 0))
    return forms


def framed_texts(base: Base, tokenizer: Any) -> list[Framed]:
    """Short texts of the shipped sample, of every form in turn, as they are and in each frame."""
    by_file = [
        [d.text for d in text_data.read([file], separator="\n\n").documents if len(d.text) <= _SHORT]
        for file in sorted(_SHIPPED.glob("*.txt"))
    ]
    texts = [text for some in zip_longest(*by_file) for text in some if text is not None][:_FRAMED]
    begin = text_data.start_tokens(tokenizer)

    def tokens(written: Sequence[str]) -> list[list[int]]:
        return [[*begin, *ids] for ids in text_data.encode_texts(tokenizer, written)]

    found = [Framed(tokens([text])[0], tokens([frame.format(text) for frame in FRAMES])) for text in texts]
    length = _length(base)
    return [
        some for some in found
        if all(0 < len(ids) <= length and max(ids) < base.vocab_size for ids in (some.plain, *some.framed))
    ]  # fmt: skip


def _length(base: Base) -> int:
    return min(_LENGTH, base.max_positions or _LENGTH)


def _from_files(base: Base, tokenizer: Any, paths: Sequence[str | Path]) -> dict[str, Form]:
    documents = text_data.read(paths, format="auto").documents
    found = prompts_of(documents, tokenizer, _length(base))
    if found:
        base.require_rows([t for tokens in found for t in tokens], ", ".join(map(str, paths)), tokenizer)
    if len(found) < _FEWEST:
        raise DataError(_too_little(", ".join(map(str, paths))))
    asked = questions_about(documents, _ASKED, tokenizer, _length(base), 0)
    known = [tokens for tokens in asked if tokens and max(tokens) < base.vocab_size]
    forms = {"given": _parted(found)}
    return forms | ({f"given, {_ABOUT}": _parted(known)} if len(known) >= _FEWEST else {})


def _too_little(where: str) -> str:
    return f"{where}: too little text to learn what general text is; give more (growlm new --general)"


def _parted(found: Sequence[list[int]]) -> Form:
    order = np.random.default_rng(0).permutation(len(found))[:_SAMPLES]
    chosen = [found[i] for i in order]
    heldout = max(len(chosen) // 4, 1)
    return chosen[heldout:], chosen[:heldout]
