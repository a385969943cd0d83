"""Modules of kind experts through the whole of it: learned, stored, loaded, routed, generated with, removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from disk import write_jsonl
from growlm.engine import Engine
from growlm.errors import ConfigError, DataError, Interrupted
from growlm.layers.experts import SparseFeedForward
from growlm.layers.insertion import NewExperts
from growlm.modules import ModuleSet
from growlm.store import Store
from growlm.surgery.export import export
from growlm.training.config import LearnConfig
from growlm.training.learn import learn
from growlm.usage.usage import count_usage, open_modules
from interruptions import at_step, interrupt
from stores import store_with_texts
from tiny import random_ids, save_base

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {
    "kind": "experts", "sequence_length": 16, "batch_size": 4, "epochs": 1, "precision": "float32",
    "num_experts": 3, "router_size": 8, "expert_size": 16, "router_samples": 16,
    "admit_anyway": True, "learning_rate": 3e-3,
}  # fmt: skip


@pytest.fixture(params=["llama", "growlm"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return store_with_texts(tmp_path, request.param)


def run(store: Store, name: str = "law", **changes: Any):
    source = store.path.parent / f"{name}.jsonl"
    return learn(store, name, [source], LearnConfig(**{**SMALL, **changes}), progress=False)


def parts(store: Store, name: str = "law") -> list[torch.nn.Module]:
    module = store.load(name, store.load_base())
    return [m for m in module.modules() if isinstance(m, NewExperts | SparseFeedForward)]


def norm(store: Store, name: str) -> float:
    return sum(
        float((p.embeddings if isinstance(p, NewExperts) else p.router.embeddings).square().sum())
        for p in parts(store, name)
    )


def test_they_are_learned_and_change_nothing_else(store: Store) -> None:
    ids = random_ids(2, 9)
    before = store.load_base().logits(ids)
    result = run(store, epochs=4)
    assert result.loss_after < 0.9 * result.loss_before
    assert torch.equal(store.load_base().logits(ids), before)
    base = store.load_base()
    module = store.load("law", base)
    assert not torch.equal(ModuleSet(base, [module]).logits(ids), before)
    # The file holds what is new and nothing of the base.
    assert all(
        not torch.equal(a, b) for a in module.parameters() for b in base.model.parameters() if a.shape == b.shape
    )


def test_the_engine_runs_them_and_removal_restores_the_rest(store: Store) -> None:
    run(store, vocabulary="none")
    with Engine(store) as engine:
        alone = engine.generate("The tenant", module="law", max_new_tokens=8).text
        plain = engine.generate("The tenant", module=None, max_new_tokens=8).text
    run(store, "drugs", vocabulary="none")
    base = store.load_base()
    law, drugs = store.load("law", base), store.load("drugs", base)
    both = ModuleSet(base, [law, drugs]).logits(random_ids(1, 9))
    assert not torch.equal(both, ModuleSet(base, [law]).logits(random_ids(1, 9)))
    store.remove("drugs")
    with Engine(store) as engine:
        assert engine.generate("The tenant", module="law", max_new_tokens=8).text == alone
        assert engine.generate("The tenant", module=None, max_new_tokens=8).text == plain


def test_layers_before_the_first_are_shared(store: Store) -> None:
    run(store, first_layer=2, epochs=2)  # read twice: the base's output is cached up to there
    assert store.load("law", store.load_base()).fork == 2


def test_an_interrupted_run_ends_with_the_same_bytes(store: Store) -> None:
    run(store, "drugs")
    wanted = (store.path / "modules/drugs/1/module.safetensors").read_bytes()
    store.remove("drugs")
    with at_step(5, interrupt), pytest.raises(Interrupted):
        run(store, "drugs")
    run(store, "drugs")
    assert (store.path / "modules/drugs/1/module.safetensors").read_bytes() == wanted


@pytest.mark.slow
def test_routing_regularisation_keeps_new_rows_small(store: Store) -> None:
    run(store, "drugs", epochs=2)
    free = norm(store, "drugs")
    store.remove("drugs")
    run(store, "drugs", epochs=2, routing_regularisation=1.0)
    assert norm(store, "drugs") < 0.7 * free


@pytest.mark.slow
def test_load_concentration_makes_use_uneven(store: Store) -> None:
    def unevenness(weight: float) -> float:
        if store.find("law"):
            store.remove("law")
        run(store, epochs=2, load_concentration=weight, vocabulary="none")
        modules, tokenizer = open_modules(store.path, ["law"])
        usage = count_usage(modules, tokenizer, {"law": [store.path.parent / "law.jsonl"]}, sequence_length=16)
        return sum(usage.to_json()["unevenness"]["law"])

    assert unevenness(1.0) > unevenness(0.0)


@pytest.mark.slow
def test_replayed_text_is_read_too_and_recorded(store: Store) -> None:
    other = store.path.parent / "drugs.jsonl"
    plain = run(store, tokens=1600)
    store.remove("law")
    replayed = run(store, tokens=1600, replay=str(other), replay_ratio=0.25)
    assert replayed.tokens == pytest.approx(plain.tokens / 0.75, rel=0.05)
    training = store.module("law").manifest.training
    assert [s["path"] for s in training["replayed"]] == [str(other)]
    assert [s["path"] for s in training["sources"]] == [str(store.path.parent / "law.jsonl")]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"first_layer": 9}, "first_layer is 9; .* has [34] layers"),
        ({"num_experts": 0}, "^num_experts is 0, expected at least 1$"),
        ({"replay_ratio": 1.0}, "replay_ratio is 1.0"),
        ({"kind": "blocks"}, "num_experts is for modules of kind experts or peer; this one is of kind blocks"),
        ({"routing_regularisation": -1.0}, "routing_regularisation is -1.0"),
    ],
)
def test_settings_that_cannot_be(store: Store, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        run(store, **changes)
    assert store.find("law") is None


def test_more_experts_a_token_than_there_are(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", save_base(tmp_path / "base"))
    write_jsonl(tmp_path / "law.jsonl", [f"The tenant of room {n} pays." for n in range(80)])
    with pytest.raises(ConfigError, match="num_experts_per_tok is 4; it must be at most num_experts, 3"):
        run(store, num_experts_per_tok=4)


def test_replay_that_is_not_there(store: Store) -> None:
    with pytest.raises(DataError, match="nowhere"):
        run(store, replay="nowhere.txt")


def test_they_are_not_exported(store: Store, tmp_path: Path) -> None:
    run(store, tokens=256)
    with pytest.raises(ConfigError, match="law: a module of kind experts"):
        export(store, tmp_path / "out", "law")
    assert not (tmp_path / "out").exists()


def test_settings_of_another_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match="placement is for modules of kind blocks; this one is of kind experts"):
        LearnConfig(kind="experts", placement="interleaved")
    with pytest.raises(ConfigError, match="load_concentration is for modules of kind experts"):
        LearnConfig(load_concentration=1.0)
    with pytest.raises(ConfigError, match="there is no replay"):
        LearnConfig(replay_ratio=0.3)


def test_a_row_longer_than_the_base_was_made_for_is_refused(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", save_base(tmp_path / "base"))
    write_jsonl(tmp_path / "law.jsonl", [f"The tenant of room {n} pays {n} crowns." for n in range(400)])
    with pytest.raises(ConfigError, match=r"sequence_length is 300; .* has 256 positions"):
        run(store, sequence_length=300)
