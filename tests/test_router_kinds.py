"""All kinds of router: the contract that each keeps, and what the trained one promises beyond it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from disk import write_jsonl
from growlm import cli
from growlm.disk.files import sha256_file
from growlm.engine import Engine
from growlm.errors import (
    BudgetError,
    ConfigError,
    GrowlmWarning,
    IntegrityError,
    Interrupted,
    NotBetterError,
    StoreError,
)
from growlm.evaluation import EvalConfig, evaluate
from growlm.router import NONE, SAMPLES, load_router, pack_samples, read_samples, unpack_samples
from growlm.store import ROUTERS, Store
from growlm.training import router as training_router
from growlm.training.config import LearnConfig, RouterConfig
from growlm.training.general import describe_general, general_samples, shipped_forms
from growlm.training.learn import learn
from growlm.training.router import describe_router, train_router
from interruptions import at_step, in_new_process, interrupt, kill_everywhere, steps_of
from stores import PLAIN, add_module, domain_ids, domain_text, make_store
from tiny import FAMILIES, save_base

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = RouterConfig(router_layers=1, passages=32, epochs=3, batch_size=8, learning_rate=1e-2)
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
        routes = router.route(*router.states(base, texts_of(store, domain)))
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
    together = router.route(*router.states(base, texts))
    for text, route in zip(texts, together, strict=True):
        (alone,) = router.route(*router.states(base, [text]))
        assert alone.module == route.module
        for name, score in alone.scores.items():
            assert route.scores[name] == pytest.approx(score, abs=1e-4)


def test_a_withdrawn_module_is_never_chosen(store, kind):
    base = store.load_base()
    whole = load_router(store, kind=kind).bind(base)
    states = whole.states(base, texts_of(store, "digits"))
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
    (route,) = router.route(*router.states(base, [[5, 6, 7]]))
    assert (route.module, route.scores) == (None, {NONE: 1.0})


def test_modules_without_a_trained_router_are_no_store_of_which_none_fits(tmp_path):
    store = make_store(tmp_path, modules={"letters": {}}, keep_samples=50_000)
    store.set_router("transformer")
    with pytest.raises(StoreError, match=r"growlm router .*store --kind transformer trains one") as caught:
        Engine(store)
    assert "\n" not in str(caught.value)
    store.remove("letters")
    with Engine(store) as engine:
        assert engine.route("abc").module is None


def test_unknown_kinds_are_refused(home, store):
    for call in (
        lambda: load_router(store, kind="oracle"),
        lambda: store.set_router("oracle"),
        lambda: Store.create(home / "other", home / "base", router="oracle"),
    ):
        with pytest.raises(ConfigError, match="'oracle' is not one of gaussian, product-key, transformer"):
            call()
    assert not (home / "other").exists()


# The trained router


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_it_runs_layers_of_every_family(tmp_path, family):
    store = make_store(tmp_path, family, {"letters": {}, "digits": {}}, keep_samples=100_000)
    train_router(store, RouterConfig(router_layers=2, passages=8, batch_size=8))
    base = store.load_base()
    router = load_router(store, kind="transformer").bind(base)
    for route in router.route(*router.states(base, texts_of(store, "letters"))):
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
    for route in fewer.route(*fewer.states(base, texts_of(store, "letters"))):
        assert (route.module, route.scores.keys()) == ("letters", {"letters", NONE})


def test_an_interrupted_training_goes_on_to_the_same_router(home):
    stores = [Store.open(shutil.copytree(home / "store", home / name)) for name in ("whole", "cut")]
    train_router(stores[0], QUICK)
    with at_step(7, interrupt), pytest.raises(Interrupted, match="run the same command again"):
        train_router(stores[1], QUICK)
    assert len(describe_router(stores[1])["versions"]) == 1
    train_router(stores[1], QUICK)
    assert router_version(stores[0], 2) == router_version(stores[1], 2)


def test_a_module_that_was_learned_anew_from_other_text_is_unknown(store):
    """Its name is known, its text is not: text of the old module is no business of the new one."""
    base = store.load_base()
    store.set_router("transformer")
    assert describe_router(store)["unknown"] == []
    store.remove("digits")
    add_module(store, base, "digits", 77, domain="other")
    found = describe_router(store)
    assert (found["knows"], found["unknown"], found["outdated"]) == (2, ["digits"], [])
    router = load_router(store).bind(base)
    assert router.names == ["letters", "signs"]
    for route in router.route(*router.states(base, texts_of(store, "digits"))):
        assert "digits" not in route.scores
    train_router(store, QUICK)
    assert describe_router(store)["unknown"] == []
    bound = load_router(store).bind(base)
    answers = bound.route(*bound.states(base, texts_of(store, "other")))
    assert {r.module for r in answers} == {"digits"}


def test_a_module_that_was_updated_is_chosen_by_its_earlier_text_and_said_to_be(store, capsys):
    base = store.load_base()
    store.set_router("transformer")
    add_module(store, base, "digits", 77, domain="other", placement="interleaved", num_layers=2)
    found = describe_router(store)
    assert (found["knows"], found["unknown"], found["outdated"]) == (3, [], ["digits"])
    assert "chosen by the text of an earlier version: digits" in command(capsys, store)
    router = load_router(store).bind(base)
    assert router.forks["digits"] == store.module("digits").manifest.fork < base.num_layers
    assert router.route(*router.states(base, texts_of(store, "digits")))[0].module == "digits"
    store.remove("digits", version=1)
    assert describe_router(store)["unknown"] == ["digits"]
    assert load_router(store).names == ["letters", "signs"]


def test_a_training_never_takes_away_modules_that_were_added_while_it_ran(store):
    """Two trainings at once: the second to begin knows more, and the first to begin ends last."""
    base = store.load_base()

    def another_learns() -> None:
        other = Store.open(store.path)
        add_module(other, base, "other", 9)
        assert train_router(other, QUICK).version == 2

    with at_step(3, another_learns):
        result = train_router(store, QUICK)
    assert (result.version, result.modules) == (2, 4)
    assert result.accuracy == describe_router(store)["versions"][1]["accuracy"]
    store.set_router("transformer")
    assert describe_router(store)["unknown"] == []
    assert list((store.path / "work").iterdir()) == []


def test_a_training_that_knows_less_than_the_store_is_still_better_than_none(store):
    base = store.load_base()
    add_module(store, base, "other", 9)
    with at_step(3, lambda: add_module(Store.open(store.path), base, "later", 10, domain="other")):
        assert train_router(store, QUICK).version == 2
    store.set_router("transformer")
    assert describe_router(store)["unknown"] == ["later"]


def command(capsys: Any, store: Store, *options: str) -> str:
    """Runs `growlm router`, which must succeed; what it prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(["router", str(store.path), *options])
    out, err = capsys.readouterr()
    assert not caught.value.code, err
    return out


