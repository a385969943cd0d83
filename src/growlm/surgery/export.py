"""Export: the base with one module as an ordinary transformers checkpoint, which needs no code of ours.

Possible because a module's layers are the family's own: base and `blocks` together are a deeper model of that family.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from growlm.base import Base
from growlm.base.checkpoint import save_model
from growlm.disk.files import checkpoint_folder, refuse_existing
from growlm.errors import ConfigError
from growlm.modules import KnowledgeModule, attach, kind_of
from growlm.modules.vocabulary import InputRows

if TYPE_CHECKING:
    from growlm.store import Store


FORMS = ("checkpoint", "peft")


def export(
    store: Store,
    out: str | Path,
    module: str,
    *,
    version: int | None = None,
    form: str = "checkpoint",
    no_text: bool = False,
) -> Path:
    """Writes a module to the folder `out`, which appears complete or not at all.

    Args:
        form: `checkpoint`: base and module as one transformers checkpoint, tokenizer included; or `peft`: a module of
            kind `lora` alone, as an adapter in PEFT's format. Neither has the text that a module recalls.
        no_text: refuse a module that holds text.

    Raises:
        StoreError: `out` exists and is not empty, or the disk is full.
        UnknownModuleError: no such module.
        ConfigError: a kind that cannot be exported, or with `no_text` a module that holds text.
    """
    out = Path(out).expanduser()
    refuse_existing(out)
    stored = store.module(module, version)
    if no_text and stored.holds_text:
        raise ConfigError(f"{module}: holds text of its domain; leave out --no-text, or learn it without +recall")
    kind = stored.manifest.kind
    if form == "peft":
        return _as_adapter(store, out, module, kind, version)
    if form not in FORMS:
        raise ConfigError(f"form is {form!r}; it is one of {', '.join(FORMS)}")
    if not kind_of(kind).exports:
        raise ConfigError(
            f"{module}: a module of kind {kind} and its base together are no model of the base's family; serve it with "
            "growlm, or learn the text as blocks"
        )
    base = store.load_base()
    loaded = store.load(module, base, version=version)
    loaded.memory = None
    model = merge(base, loaded)
    with checkpoint_folder(out, base.num_bytes() + loaded.num_bytes()) as work:
        save_model(model, work)
        store.load_tokenizer().save_pretrained(work)
    return out


def _as_adapter(store: Store, out: Path, module: str, kind: str, version: int | None) -> Path:
    from growlm.modules.lora import Lora
    from growlm.surgery.peft import write_adapter

    if kind != Lora.kind:
        raise ConfigError(f"{module}: of kind {kind}; only modules of kind lora are adapters in PEFT's format")
    base = store.load_base()
    loaded = store.load(module, base, version=version)
    assert isinstance(loaded, Lora)
    with checkpoint_folder(out, loaded.num_bytes()) as work:
        write_adapter(loaded, base, work, called=Path(store.manifest.base).name)
    return out


@torch.no_grad()
def merge(base: Base, module: KnowledgeModule) -> Any:
    """The base's transformers model, changed in place: its layers, config, head and embedding include the module.

    Vocabulary rows are added to the weights that they differ from; embedding and head are untied where only one of
    them has rows, or where both have their own.
    """
    model, anatomy = base.model, base.anatomy
    if not module.fold(base):
        attach(model, module)
    if module.rows.head is not None or module.rows.input is not None:
        if module.rows.head is not None:
            head = nn.Linear(base.hidden_size, base.vocab_size, bias=False, device="meta")
            head.weight = nn.Parameter(module.rows.head.merged(base.head_weight), requires_grad=False)
            setattr(model, anatomy.head, head)
        if isinstance(module.rows.input, InputRows):
            merged = module.rows.input.merged(base.embedding.weight)
            base.embedding.weight = nn.Parameter(merged, requires_grad=False)
        setattr(base.decoder, anatomy.embedding, base.embedding)
        model.config.tie_word_embeddings = False
    return model
