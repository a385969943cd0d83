"""Modules of kind peer through the whole of it: learned, stored, loaded, routed, generated with, removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from growlm.engine import Engine
from growlm.errors import BudgetError, ConfigError, IntegrityError, Interrupted
from growlm.layers.cross_entropy import linear_cross_entropy
from growlm.layers.pools import imitation
from growlm.layers.product_keys import retrievals
from growlm.modules import ModuleSet, kind_of
from growlm.modules.peer import Peer
from growlm.store import Store
from growlm.training.config import LearnConfig
from growlm.training.learn import learn
from interruptions import at_step, interrupt
from stores import store_with_texts, with_texts
from tiny import make_base, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {
    "kind": "peer", "sequence_length": 16, "batch_size": 4, "epochs": 1, "precision": "float32", "num_experts": 100,
    "num_heads": 2, "top_k": 4, "router_samples": 16, "admit_anyway": True, "learning_rate": 3e-3,
}  # fmt: skip


@pytest.fixture(params=["llama", "growlm"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return store_with_texts(tmp_path, request.param)


def run(store: Store, name: str = "law", **changes: Any):
    source = store.path.parent / f"{name}.jsonl"
    return learn(store, name, [source], LearnConfig(**{**SMALL, **changes}), progress=False)


def tensors(store: Store, name: str = "law") -> dict[str, torch.Tensor]:
    return dict(store.load(name, store.load_base()).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(("replace", "precision"), [(False, "bfloat16"), (True, "float32")])
def test_it_is_learned_and_changes_nothing_else(store: Store, replace: bool, precision: str) -> None:
    ids = random_ids(2, 9)
    before = store.load_base().logits(ids)
    result = run(store, epochs=4, replace_feed_forward=replace, vocabulary="none", precision=precision)
    assert result.loss_after < 0.97 * result.loss_before
    base = store.load_base()
    assert torch.equal(base.logits(ids), before)
    module = store.load("law", base)
    assert not torch.equal(ModuleSet(base, [module]).logits(ids), before)
    assert isinstance(module, Peer)
    assert module.config.layers == (base.num_layers // 2,)
    assert module.config.open_steps == 1
    assert module.fork == base.num_layers // 2


def test_rows_that_no_token_read_keep_their_bits(store: Store) -> None:
    run(store, num_experts=2500, vocabulary="none", weight_decay=0.5)
    torch.manual_seed(0)
    base = store.load_base()
    new = Peer.create(base, Peer.Config(num_experts=2500, num_heads=2, top_k=4, vocabulary="none"))
    kept = (tensors(store)["pools.0.up"] == new.pools[0].up).all(-1)
    assert 100 < int(kept.sum()) < 2400


def test_an_interrupted_run_goes_on_to_the_same_bytes(store: Store) -> None:
    for name in ("law", "drugs"):
        (store.path.parent / f"{name}.jsonl").write_text((store.path.parent / "law.jsonl").read_text())
    run(store, "law", replace_feed_forward=True)
    with at_step(5, interrupt), pytest.raises(Interrupted):
        run(store, "drugs", replace_feed_forward=True)
    run(store, "drugs", replace_feed_forward=True)
    whole, stopped = tensors(store, "law"), tensors(store, "drugs")
    assert "pools.0.keys.norm.running_var" in whole
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_in_place_of_a_feed_forward_it_first_learns_what_that_computes() -> None:
    torch.manual_seed(0)
    base = make_base("llama")
    config = Peer.Config(num_experts=64, num_heads=2, top_k=8, replace_feed_forward=True, vocabulary="none")
    module = Peer.create(base, config)
    module.enable_new_experts()
    modules = ModuleSet(base, [module])
    ids = random_ids(2, 20)
    with imitation() as errors:
        within = modules.logits(ids)
    assert torch.equal(within, base.logits(ids))  # what is imitated goes on, not the imitation
    (first,) = errors
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(60):
        with imitation() as errors:
            modules.logits(ids)
        optimizer.zero_grad()
        errors[0].backward()
        optimizer.step()
    assert errors[0].item() < 0.7 * first.item()


def test_learning_in_place_begins_by_imitating(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a quarter of the steps; beside a feed-forward there is nothing to imitate."""
    steps: list[str] = []

    def imitating() -> Any:
        steps.append("imitation")
        return imitation()

    def of_language(*arguments: Any, **options: Any) -> torch.Tensor:
        steps.append("language")
        return linear_cross_entropy(*arguments, **options)

    monkeypatch.setattr("growlm.training.module_training.imitation", imitating)
    monkeypatch.setattr("growlm.training.module_training.linear_cross_entropy", of_language)
    run(store, replace_feed_forward=True, epochs=2)
    first = round(len(steps) / 4)
    assert first > 1
    assert steps == ["imitation"] * first + ["language"] * (len(steps) - first)
    steps.clear()
    run(store, "drugs")
    assert set(steps) == {"language"}