def test_settings_that_are_not_given_are_those_of_the_newest_version(store, capsys):
    def settings() -> dict:
        return store.router_files("transformer").manifest().training["settings"]

    command(capsys, store, "--kind", "transformer")
    assert settings() == QUICK.to_json()
    command(capsys, store, "--kind", "transformer", "--tokens", "1000", "--sequence-length", "32", "--admit-anyway")
    assert settings() == QUICK.to_json() | {"tokens": 1000, "sequence_length": 32}
    command(
        capsys, store, "--kind", "transformer", "--epochs", "1", "--admit-anyway"
    )  # 1 is the default too, and it was asked for
    assert settings() == QUICK.to_json() | {"tokens": None, "sequence_length": 32, "epochs": 1}


# Never worse

LITTLE = replace(QUICK, epochs=1, learning_rate=1e-6)


def test_a_version_that_is_worse_than_the_one_before_is_refused(store, capsys):
    with pytest.raises(NotBetterError, match=r"router: worse than version 1, which stays.*--admit-anyway") as caught:
        train_router(store, LITTLE)
    assert "\n" not in str(caught.value)
    assert len(describe_router(store)["versions"]) == 1
    assert router_version(store, 1)
    # Who wants it all the same need not train again.
    anyway = replace(LITTLE, admit_anyway=True)
    assert steps_of(lambda: train_router(store, anyway)) == []
    said = store.router_files("transformer").manifest(2).training
    assert said["comparison"]["gain"] < -said["comparison"]["error"]
    assert "admit_anyway" not in said["settings"]
    # The next one is compared with that one, and is better.
    assert train_router(store, QUICK).version == 3


def test_the_router_command_refuses_a_worse_version_with_status_1(store, capsys):
    little = ["--kind", "transformer", "--epochs", "1", "--learning-rate", "1e-6"]
    with pytest.raises(SystemExit) as caught:
        cli.main(["router", str(store.path), *little])
    assert caught.value.code == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("growlm: router: worse than version 1, which stays, so that nothing was saved: held-out")
    assert store.manifest.router == Store.open(store.path).manifest.router == "gaussian"
    assert "transformer version 2: 3 modules" in command(capsys, store, *little, "--admit-anyway")


