"""Importing: an adapter that was trained elsewhere becomes a module, and the router is shown what it is for.

Shown are texts of its domain, or if there are none, texts that base and adapter write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from growlm import data as text_data
from growlm import router
from growlm.base import Base
from growlm.disk.files import read_json, sha256_file
from growlm.modules import KnowledgeModule, ModuleSet
from growlm.modules.attachment import attached
from growlm.modules.probe import probe
from growlm.progress import reporting, track
from growlm.store import Store
from growlm.surgery.peft import CONFIG, WEIGHTS, read_adapter
from growlm.training.admission import Comparison, require_better
from growlm.training.config import LearnConfig
from growlm.training.corpus import TrainingCorpus
from growlm.training.general import ensure_general
from growlm.training.learn_run import kept_bytes, require_free
from growlm.training.module_training import as_served
from growlm.training.router import router_after

_WRITTEN = 128  # texts that base and adapter write,
_LENGTH = 64  # of so many tokens at most,
_BATCH = 16  # so many at a time


@dataclass(frozen=True)
class ImportResult:
    """What was imported; `comparison` of base and module on held-out text, where text was given."""

    name: str
    version: int
    parameters: int
    bytes: int
    comparison: Comparison | None
    router: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def import_adapter(
    store: Store,
    name: str,
    folder: str | Path,
    data: Sequence[str | Path] = (),
    config: LearnConfig | None = None,
    *,
    update: bool = False,
    progress: bool | None = None,
) -> ImportResult:
    """Adds a LoRA adapter in PEFT's format to the store as a module, and to its router.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        data: text of its domain, as `learn` takes it: the router is shown some of it, and on a held-out part the module
            must do better than the base. Without it the router is shown what base and adapter write.
        config: how the data are read, and what is kept of them.
        update: allow `name` to exist; the module becomes its next version.

    Raises:
        StoreError: `name` is not allowed or is taken.
        DataError: data that is missing, malformed or too little.
        IntegrityError, ConfigError, BaseModelError: as `read_adapter`.
        NotBetterError: the module does no better than the base on held-out text.
    """
    with reporting(name, progress):
        return _import(store, name, Path(folder).expanduser(), data, config or LearnConfig("lora"), update)


def _import(
    store: Store, name: str, folder: Path, data: Sequence[str | Path], config: LearnConfig, update: bool
) -> ImportResult:
    old = store.find(name)
    if not update:
        require_free(store, old)
    keep = kept_bytes(store, name, config)
    body = TrainingCorpus.read(data, config) if data else None
    base = store.load_base(device=config.device)
    tokenizer = store.load_tokenizer()
    module = as_served(base, read_adapter(folder, base), str(folder))
    if not router.has_general(store):
        ensure_general(store, base, tokenizer)
    alone, together = ModuleSet(base), ModuleSet(base, [module])
    found = None
    if body is not None:
        tokens = body.tokenized(tokenizer, config)
        tokens.require_rows(base, body.where, tokenizer)
        found = tokens.compare(alone, together, config)
        if not config.admit_anyway:
            require_better(name, found)
    else:
        config = replace(config, sequence_length=_LENGTH, separator=None)
        body = TrainingCorpus(f"text that {folder} writes", _written(base, module, tokenizer, config.seed), None)
        tokens = body.tokenized(tokenizer, config)
    training = {
        **(body.record() if data else {"sources": [], "documents": 0}),
        "adapter": {"sha256": sha256_file(folder / WEIGHTS), "settings": read_json(folder / CONFIG)},
        "seed": config.seed,
        **({"loss_before": found.before, "loss_after": found.after, "comparison": found.to_json()} if found else {}),
        "probe": {"base": probe(alone), "module": probe(together)},
    }
    files = tokens.evidence(base, config, keep, store.manifest.routing_layer)
    made_from = None if old is None else old.version
    stored = router.commit_and_route(store, name, module, training, files, old, made_from=made_from)
    version = router_after(store, base=base)
    return ImportResult(name, stored.version, stored.parameters, stored.bytes, found, version)


def _written(base: Base, module: KnowledgeModule, tokenizer: Any, seed: int) -> text_data.TextData:
    """Texts that base and module write, sampled at temperature 1."""
    from transformers import GenerationConfig

    begin = text_data.start_tokens(tokenizer) or sorted(base.end_tokens(tokenizer))[:1] or [0]
    ids = torch.tensor([begin] * _BATCH, device=base.device)
    settings = GenerationConfig(
        max_new_tokens=_LENGTH, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0, use_cache=True
    )
    own, documents = base.model.generation_config, []
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(), attached(base.model, module) as model:
        torch.manual_seed(seed)
        model.generation_config = settings
        try:
            for _ in track(range(_WRITTEN // _BATCH), "writing what the router is shown", "batches"):
                written = model.generate(ids, attention_mask=torch.ones_like(ids))[:, ids.shape[1] :]
                documents += tokenizer.batch_decode(written, skip_special_tokens=True)
        finally:
            model.generation_config = own
    found = [text_data.Document(text, f"text {at}") for at, text in enumerate(documents, 1) if text.strip()]
    return text_data.TextData(found, [])