def test_the_engine_runs_it_and_removal_restores_the_rest(store: Store) -> None:
    run(store)
    with Engine(store) as engine:
        alone = engine.generate("The tenant", module="law", max_new_tokens=8).text
        plain = engine.generate("The tenant", module=None, max_new_tokens=8).text
    run(store, "drugs")
    with Engine(store) as engine:
        engine.generate("The tenant", module=["law", "drugs"], max_new_tokens=8)
        assert engine.generate("The tenant", module="law", max_new_tokens=8).text == alone
    store.remove("drugs")
    with Engine(store) as engine:
        assert engine.generate("The tenant", module="law", max_new_tokens=8).text == alone
        assert engine.generate("The tenant", module=None, max_new_tokens=8).text == plain


def test_every_token_reads_as_many_experts_whatever_their_number() -> None:
    base = make_base("llama")
    for num_experts in (64, 1024):
        module = Peer.create(base, Peer.Config(num_experts=num_experts, num_heads=2, top_k=4, vocabulary="none"))
        module.enable_new_experts()
        with retrievals() as found, torch.no_grad():
            ModuleSet(base, [module]).logits(random_ids(2, 9))
        assert [r.experts.shape for r in found] == [(18, 2, 4)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "7"}, "layer 7: .* has layers 0 to"),
        ({"layers": "1,1"}, "name each once"),
        ({"layers": "one"}, "write numbers of layers"),
        ({"num_experts": 1009}, "num_experts is 1009"),
        ({"top_k": 101}, "top_k is 101"),
        ({"key_size": 5}, "key_size is 5, expected an even number"),
        ({"num_experts": 10**12}, "bytes, and .* are free"),
        ({"num_experts": 10**15 + 37}, "num_experts is 1000000000000037, expected at most 1099511627776"),
        ({"num_experts": 10**25}, "num_experts is 1"),
        ({"num_heads": 2**20, "key_size": 2**20}, "the queries of 1048576 heads need .* bytes, and .* are free"),
        ({"num_heads": 10**19}, "num_heads is 10000000000000000000, expected at most 1048576"),
        ({"key_size": 10**10}, "key_size is 10000000000, expected at most 1048576"),
    ],
)
def test_sizes_that_cannot_be_are_refused_and_leave_nothing(store: Store, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        run(store, **settings)
    assert "\n" not in str(caught.value)
    assert not store.modules


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "blocks", "top_k": 3}, "top_k is for modules of kind peer"),
        ({"kind": "blocks", "num_experts": 3}, "num_experts is for modules of kind experts or peer"),
        ({"kind": "peer", "expert_size": 3}, "expert_size is for modules of kind experts"),
        ({"kind": "peer", "num_heads": 0}, "num_heads is 0, expected at least 1"),
        ({"kind": "peer", "neurons": 2}, "there is no setting neurons"),
        ({"kind": "peer", "steps": (3,)}, "there is no setting steps"),
        ({"kind": "pear"}, "kind 'pear' does not exist; kinds are blocks, experts, peer, lora"),
        ({"kind": "peer", "query_norm": "some"}, "query_norm is 'some', expected 'batch', 'layer' or 'none'"),
    ],
)
def test_settings_of_another_kind_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LearnConfig(**settings)