def test_a_version_that_knows_a_module_more_is_kept_though_it_is_worse(store, capsys):
    """Else that module could not be chosen; a line says how both did on what both know."""
    add_module(store, store.load_base(), "other", 9)
    capsys.readouterr()
    assert train_router(store, LITTLE, progress=True).version == 2
    said = store.router_files("transformer").manifest(2).training["comparison"]
    assert said["gain"] < -said["error"]
    line = f"router: version 1, on what both know: held-out loss {said['before']:.3f} -> {said['after']:.3f} (gain -"
    assert line in capsys.readouterr().err


def test_an_older_version_that_knows_more_is_what_a_worse_one_is_measured_by(store):
    store.remove("signs")
    with pytest.raises(NotBetterError, match="worse than version 1"):
        train_router(store, LITTLE)
    assert train_router(store, QUICK).modules == 2


def test_what_cannot_be_compared_is_replaced(store):
    """Of an older growlm, which held other passages out; and of other text under the same names."""
    path = store.router_path / "transformer" / "1" / "router.json"
    manifest = json.loads(path.read_text())
    del manifest["training"]["general"]
    path.write_text(json.dumps(manifest))
    assert train_router(store, LITTLE).version == 2
    base = store.load_base()
    for seed, (name, domain) in enumerate(zip(PLAIN, ("other", "letters", "digits"), strict=True)):
        store.remove(name)
        add_module(store, base, name, seed, domain=domain)
    assert train_router(store, LITTLE).version == 3
    assert "comparison" not in store.router_files("transformer").manifest(3).training


def test_a_passage_is_held_out_from_every_version_or_from_none(store, monkeypatch):
    """Whatever else the store holds, and whatever the seed: none is measured on what the other was trained on."""
    last, held = training_router._last_logits, []

    def watched(base: Any, layers: Any, passages: list[list[int]]) -> torch.Tensor:
        held.append({tuple(p) for p in passages})
        return last(base, layers, passages)

    monkeypatch.setattr(training_router, "_last_logits", watched)
    train_router(store, replace(QUICK, admit_anyway=True, seed=5))
    add_module(store, store.load_base(), "other", 9)
    train_router(store, replace(QUICK, seed=6))
    (first, _), (more, common) = held[:2], held[2:]
    assert first == common < more


def test_learning_goes_on_with_the_router_before_where_the_new_one_is_worse(store, monkeypatch):
    """The module is saved all the same, and is chosen as before."""
    store.set_router("transformer", 100_000)
    base = store.load_base()
    worse = NotBetterError("router: worse than version 1, which stays")

    def refused(*arguments: Any, **options: Any) -> Any:
        raise worse

    monkeypatch.setattr(training_router, "require_no_worse", refused)
    assert training_router.router_after(store, base=base) == 1
    assert len(describe_router(store)["versions"]) == 1


def test_a_version_that_does_not_say_how_it_was_trained_can_be_taken_away(store):
    path = store.router_path / "transformer" / "1" / "router.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"training": {}}))
    with pytest.raises(IntegrityError, match=r"growlm router .* --remove-version 1"):
        train_router(store)
    store.remove_router_version(1)
    assert train_router(store, QUICK).version == 1


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


def test_so_few_bytes_that_no_token_fits_keep_no_text(home, store, corpus):
    learn(store, "other", [corpus], LearnConfig(**SMALL, keep_samples=5))
    assert read_samples(store.module("other")) == []
    with pytest.raises(StoreError, match="no text of other was kept"):
        train_router(store, QUICK)
    store.remove("other")
    store.set_router("transformer")
    with pytest.raises(StoreError, match=r"'other' could never be chosen.*--keep-samples 5"):
        learn(store, "other", [corpus], LearnConfig(**SMALL, keep_samples=5))
    with pytest.raises(ConfigError, match="--keep-samples 5"):
        Store.create(home / "new", home / "base", router="transformer", keep_samples=5)


def test_empty_samples_of_an_older_growlm_are_none(tmp_path):
    store = make_store(tmp_path, modules={"letters": {}}, keep_samples=5)
    assert SAMPLES in store.module("letters").manifest.files
    with pytest.raises(StoreError, match="no text of letters was kept"):
        train_router(store, QUICK)


