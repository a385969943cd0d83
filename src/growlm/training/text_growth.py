"""Text growth: more documents for a module that recalls, and documents taken out of it. Nothing is trained.

Its layers, if it has any, and the gates keep their bits. Each is the module's next version.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from growlm import router
from growlm.base import Base
from growlm.base.placement import find_device
from growlm.errors import ConfigError, StoreError
from growlm.modules import KnowledgeModule, ModuleSet
from growlm.modules.probe import probe
from growlm.progress import reporting, say
from growlm.recall.text import RecalledText
from growlm.store import ROUTER_TRAINED, Store, StoredModule
from growlm.training.admission import Comparison, require_better
from growlm.training.config import GrowConfig
from growlm.training.corpus import Files, TrainingCorpus, bytes_to_keep, evidence_beside, joined
from growlm.training.general import ensure_general
from growlm.training.grow import alone
from growlm.training.loop import require_finite
from growlm.training.recalling import token_documents
from growlm.training.router import require_samples, router_after


@dataclass(frozen=True)
class TextResult:
    """What became of a module's text. Losses, in nats a token on held-out text of what was added, are None where
    documents were taken out."""

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
        tokens = body.tokenized(tokenizer, config)
        say(tokens.told)
        base, former = _load(store, stored, device)
        tokens.require_rows(base, body.where, tokenizer)
        if not router.has_general(store):
            ensure_general(store, base, tokenizer)
        _, module = _load(store, stored, device, base)
        old = _text(former)
        new = list(token_documents(tokens.documents, tokenizer))
        assert module.memory is not None
        module.memory.text = old.with_more(new, base.vocab_size)
        found = tokens.compare(ModuleSet(base, [former]), ModuleSet(base, [module]), config)
        require_finite(f"{name}: the held-out loss with the new text", found.after)
        if not config.admit_anyway:
            require_better(name, found, f"version {stored.version} on the new text")
        files, _ = joined(evidence_beside(stored), tokens.evidence(base, config, keep, store.manifest.routing_layer))
        step = {**body.record(), "tokens": sum(len(ids) for _, ids in new), "comparison": found.to_json()}
        result = _commit(store, stored, base, module, old, {"added": step}, files, found)
        router_after(store, restart=False, base=base)
        return result


def withdraw(store: Store, name: str, sources: Sequence[str], *, device: str | torch.device = "auto") -> TextResult:
    """Takes documents out of the text that a module recalls: of the next version no token of them is left. Versions
    before keep theirs until they are removed, and layers that were trained with them keep what they learned.

    Args:
        sources: of the documents, as `growlm generate --sources` names them, or a file's for all of its documents; `*`
            and `?` stand for any characters.

    Raises:
        UnknownModuleError: no such module.
        ConfigError: it recalls no text, none of its documents is of such a source, or all of them are.
        StoreError: the module is being changed by another process or was changed meanwhile, or the disk is full.
    """
    found = find_device(device)
    _recalling(store, name)
    with alone(store, name):
        stored = _recalling(store, name)
        base, module = _load(store, stored, found)
        old = _text(module)
        hit = dict.fromkeys(sources, 0)

        def leaves(source: str) -> bool:
            named = [pattern for pattern in sources if _is_of(source, pattern)]
            for pattern in named:
                hit[pattern] += 1
            return bool(named)

        text = old.without(leaves, base.vocab_size)
        for pattern, count in hit.items():
            if not count:
                known = next(iter(old.sources()), "none")
                raise ConfigError(f"{name}: no document is of {pattern!r}; they are named like {known!r}")
        if not text.num_documents:
            raise ConfigError(f"{name}: that is all of its text; growlm remove takes the module away")
        assert module.memory is not None
        module.memory.text = text
        return _commit(store, stored, base, module, old, {"withdrawn": list(sources)}, evidence_beside(stored))


def _is_of(source: str, pattern: str) -> bool:
    """Whether a document's source is a pattern's, or a record of a file that is."""
    file, colon, record = source.rpartition(":")
    names = [source, *([file] if colon and record.isdigit() else [])]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _commit(
    store: Store,
    stored: StoredModule,
    base: Base,
    module: KnowledgeModule,
    old: RecalledText,
    step: dict[str, Any],
    files: Files,
    found: Comparison | None = None,
) -> TextResult:
    text = _text(module)
    before = stored.manifest.training
    training = {
        **before,
        "recall": {**before.get("recall", {}), "tokens": text.num_tokens, "documents": text.num_documents},
        "text_growth": [*before.get("text_growth", []), step],
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


def _load(
    store: Store, stored: StoredModule, device: torch.device, base: Base | None = None
) -> tuple[Base, KnowledgeModule]:
    base = store.load_base(device=device) if base is None else base
    return base, store.load(stored.name, base, version=stored.version)


def _text(module: KnowledgeModule) -> RecalledText:
    if module.memory is None or module.memory.text is None:
        raise StoreError("the module was changed meanwhile; run the command again")
    return module.memory.text
