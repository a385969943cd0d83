"""Usage, pruning and growth without training on a GPU: the same experts are counted, kept and appended as elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from disk import all_files, write_jsonl
from growlm import router
from growlm.modules.peer import Peer, PeerConfig
from growlm.store import WEIGHTS, Store
from growlm.surgery.module_pruning import prune_module
from growlm.surgery.pruning import prune
from growlm.training.config import GrowConfig
from growlm.training.general import describe_general
from growlm.training.grow import grow, take_back
from growlm.usage.usage import count_usage, open_modules
from stores import add_experts, commit_experts, domain_ids, save_lively_base
from tiny import TEXT, perturb

pytestmark = pytest.mark.gpu
NAMES = ["letters", "digits"]


@pytest.fixture(scope="module")
def made(device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a module of experts and one of kind peer, and a model of experts."""
    home = tmp_path_factory.mktemp("made")
    store = Store.create(home / "store", save_lively_base(home / "base"))
    base = store.load_base()
    add_experts(store, base, "letters", 1, num_experts=6, vocabulary="head")
    shape = {"num_experts": 64, "num_heads": 2, "top_k": 3, "key_size": 8, "vocabulary": "none"}
    module = Peer.create(base, PeerConfig(**shape))
    module.enable_new_experts()
    commit_experts(store, base, "digits", perturb(module, 2, strength=0.3))  # type: ignore[arg-type]
    texts = domain_ids(store.load_tokenizer(), "general")
    router.write_general(store, base, [(texts[:30], texts[30:])])
    save_lively_base(home / "model", "growlm")
    (home / "text.txt").write_text("\n".join(TEXT * 4))
    write_jsonl(home / "general.jsonl", [f"{text} {n}" for n in range(6) for text in TEXT])
    return home


@pytest.fixture
def both(device: str, made: Path, tmp_path: Path) -> list[tuple[str, Path]]:
    """The device and the processor, each with a copy of its own."""
    return [(where, Path(shutil.copytree(made, tmp_path / where))) for where in (device, "cpu")]


def weights(home: Path, name: str) -> bytes:
    return (Store.open(home / "store").module(name).folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("source", ["model", *NAMES])
def test_usage_is_the_processors(source: str, both: list[tuple[str, Path]]) -> None:
    counted: list[Any] = []
    for where, home in both:
        folder, names = (home / "model", []) if source == "model" else (home / "store", [source])
        modules, tokenizer = open_modules(folder, names, device=where)
        assert modules.base.device.type == torch.device(where).type
        counted.append(count_usage(modules, tokenizer, {"a": [home / "text.txt"]}, sequence_length=32))
    for one, other in zip(*(c.counts["a"] for c in counted), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(*(c.pools["a"] for c in counted), strict=True):
        assert torch.equal(one.counts, other.counts)
    assert sum(map(len, (counted[0].counts["a"], counted[0].pools["a"]))) > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_module_has_the_processors_bytes(name: str, both: list[tuple[str, Path]]) -> None:
    results = []
    for where, home in both:
        done = prune_module(Store.open(home / "store"), name, [home / "text.txt"], keep=0.7, device=where)
        results.append((done["experts"], weights(home, name)))
    assert results[0] == results[1]


def test_a_pruned_model_has_the_processors_bytes(both: list[tuple[str, Path]]) -> None:
    for where, home in both:
        prune(home / "model", home / "small", [home / "text.txt"], keep=0.8, device=where)
    found, wanted = (all_files(home / "small") for _, home in both)
    assert found == wanted


def test_a_module_grows_and_is_taken_back_as_elsewhere(both: list[tuple[str, Path]]) -> None:
    grown = []
    for where, home in both:
        store, before = Store.open(home / "store"), weights(home, "digits")
        grow(store, "digits", 8, config=GrowConfig(device=where))
        grown.append(weights(home, "digits"))
        take_back(store, "digits", device=where)
        assert weights(home, "digits") == before
    assert grown[0] == grown[1]


def test_general_text_is_described_as_elsewhere(both: list[tuple[str, Path]], near: Any) -> None:
    seen = []
    for where, home in both:
        store = Store.open(home / "store")
        describe_general(store, store.load_base(device=where), store.load_tokenizer(), [home / "general.jsonl"])
        seen.append(store.router_files("general").read())
    found, wanted = seen
    assert found is not None
    assert wanted is not None
    for part, vectors in wanted.items():
        near("router: general text", found[part].float(), vectors.float(), times=10)