def test_general_text_that_was_given_is_none_to_a_router_that_is_trained_later(tmp_path, corpus):
    """Text of modules is kept from the second module on; the general text was shown before the first."""
    made = make_store(tmp_path, modules={})
    store = Store.create(tmp_path / "new", tmp_path / "base")
    base, tokenizer = store.load_base(), store.load_tokenizer()
    text = tmp_path / "general.jsonl"
    lines = [domain_text("general", i, words=40) for i in range(40)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    describe_general(store, base, tokenizer, [text])
    store.set_router("gaussian", keep_samples=50_000)
    learn(store, "other", [corpus], LearnConfig(**SMALL))
    found = general_samples(store, base, tokenizer)
    assert sorted(tokenizer.decode(t) for t in found[: len(lines)]) == sorted(lines)
    forms = {name: form for name, form in shipped_forms(base, tokenizer).items() if name != "asked"}
    assert found[len(lines) :] == [p for form in forms.values() for half in form for p in half]
    assert general_samples(made, base, tokenizer) != found  # what lies beside the base


def test_kept_text_is_of_the_whole_corpus_whatever_its_tokens_take(tmp_path):
    """Ids of 65,536 and more take four bytes, so that half of the rows that two bytes would allow are kept."""
    # A token for each byte, and no merges: document n is written with the n-th letter.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({"<|endoftext|>": 0} | {letter: 66_000 + i for i, letter in enumerate(alphabet)}, [])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    save_base(tmp_path / "base", "qwen2", vocab_size=66_300)
    wide = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    wide.save_pretrained(tmp_path / "base")
    letters = alphabet[:92]
    assert letters[0] == "!"
    corpus = tmp_path / "letters.jsonl"
    corpus.write_text("".join(json.dumps({"text": letter * 31}) + "\n" for letter in letters))
    write_jsonl(tmp_path / "base" / "heldout.jsonl", [letter * 31 for letter in letters[:8]])
    store = Store.create(tmp_path / "store", tmp_path / "base")
    small = {
        "num_layers": 1,
        "sequence_length": 16,
        "tokens": 76 * 32,
        "router_samples": 4,
        "max_rows": 8,
        "admit_anyway": True,
    }
    learn(store, "letters", [corpus], LearnConfig(**small, keep_samples=76 * 32 * 2))
    kept = {token - 66_000 for passage in read_samples(store.module("letters")) for token in passage if token}
    quarters = [len({n for n in kept if 23 * q <= n < 23 * (q + 1)}) for q in range(4)]
    assert min(quarters) >= 4
    assert sum(quarters) < 70  # not all of it had room


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


SMALL = {
    "num_layers": 1, "sequence_length": 32, "tokens": 2000, "router_samples": 16, "max_rows": 64, "batch_size": 8,
    "admit_anyway": True, "learning_rate": 3e-3,
}  # fmt: skip


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


def cut_short(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Does something at the fourth step of the router's training within `learn`, the first time."""
    left = [action]

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if not left:
            return train_router(*arguments, **options)
        with at_step(3, left.pop()):
            return train_router(*arguments, **options)

    monkeypatch.setattr("growlm.training.router.train_router", interrupted)


@pytest.mark.parametrize("update", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_learning_that_was_stopped_at_its_router_goes_on_with_it(home, store, corpus, monkeypatch, update):
    store.set_router("transformer")
    if update:
        learn(store, "other", [corpus], LearnConfig(**SMALL))
    whole = Store.open(shutil.copytree(store.path, home / "whole"))
    wanted = learn(whole, "other", [corpus], LearnConfig(**SMALL), update=update)

    def run(**options: Any) -> Any:
        return learn(store, "other", [corpus], LearnConfig(**SMALL), update=update, **options)

    cut_short(monkeypatch, interrupt)
    with pytest.raises(Interrupted, match="run the same command again"):
        run()
    assert store.module("other").version == wanted.version
    modules = bytes_of(store.path / "modules")
    results = []
    assert steps_of(lambda: results.append(run()))[0] == 4  # nothing was learned a second time
    (result,) = results
    assert (result.version, result.router, result.tokens) == (wanted.version, wanted.router, wanted.tokens)
    assert (result.loss_before, result.loss_after) == (wanted.loss_before, wanted.loss_after)
    assert bytes_of(store.path / "modules") == modules
    assert router_version(store, result.router) == router_version(whole, result.router)
    assert describe_router(store)["unknown"] == []
    assert list((store.path / "work").iterdir()) == []
    # It has ended: the same command now asks for something else.
    if update:
        assert run().version == wanted.version + 1
    else:
        with pytest.raises(StoreError, match="use --update"):
            run()


def test_other_text_does_not_go_on_with_learning_that_was_stopped_at_its_router(store, corpus, monkeypatch):
    store.set_router("transformer")
    cut_short(monkeypatch, interrupt)
    with pytest.raises(Interrupted):
        learn(store, "other", [corpus], LearnConfig(**SMALL))
    for changes in ({"seed": 1}, {"num_layers": 2}):
        with pytest.raises(StoreError, match="use --update"):
            learn(store, "other", [corpus], LearnConfig(**SMALL | changes))
    assert learn(store, "other", [corpus], LearnConfig(**SMALL, seed=1), update=True).version == 2


def test_restart_trains_the_router_anew_and_the_saved_module_stays(store, corpus, monkeypatch):
    store.set_router("transformer")
    cut_short(monkeypatch, interrupt)
    with pytest.raises(Interrupted):
        learn(store, "other", [corpus], LearnConfig(**SMALL))
    modules = bytes_of(store.path / "modules")
    again = steps_of(lambda: learn(store, "other", [corpus], LearnConfig(**SMALL), restart=True))
    assert again[0] == 0
    assert bytes_of(store.path / "modules") == modules
    assert describe_router(store)["unknown"] == []
    assert list((store.path / "work").iterdir()) == []


def test_the_router_command_goes_on_with_what_learning_began(store, corpus, monkeypatch, capsys):
    """It takes the settings of the newest version, as `learn` does."""
    store.set_router("transformer")
    cut_short(monkeypatch, interrupt)
    with pytest.raises(Interrupted):
        learn(store, "other", [corpus], LearnConfig(**SMALL))
    assert steps_of(lambda: command(capsys, store, "--kind", "transformer"))[0] == 4
    assert describe_router(store)["unknown"] == []


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


# Where a router reads


def layers_run(engine: Engine, ask: Callable[[], Any]) -> list[int]:
    """How many tokens each of the base's layers ran over."""
    tokens = [0] * engine.base.num_layers
    hooks = []
    for i, layer in enumerate(engine.base.layers):

        def count(module: Any, given: tuple[torch.Tensor, ...], i: int = i) -> None:
            tokens[i] += given[0].shape[1]

        hooks.append(layer.register_forward_pre_hook(count))
    try:
        ask()
    finally:
        for hook in hooks:
            hook.remove()
    return tokens


def test_a_router_runs_the_base_as_far_as_it_reads(store, kind):
    store.set_router(kind, 100_000)
    with Engine(store, device="cpu", prefix_bytes=0) as engine:
        prompt = texts_of(store, "digits")[0]
        depth, layer = engine.base.num_layers, engine.router.layer or engine.base.num_layers
        assert layer == (depth if kind == "transformer" else round(depth / 3))
        n = len(prompt)
        assert layers_run(engine, lambda: engine.route(prompt)) == [n] * layer + [0] * (depth - layer)
        # And to go on from there reads nothing twice.
        assert layers_run(engine, lambda: engine.generate(prompt, max_new_tokens=1)) == [n] * depth


def test_a_store_of_before_routes_from_the_last_states(tmp_path, monkeypatch):
    monkeypatch.setattr("growlm.store.store.layer_to_read", lambda layers: None)
    store = make_store(tmp_path)
    base, router = store.load_base(), load_router(store)
    assert router.layer is None
    text = texts_of(store, "digits")[:1]
    hidden, _ = router.states(base, text)
    torch.testing.assert_close(base.cap(base.head(hidden)), base.logits(torch.tensor(text)))
    for domain in PLAIN:
        assert {r.module for r in router.route(*router.states(base, texts_of(store, domain)))} == {domain}


def test_what_was_kept_of_other_states_is_never_used(store):
    load_router(store)  # is kept, of the states that the store says
    path = store.module("digits").folder / "module.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "routing_layer": 3}))
    said = (
        r"is of its states after layer 3, .* reads its states after layer 1; learn 'digits' here, with --update; until"
    )
    with pytest.warns(GrowlmWarning, match=said):
        assert load_router(store).names == ["letters", "signs"]
    assert [problem.split(": ")[1] for problem in store.verify()] == ["routing_layer is not the store's"]
    assert describe_router(store)["unknown"] == ["digits"]
    # Named, it answers; and it can be learned anew.
    with Engine(store, device="cpu") as engine:
        assert engine.generate("one", module="digits", max_new_tokens=1).module == "digits"


def test_another_layer_is_another_fit(store):
    load_router(store)
    path = store.path / "store.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "routing_layer": None}))
    with pytest.warns(GrowlmWarning, match="until then it is never chosen"):
        assert load_router(Store.open(store.path)).names == []


def test_a_layer_that_the_base_has_not_is_refused(store):
    path = store.path / "store.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "routing_layer": 9}))
    with pytest.raises(IntegrityError, match="routing_layer is 9, the base has 3 layers"):
        Store.open(store.path).load_base()