def test_a_kind_is_found_by_name() -> None:
    assert kind_of("peer") is Peer


# Tables on the disk


def test_tables_on_the_disk_answer_as_those_in_memory(store: Store) -> None:
    run(store, num_experts=2500, layers="0,2")
    ids = random_ids(2, 15)
    base = store.load_base()
    whole = ModuleSet(base, [store.load("law", base)]).logits(ids)
    for row_cache in (30_000, 100_000, 10_000_000):
        module = store.load("law", base, row_cache=row_cache)
        assert not any(len(p) == 2500 for p in module.parameters())
        torch.testing.assert_close(ModuleSet(base, [module]).logits(ids), whole, rtol=1e-5, atol=1e-5)
        assert module.num_bytes() == store.module("law").bytes_with(row_cache)


def test_a_module_larger_than_memory_still_answers(store: Store) -> None:
    run(store, num_experts=10_000)
    with Engine(store) as engine:
        wanted = engine.generate("The tenant", module="law", max_new_tokens=8)
        fixed = engine.fixed_bytes
    size = store.module("law").bytes
    memory = with_texts(store, fixed + size // 2, tokens=256)
    with Engine(store, memory=memory) as engine, pytest.raises(BudgetError, match=r"law .* not fit"):
        engine.generate("The tenant", module="law")
    with Engine(store, memory=memory, experts_on="disk", row_cache=size // 4) as engine:
        found = engine.generate("The tenant", module="law", max_new_tokens=8)
        assert found.text == wanted.text
        assert engine.resident_bytes <= memory
    words = r"law .* not fit together: .*; raise --memory by at least .*.*, or lower --row-cache, 64\.0 MB"
    with Engine(store, memory=memory, experts_on="disk") as engine, pytest.raises(BudgetError, match=words):
        engine.generate("The tenant", module="law")
    few = "a row cache of 1,000 bytes; the rows of one token take"
    with Engine(store, experts_on="disk", row_cache=1000) as engine, pytest.raises(ConfigError, match=few):
        engine.generate("The tenant", module="law")


def test_other_kinds_are_read_whole_where_tables_stay_on_the_disk(store: Store) -> None:
    learn(
        store,
        "drugs",
        [store.path.parent / "drugs.jsonl"],
        LearnConfig(
            num_layers=1,
            sequence_length=16,
            batch_size=4,
            epochs=1,
            router_samples=8,
            admit_anyway=True,
            learning_rate=3e-3,
        ),
        progress=False,
    )
    with Engine(store) as one, Engine(store, experts_on="disk") as other:
        answers = [e.generate("Drug", module="drugs", max_new_tokens=6).text for e in (one, other)]
        assert answers[0] == answers[1]
        assert one.resident_bytes == other.resident_bytes


def test_a_module_in_use_on_the_disk_is_not_saved_by_halves(store: Store) -> None:
    run(store)
    module = store.load("law", store.load_base(), row_cache=100_000)
    with pytest.raises(ConfigError, match=r"tables are on the disk, .* load it without row_cache"):
        store.commit("copy", module, {})
    assert list(store.modules) == ["law"]


def test_a_damaged_table_is_named_before_it_is_used(store: Store) -> None:
    run(store)
    path = store.module("law").folder / "module.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-40] + bytes(40))
    with Engine(store, experts_on="disk") as engine, pytest.raises(IntegrityError, match=r"tensors: sha256"):
        engine.generate("The tenant", module="law")
    path.write_bytes(content[: len(content) // 2])
    with Engine(store, experts_on="disk") as engine, pytest.raises(IntegrityError, match=r"module\.safetensors"):
        engine.generate("The tenant", module="law")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts_on": "tape"}, "experts_on is 'tape', expected memory or disk"),
        ({"row_cache": "1MB"}, "row_cache is for tables on the disk"),
    ],
)
def test_options_that_make_no_sense_are_refused(store: Store, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(store, **options)
