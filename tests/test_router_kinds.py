"""Both kinds of router: the contract that each keeps, and what the trained one promises beyond it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from growlm.engine import Engine
from growlm.errors import BudgetError, ConfigError, IntegrityError, Interrupted, StoreError
from growlm.evaluation import EvalConfig, evaluate
from growlm.files import sha256_file
from growlm.router import NONE, SAMPLES, base_states, load_router, pack_samples, read_samples, unpack_samples
from growlm.store import ROUTERS, Store
from growlm.training.config import LearnConfig, RouterConfig
from growlm.training.learn import learn
from growlm.training.router import describe_router, train_router
from interruptions import at_step, in_new_process, interrupt, kill_everywhere
from stores import PLAIN, add_module, domain_ids, domain_text, make_store
from tiny import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = RouterConfig(router_layers=1, passages=32, epochs=6, batch_size=8, learning_rate=5e-3)
DOMAINS = [*PLAIN, NONE]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("made")
    train_router(make_store(home, keep_samples=100_000), QUICK)
    return home


@pytest.fixture(params=ROUTERS)
def kind(request) -> str:
    return request.param


def texts_of(store: Store, domain: str, first: int = 2000, number: int = 5) -> list[list[int]]:
    return domain_ids(store.load_tokenizer(), "general" if domain == NONE else domain, number, first=first)


def bytes_of(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def router_version(store: Store, version: int) -> bytes:
    return (store.router_path / "transformer" / str(version) / "router.safetensors").read_bytes()


# The contract


def test_each_text_goes_to_its_domain_and_general_text_to_none(store, kind):
    base = store.load_base()
    router = load_router(store, kind=kind).bind(base)
    assert router.kind == kind
    assert router.names == sorted(PLAIN)
    for domain in DOMAINS:
        routes = router.route(*base_states(base, texts_of(store, domain)))
        assert [r.module or NONE for r in routes] == [domain] * len(routes)
        for route in routes:
            assert sorted(route.scores) == sorted(DOMAINS)
            assert list(route.scores.values()) == sorted(route.scores.values(), reverse=True)
            assert sum(route.scores.values()) == pytest.approx(1.0, abs=1e-5)
            assert next(iter(route.scores)) == (route.module or NONE)


def test_padding_does_not_change_the_answer(store, kind):
    base = store.load_base()
    router = load_router(store, kind=kind).bind(base)
    texts = [texts_of(store, "letters")[0], texts_of(store, "digits")[0][:9], texts_of(store, NONE)[0][:20]]
    together = router.route(*base_states(base, texts))
    for text, route in zip(texts, together, strict=True):
        (alone,) = router.route(*base_states(base, [text]))
        assert alone.module == route.module
        for name, score in alone.scores.items():
            assert route.scores[name] == pytest.approx(score, abs=1e-4)


def test_a_withdrawn_module_is_never_chosen(store, kind):
    base = store.load_base()
    whole = load_router(store, kind=kind).bind(base)
    states = base_states(base, texts_of(store, "digits"))
    store.remove("digits")
    for router in (whole.without({"digits"}), load_router(store, kind=kind).bind(base)):
        assert router.names == ["letters", "signs"]
        assert router.forks.keys() == {"letters", "signs"}
        assert router.num_bytes() <= whole.num_bytes()
        for route in router.route(*states):
            assert "digits" not in route.scores
            assert route.module != "digits"
            assert sum(route.scores.values()) == pytest.approx(1.0, abs=1e-5)


def test_the_engine_counts_the_router_and_answers_with_its_choice(store, kind):
    router = load_router(store, kind=kind)
    with Engine(store, router=kind) as engine:
        assert engine.router.kind == kind
        assert engine.fixed_bytes == engine.base_bytes + router.num_bytes()
        assert engine.generate(domain_text("signs", 3000), max_new_tokens=2).module == "signs"
        assert engine.generate(domain_text("general", 3000), max_new_tokens=2).module is None
        with_router = engine.fixed_bytes
    with pytest.raises(BudgetError, match="router"):
        Engine(store, router=kind, memory=with_router - 1)


def test_evaluation_measures_either_kind(home, store, kind):
    data = {}
    for domain in DOMAINS:
        path = home / f"{domain}.jsonl"
        lines = [domain_text("general" if domain == NONE else domain, 4000 + i) for i in range(4)]
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        data[domain] = [path]
    found = evaluate(store, data, EvalConfig(router=kind)).to_json()
    assert found["routing"]["accuracy"] == 1.0
    assert found["memory"]["router_bytes"] == load_router(store, kind=kind).num_bytes()


def test_a_store_without_modules_says_none(home, kind):
    empty = Store.create(home / "empty", home / "base")
    base = empty.load_base()
    router = load_router(empty, kind=kind).bind(base)
    assert router.names == []
    (route,) = router.route(*base_states(base, [[5, 6, 7]]))
    assert (route.module, route.scores) == (None, {NONE: 1.0})


def test_unknown_kinds_are_refused(home, store):
    for call in (
        lambda: load_router(store, kind="oracle"),
        lambda: store.set_router("oracle"),
        lambda: Store.create(home / "other", home / "base", router="oracle"),
    ):
        with pytest.raises(ConfigError, match="'oracle' is not one of gaussian, transformer"):
            call()
    assert not (home / "other").exists()


# The trained router


@pytest.mark.parametrize("family", FAMILIES)
def test_it_runs_layers_of_every_family(tmp_path, family):
    store = make_store(tmp_path, family, {"letters": {}, "digits": {}}, keep_samples=100_000)
    train_router(store, RouterConfig(router_layers=2, passages=8, batch_size=8))
    base = store.load_base()
    router = load_router(store, kind="transformer").bind(base)
    for route in router.route(*base_states(base, texts_of(store, "letters"))):
        assert sum(route.scores.values()) == pytest.approx(1.0, abs=1e-5)
    tensors = store.router_files("transformer").read()
    assert {k.split(".")[2] for k in tensors if k.startswith("blocks.layers.")} == {"0", "1"}


def test_the_same_store_gives_the_same_router_whatever_the_order_of_learning(tmp_path):
    versions = []
    for number, order in enumerate([["letters", "digits", "signs"], ["signs", "letters", "digits"]]):
        store = make_store(tmp_path / str(number), modules={}, keep_samples=50_000)
        base = store.load_base()
        for name in order:
            add_module(store, base, name, 1)
        train_router(store, QUICK)
        versions.append(router_version(store, 1))
    assert versions[0] == versions[1]


def test_training_leaves_base_and_modules_as_they_are(home, store):
    before = bytes_of(home / "base") | bytes_of(store.path / "modules")
    assert train_router(store, QUICK).version == 2
    assert bytes_of(home / "base") | bytes_of(store.path / "modules") == before


def test_versions_stay_and_the_newest_can_be_taken_back(store):
    first = router_version(store, 1)
    base = store.load_base()
    add_module(store, base, "other", 9)
    assert describe_router(store)["versions"][0]["modules"] == 3
    train_router(store, QUICK)
    store.set_router("transformer")
    assert load_router(store).names == ["digits", "letters", "other", "signs"]
    assert router_version(store, 1) == first
    store.remove_router_version(2)
    assert load_router(store).names == ["digits", "letters", "signs"]
    assert describe_router(store)["unknown"] == ["other"]
    with pytest.raises(StoreError, match="no trained router of version 2; versions are: 1"):
        store.remove_router_version(2)
    assert store.verify() == []


def test_a_router_of_just_these_modules_is_the_one_that_was_trained_then(store):
    base = store.load_base()
    add_module(store, base, "other", 9)
    train_router(store, QUICK)
    then = load_router(store, ["letters", "digits", "signs"], kind="transformer")
    assert then._tensors["categories.bias"].shape == (4,)
    fewer = load_router(store, ["letters"], kind="transformer").bind(base)
    assert fewer.names == ["letters"]
    for route in fewer.route(*base_states(base, texts_of(store, "letters"))):
        assert (route.module, route.scores.keys()) == ("letters", {"letters", NONE})


def test_an_interrupted_training_goes_on_to_the_same_router(home):
    stores = [Store.open(shutil.copytree(home / "store", home / name)) for name in ("whole", "cut")]
    train_router(stores[0], QUICK)
    with at_step(7, interrupt), pytest.raises(Interrupted, match="growlm router"):
        train_router(stores[1], QUICK)
    assert len(describe_router(stores[1])["versions"]) == 1
    train_router(stores[1], QUICK)
    assert router_version(stores[0], 2) == router_version(stores[1], 2)


def test_damaged_routers_are_named(store):
    path = store.router_path / "transformer" / "1" / "router.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"transformer/1/router\.safetensors"):
        load_router(store, kind="transformer")
    assert any("transformer/1/router.safetensors" in line for line in store.verify())
    assert load_router(store, kind="gaussian").names == sorted(PLAIN)


# Kept text


def test_samples_are_bounded_and_come_back():
    passages = [[1, 2, 3], [4] * 50, [70_000, 2]]
    assert unpack_samples(pack_samples(passages, 1 << 20)) == passages
    small = pack_samples(passages[:2], 28)
    assert unpack_samples(small) == [[1, 2, 3], [4] * 7]
    assert small["tokens"].dtype == torch.uint16
    assert sum(t.numel() * t.element_size() for t in small.values()) == 28
    wide = pack_samples(passages, 28)
    assert sum(t.numel() * t.element_size() for t in wide.values()) <= 28
    assert unpack_samples(pack_samples(passages, 0)) == []


def test_kept_text_goes_with_its_module(store):
    assert [len(t) for t in read_samples(store.module("letters"))] == [
        len(t) for t in texts_of(store, "letters", 0, 40)
    ]
    assert SAMPLES in store.module("letters").manifest.files
    folder = store.module("letters").folder
    store.remove("letters")
    assert not folder.exists()


def test_without_kept_text_the_message_says_what_does_not_work(tmp_path):
    store = make_store(tmp_path, modules={"letters": {}, "digits": {}})
    assert read_samples(store.module("letters")) == []
    with pytest.raises(StoreError, match=r"no text of digits, letters was kept.*--keep-samples 2MB.*gaussian"):
        train_router(store, QUICK)
    with pytest.raises(ConfigError, match="keep some, or use --router gaussian"):
        store.set_router("transformer", keep_samples=0)
    assert Store.open(store.path).manifest.router == "gaussian"


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps({"text": domain_text("other", i, words=40)}) + "\n" for i in range(40)))
    return path


SMALL = {"num_layers": 1, "sequence_length": 32, "tokens": 2000, "router_samples": 16, "max_rows": 64}


def test_learning_trains_the_router_of_a_store_that_has_one(store, corpus):
    store.set_router("transformer")
    result = learn(store, "other", [corpus], LearnConfig(**SMALL, keep_samples="3kB"))
    assert result.router == 2
    assert load_router(store).names == ["digits", "letters", "other", "signs"]
    kept = store.module("other").folder / SAMPLES
    assert 2000 < kept.stat().st_size < 3500
    newest = store.router_files("transformer").manifest()
    assert newest is not None
    assert newest.config["num_layers"] == QUICK.router_layers  # as the version before was made


def test_learning_keeps_no_text_unless_the_store_says_so(tmp_path, home, corpus):
    plain = make_store(tmp_path / "plain", modules={})
    learn(plain, "other", [corpus], LearnConfig(**SMALL))
    assert read_samples(plain.module("other")) == []
    keeping = Store.open(home / "store")
    learn(keeping, "other", [corpus], LearnConfig(**SMALL))
    assert read_samples(keeping.module("other"))
    learn(keeping, "private", [corpus], LearnConfig(**SMALL, keep_samples=0))
    assert read_samples(keeping.module("private")) == []


def test_a_trained_store_refuses_what_it_could_never_route_before_any_work(store, corpus):
    store.set_router("transformer")
    with pytest.raises(StoreError, match=r"'other' could never be chosen.*--keep-samples 0"):
        learn(store, "other", [corpus], LearnConfig(**SMALL, keep_samples=0))
    assert store.find("other") is None
    store.set_router("gaussian")
    learn(store, "private", [corpus], LearnConfig(**SMALL, keep_samples=0))
    store.set_router("transformer")
    with pytest.raises(StoreError, match="no text of private was kept"):
        learn(store, "other", [corpus], LearnConfig(**SMALL))
    assert store.find("other") is None


def write_again(folder: Path) -> None:
    store = Store.open(folder)
    with store.lock():
        tensors = store.router_files("transformer").read(1)
        assert tensors is not None
        store.router_files("transformer").write(tensors, keep=True)


def test_a_kill_while_a_router_is_written_leaves_the_one_before(store, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    in_new_process(kill_everywhere, write_again, store.path, out)
    points = sorted(out.iterdir(), key=lambda p: int(p.name))
    found = [Store.open(point).router_files("transformer").versions() for point in points]
    assert found == sorted(found)
    assert (found[0], found[-1]) == ([1], [1, 2])
    assert len(points) > 5
    for point in points:
        assert load_router(Store.open(point), kind="transformer").num_bytes() > 0
