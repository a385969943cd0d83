"""Text growth: more documents for a module that recalls, and documents taken out of it. Nothing is trained.

Its layers, if it has any, and the gates keep their bits. Each is the module's next version.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from growlm import router
from growlm.base import Base
from growlm.base.placement import find_device
from growlm.data import Document
from growlm.errors import ConfigError, DataError, NotBetterError
from growlm.modules import KnowledgeModule, ModuleSet
from growlm.modules.probe import probe
from growlm.progress import reporting, say
from growlm.recall.text import RecalledText
from growlm.router import SAMPLES
from growlm.store import ROUTER_TRAINED, Store, StoredModule
from growlm.training.admission import Comparison
from growlm.training.config import GrowConfig
from growlm.training.corpus import Files, Tokens, TrainingCorpus, bytes_to_keep, evidence_beside, joined
from growlm.training.general import ensure_general
from growlm.training.grow import alone
from growlm.training.loop import require_finite
from growlm.training.recalling import known, token_documents, without_memory
from growlm.training.router import require_samples, router_after

_PASSAGE = 256  # tokens of a sample for the router
_FEW = 64  # documents of a text that may be too short to be compared


@dataclass(frozen=True)
class TextResult:
    """What became of a module's text. Losses, in nats a token on held-out text of what was added, are None where
    documents were taken out, or too little was added for any of it to be held out."""

    name: str
    version: int
    tokens_before: int
    tokens: int
    documents_before: int
    documents: int
    loss_before: float | None = None
    loss_after: float | None = None
    gain: float | None = None
    error: float | None = None
    still_in: tuple[int, ...] = ()  # older versions that hold what was taken out

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def add_text(
    store: Store,
    name: str,
    data: Sequence[str | Path],
    config: GrowConfig | None = None,
    *,
    progress: bool | None = None,
) -> TextResult:
    """Appends documents to the text that a module recalls.

    Args:
        data: files, folders or `hub:owner/name`.

    Raises:
        UnknownModuleError: no such module.
        ConfigError: it recalls no text, or there is no such device.
        DataError: data that is missing, malformed or too little.
        NotBetterError: on held-out text of what is new the module does no better with it; nothing is saved.
        StoreError: the module is being changed by another process or was changed meanwhile, or the disk is full.
    """
    config, device = config or GrowConfig(), find_device((config or GrowConfig()).device)
    _recalling(store, name)
    with reporting(name, progress), alone(store, name):
        stored = _recalling(store, name)
        router.require_same_states(store, stored)
        keep = bytes_to_keep(store, name, config)
        if store.manifest.router == ROUTER_TRAINED:
            require_samples(store, list(store.modules.values()))
        body = TrainingCorpus.read(data, config)
        store.check_base()
        tokenizer = store.load_tokenizer()
        base, former = _load(store, stored, device)
        old, module = _text(former), _beside(former)
        files, found = evidence_beside(stored), None
        if (tokens := _enough(body, tokenizer, config)) is not None:
            say(tokens.told)
            tokens.require_rows(base, body.where, tokenizer)
            if not router.has_general(store):
                ensure_general(store, base, tokenizer)
            _give(module, _more(base, old, tokens.documents, tokenizer))
            found = tokens.compare(ModuleSet(base, [former]), ModuleSet(base, [module]), config)
            require_finite(f"{name}: the held-out loss with the new text", found.after)
            if not config.admit_anyway:
                _require_better(name, found, stored.version)
            files, _ = joined(files, tokens.evidence(base, config, keep, store.manifest.routing_layer))
        _give(module, _more(base, old, body.text.documents, tokenizer))  # what was held out too
        added = _text(module).num_tokens - old.num_tokens
        step = {**body.record(), "tokens": added, "comparison": None if found is None else found.to_json()}
        before = stored.manifest.training
        training = {**before, "text_growth": [*before.get("text_growth", []), {"added": step}]}
        result = _commit(store, stored, base, module, old, training, files, found)
        router_after(store, restart=False, base=base)
        return result


def withdraw(store: Store, name: str, sources: Sequence[str], *, device: str | torch.device = "auto") -> TextResult:
    """Takes documents out of the text that a module recalls: no token of theirs is in its next version, and no name of
    a file of which nothing is left. A module that has layers may lose all of its text.

    Versions before keep theirs until they are removed; layers that were trained with it keep what they learned, and the
    router the numbers that it has of the domain.

    Args:
        sources: of the documents, as `growlm generate --sources` names them, or a file's for all of its documents;
            where none is called so, `*` and `?` stand for any characters.

    Raises:
        UnknownModuleError: no such module.
        ConfigError: it recalls no text, none of its documents is of such a source, or nothing of it is left.
        StoreError: the module is being changed by another process or was changed meanwhile, or the disk is full.
    """
    found = find_device(device)
    _recalling(store, name)
    with alone(store, name):
        stored = _recalling(store, name)
        base, module = _load(store, stored, found)
        old = _text(module)
        gone = _named(name, old, sources)
        text = old.without(gone.__contains__, base.vocab_size)
        if not text.num_documents and not module.trains:
            raise ConfigError(f"{name}: that is all of its text; growlm remove takes the module away")
        files = evidence_beside(stored)
        if SAMPLES in files:
            files = {**files, SAMPLES: _samples(text, files[SAMPLES])}
        if text.num_documents:
            _give(module, text)
        else:
            module = without_memory(base, module, name)
        before = stored.manifest.training
        step = {"documents": old.num_documents - text.num_documents, "tokens": old.num_tokens - text.num_tokens}
        growth = [_unnamed(change, text) for change in before.get("text_growth", [])]
        training = _unnamed({**before, "text_growth": [*growth, {"withdrawn": step}]}, text)
        result = _commit(store, stored, base, module, old, training, files, None)
        return replace(result, still_in=_still_in(store, result, gone, base.vocab_size))


def _named(name: str, text: RecalledText, wanted: Sequence[str]) -> set[str]:
    """Sources of documents that are called so.

    Raises:
        ConfigError: none is.
    """
    known, gone = set(text.sources()), set()
    for pattern in wanted:
        hits = {source for source in known if pattern in (source, _file_of(source))}
        if not hits and ("*" in pattern or "?" in pattern):
            form = re.compile(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), re.DOTALL)
            hits = {source for source in known if form.fullmatch(source) or form.fullmatch(_file_of(source))}
        if not hits:
            raise ConfigError(f"{name}: no document is of {pattern!r}; they are named like {min(known)!r}")
        gone |= hits
    return gone


def _file_of(source: str) -> str:
    """Of `more.jsonl:17` the file; of others they themselves."""
    file, colon, record = source.rpartition(":")
    return file if colon and record.isdigit() else source


def _samples(text: RecalledText, old: dict[str, Tensor]) -> dict[str, Tensor]:
    """As many bytes of what is left of a text, for a router that is trained on it: which documents the old ones are of
    is not known."""
    passages = [
        ids[at : at + _PASSAGE].tolist()
        for part in text.parts
        for _, ids in part.documents()
        for at in range(0, len(ids), _PASSAGE)
    ]
    order = np.random.default_rng(0).permutation(len(passages))
    return router.pack_samples([passages[i] for i in order], sum(tensor.nbytes for tensor in old.values()))


def _unnamed(record: dict[str, Any], text: RecalledText) -> dict[str, Any]:
    """A record of training or growth without the files of which no document is left."""
    if "added" in record:
        return {**record, "added": _unnamed(record["added"], text)}
    left = {_file_of(source) for source in text.sources()}
    kept = [
        source
        for source in record.get("sources", [])
        if source["path"] in left or any(file.startswith(f"{source['path']}/") for file in left)
    ]
    return {**record, "sources": kept} if "sources" in record else record


def _still_in(store: Store, result: TextResult, gone: set[str], vocab_size: int) -> tuple[int, ...]:
    """Older versions of a module that hold documents of such sources."""
    found = []
    for version in dict(store.versions())[result.name]:
        stored = store.module(result.name, version)
        if version != result.version and stored.text_files:
            text = RecalledText.open(stored.folder, stored.text_files, vocab_size, verify=False)
            if not gone.isdisjoint(text.sources()):
                found.append(version)
    return tuple(found)


def _enough(body: TrainingCorpus, tokenizer: Any, config: GrowConfig) -> Tokens | None:
    """A body in token ids; None if it is too little for any of it to be held out."""
    try:
        return body.tokenized(tokenizer, config)
    except DataError as error:
        if len(body.text.documents) > _FEW:
            raise
        say(f"it is added without being compared: {error}")
        return None


def _more(base: Base, old: RecalledText, documents: Sequence[Document], tokenizer: Any) -> RecalledText:
    new = known(base, token_documents(documents, tokenizer), tokenizer)
    return old.with_more(new, base.vocab_size)


def _require_better(name: str, found: Comparison, version: int) -> None:
    """
    Raises:
        NotBetterError: the gain is not more than its standard error.
    """
    if not found.better:
        raise NotBetterError(
            f"{name}: no better than version {version} on held-out text of what is new, so that nothing was saved: "
            f"{found.told()}; give more text, or save it all the same with --admit-anyway"
        )


def _beside(module: KnowledgeModule) -> KnowledgeModule:
    """The same module, sharing all that it has, that can be given another text."""
    other = copy.copy(module)
    other._modules = {**module._modules, "memory": copy.copy(module.memory)}
    return other


def _give(module: KnowledgeModule, text: RecalledText) -> None:
    assert module.memory is not None
    module.memory.text = text


def _commit(
    store: Store,
    stored: StoredModule,
    base: Base,
    module: KnowledgeModule,
    old: RecalledText,
    training: dict[str, Any],
    files: Files,
    found: Comparison | None,
) -> TextResult:
    text = RecalledText([]) if module.memory is None else _text(module)
    training = {
        **training,
        "recall": {**training.get("recall", {}), "tokens": text.num_tokens, "documents": text.num_documents},
        "probe": {"base": probe(ModuleSet(base)), "module": probe(ModuleSet(base, [module]))},
    }
    saved = router.commit_and_route(
        store, stored.name, module, training, files, stored, made_from=stored.version, evidence_of=stored
    )
    counts = (old.num_tokens, text.num_tokens, old.num_documents, text.num_documents)
    if found is None:
        return TextResult(saved.name, saved.version, *counts)
    return TextResult(saved.name, saved.version, *counts, found.before, found.after, found.gain, found.error)


def _recalling(store: Store, name: str) -> StoredModule:
    """
    Raises:
        UnknownModuleError: no such module.
        ConfigError: it recalls no text.
    """
    stored = store.module(name)
    if not stored.text_files:
        raise ConfigError(f"{stored.folder}: is of kind {stored.kind} and recalls no text; learn it with --kind recall")
    return stored


def _load(store: Store, stored: StoredModule, device: torch.device) -> tuple[Base, KnowledgeModule]:
    base = store.load_base(device=device)
    return base, store.load(stored.name, base, version=stored.version)


def _text(module: KnowledgeModule) -> RecalledText:
    assert module.memory is not None
    assert module.memory.text is not None
    return module.memory.text
