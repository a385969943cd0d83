"""Stores with modules and a router, built in a moment: perturbed weights instead of training."""

from __future__ import annotations

import random
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from disk import write_jsonl
from growlm import router
from growlm.base import Base
from growlm.base.checkpoint import save_model
from growlm.engine.account import Account, Footprint
from growlm.engine.drafting import MOST as MOST_DRAFTS
from growlm.engine.runner import slot_bytes
from growlm.engine.scheduler import MOST_TOKENS
from growlm.engine.workspace import row_bytes, workspace_bytes
from growlm.layers.thin import allow_thin_products
from growlm.modules import KnowledgeModule, ModuleSet, kind_of
from growlm.modules.experts import Experts, ExpertsConfig
from growlm.modules.probe import probe
from growlm.modules.shapes import parted_kind
from growlm.recall.text import RecalledText
from growlm.router import load_router
from growlm.store import Store, StoredModule
from tiny import TEXT, make_model, make_tokenizer, perturb, save_base

# Each domain writes with characters of its own, so that even a random base tells them apart.
ALPHABETS = {"letters": "abcde", "digits": "01234", "signs": "+-*/=<>", "general": "VWXYZ", "other": "{}[]()"}
PLAIN = {"letters": {}, "digits": {}, "signs": {}}


def domain_text(domain: str, seed: int, *, words: int = 12) -> str:
    draw = random.Random(f"{domain}/{seed}")
    alphabet = ALPHABETS[domain]
    return " ".join("".join(draw.choices(alphabet, k=draw.randint(2, 6))) for _ in range(words))


def domain_ids(tokenizer: Any, domain: str, number: int = 40, *, first: int = 0) -> list[list[int]]:
    return [tokenizer.encode(domain_text(domain, first + i)) for i in range(number)]


def make_module(
    base: Base, seed: int, *, kind: str = "blocks", strength: float = 0.2, **config: Any
) -> KnowledgeModule:
    """A module that has learned something; of a kind that recalls, without its text."""
    layers, recalls = parted_kind(kind)
    cls = kind_of(kind)
    settings = cls.Config(
        **{**({"num_layers": 1} if layers == "blocks" else {}), **config, "recall": recalls or layers == "recall"}
    )
    module = cls.create(base, settings, None if settings.vocabulary == "none" else torch.arange(20, 300))
    module.enable_new_experts()
    return perturb(module, seed, strength=strength)


def give_text(module: KnowledgeModule, texts: Sequence[Sequence[int]], seed: int, *, most: int = 1 << 20) -> None:
    """Token ids to recall, and gates that are open.

    Args:
        most: tokens of a part.
    """
    assert module.memory is not None
    documents = [(f"book-{number}.txt", np.array(ids, dtype=np.int32)) for number, ids in enumerate(texts)]
    module.memory.text = RecalledText.of(documents, module.shape[-1], most=most)
    gates = module.memory.gates
    gates.data = torch.randn(gates.shape, generator=torch.Generator().manual_seed(seed)).to(gates) * 0.3
    gates.data[:, 0] += 1.0


def add_module(
    store: Store, base: Base, name: str, seed: int, *, domain: str | None = None, steps: int = 0, **config: Any
) -> StoredModule:
    """Commits a module as `learn` does: with the router's evidence of its domain and a probe of what it answers.

    Args:
        steps: of training on its domain, for those tests that need a module which helps.
    """
    tokenizer = store.load_tokenizer()
    module = make_module(base, seed, **config)
    texts = domain_ids(tokenizer, domain or name)
    if module.memory is not None:
        give_text(module, texts, seed, most=200)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for step in range(steps):
        ids = torch.tensor([texts[step % 30]])
        logits = ModuleSet(base, [module]).logits(ids)[0]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).backward()
        optimizer.step()
    seen = router.gather_evidence(base, texts[:30], texts[30:], layer=store.manifest.routing_layer)
    record = {"probe": {"base": probe(ModuleSet(base)), "module": probe(ModuleSet(base, [module]))}}
    files = router.files_of(seen)
    if store.manifest.keep_samples:
        files[router.SAMPLES] = router.pack_samples(texts, store.manifest.keep_samples)
    return store.commit(name, module, record, files)


def add_experts(store: Store, base: Base, name: str, seed: int, *, domain: str | None = None, **config: Any) -> Experts:
    """Commits a module of experts, with the router's evidence and a probe."""
    settings = {"num_experts": 3, "num_attention_experts": 2, "router_size": 8, "expert_size": 16, **config}
    module = Experts.create(base, ExpertsConfig(**settings), torch.arange(20, 300))
    module.enable_new_experts()
    perturb(module, seed, strength=0.3)
    commit_experts(store, base, name, module, domain=domain)
    return module


def commit_experts(store: Store, base: Base, name: str, module: Experts, *, domain: str | None = None) -> StoredModule:
    texts = domain_ids(store.load_tokenizer(), domain or name)
    record = {"probe": {"base": probe(ModuleSet(base)), "module": probe(ModuleSet(base, [module]))}}
    seen = router.gather_evidence(base, texts[:30], texts[30:], layer=store.manifest.routing_layer)
    return store.commit(name, module, record, router.files_of(seen))


def save_lively_base(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A checkpoint folder whose weights are large enough that the answer depends on every token before it."""
    model = make_model(family, **changes)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
    save_model(model, folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_store(
    folder: Path,
    family: str = "llama",
    modules: Mapping[str, Mapping[str, Any]] = PLAIN,
    *,
    keep_samples: int = 0,
    **changes: Any,
) -> Store:
    """`folder/base` and `folder/store`, with modules by name: their `kind`, by default blocks, its
    settings, and `domain`."""
    base_folder = save_lively_base(folder / "base", family, **changes)
    store = Store.create(folder / "store", base_folder, keep_samples=keep_samples)
    base = store.load_base()
    tokenizer = store.load_tokenizer()
    for seed, (name, config) in enumerate(modules.items(), start=1):
        add_module(store, base, name, seed, **config)
    # A router that is trained on general text finds it here; otherwise the base would write some, which takes a second.
    write_jsonl(base_folder / "heldout.jsonl", [domain_text("general", 900 + i) for i in range(40)])
    texts = domain_ids(tokenizer, "general")
    router.write_general(store, base, [(texts[:30], texts[30:])])
    return store


def greedy(base: Base, modules: Sequence[Any], prompt: Sequence[int], tokens: int, *, end: int = 0) -> list[int]:
    """The answer by whole forward passes, without any cache; up to the token `end`, which is not part of it."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            token = int(ModuleSet(base, modules).logits(torch.tensor([ids]))[0, -1].argmax())
        if token == end:
            break
        ids.append(token)
    return ids[len(prompt) :]


class Watch:
    """Counts what modules really take: the bytes of every loaded tensor that is still alive, at each moment of load."""

    def __init__(self, monkeypatch: Any) -> None:
        self.most = 0
        self.loads: list[str] = []
        self._alive: list[tuple[weakref.ref, int]] = []
        load = Store.load

        def watched(store: Store, name: str, *arguments: Any, **options: Any) -> Any:
            self.loads.append(name)
            self.most = max(self.most, self.bytes() + store.module(name).bytes)
            module = load(store, name, *arguments, **options)
            tensors = [*module.parameters(), *module.buffers()]
            self._alive += [(weakref.ref(t), t.numel() * t.element_size()) for t in tensors]
            return module

        monkeypatch.setattr(Store, "load", watched)

    def bytes(self) -> int:
        return sum(size for tensor, size in self._alive if tensor() is not None)


def store_with_texts(home: Path, family: str) -> Store:
    """A store for a base with random weights, and beside it `law.jsonl` and `drugs.jsonl` to learn from."""
    base = save_base(home / "base", family)
    write_jsonl(base / "heldout.jsonl", [f"{text} {n}" for n in range(6) for text in TEXT])
    write_jsonl(home / "law.jsonl", [f"The tenant of room {n} pays {n * 7 % 90} crowns." for n in range(80)])
    write_jsonl(home / "drugs.jsonl", [f"Drug {n} inhibits enzyme {n * 5 % 31}." for n in range(80)])
    return Store.create(home / "store", base)


def with_texts(
    store: Store, weights: int, texts: int = 1, tokens: int = 128, copies: int = 1, slots: int | None = None
) -> int:
    """The budget in which weights of so many bytes just fit, and keys and values of so many texts under any of the
    store's modules, or of so many layers."""
    base = store.load_base()
    slots = slots or base.num_layers + max(
        (stored.shape()[1].new_layers for stored in store.modules.values()), default=0
    )
    states = len({*load_router(store).fork_layers, store.manifest.routing_layer, base.num_layers} - {0, None})
    footprint = Footprint(tokens, slots, states, copies)
    account = Account(0, slot_bytes(base), base.hidden_size * base.dtype.itemsize, row_bytes(base))
    return with_pass(store, weights, base) + account.bytes_of(*[footprint] * texts)


def with_pass(store: Store, weights: int, base: Base | None = None) -> int:
    """The budget in which weights of so many bytes just fit, and what a pass takes."""
    base = base or store.load_base()
    allow_thin_products(base.model)
    return weights + workspace_bytes(base, MOST_TOKENS, 32 + MOST_DRAFTS)
