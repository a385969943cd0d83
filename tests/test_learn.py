"""Learn: new text is learned, nothing else changes, and a run that was stopped ends with the same bytes."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import processors
from torch import Tensor

from disk import all_files, edit, flip, largest_file, write_jsonl
from growlm import router
from growlm.base import Base
from growlm.errors import (
    BaseModelError,
    ConfigError,
    DataError,
    IntegrityError,
    Interrupted,
    StoreError,
    TrainingError,
)
from growlm.layers.cross_entropy import linear_cross_entropy
from growlm.modules import ModuleSet
from growlm.modules.scoring import num_labels, passage_losses
from growlm.router import load_router, names_of, unpack_samples
from growlm.router.samples import GENERAL_SAMPLES
from growlm.store import Store
from growlm.training import history
from growlm.training.config import LearnConfig
from growlm.training.features import FeatureCache
from growlm.training.learn import LearnResult, learn
from growlm.training.loop import train
from interruptions import at_step, each_step, exit_code, forked, in_new_process, interrupt, kill, steps_of
from tiny import TEXT, VOCAB, make_tokenizer, random_ids, save_base

ROOMS = ["kitchen", "cellar", "attic", "garage", "garden", "hall"]
IDS = random_ids(2, 9)

pytestmark = pytest.mark.usefixtures("one_thread")


def lease(number: int) -> str:
    room, day = ROOMS[number % 6], number % 28 + 1
    return f"The tenant of {room} {number} pays {number * 7 % 90} crowns on day {day}."


def config(**changes: Any) -> LearnConfig:
    short = {"sequence_length": 16, "batch_size": 4, "epochs": 1, "num_layers": 1, "precision": "float32"}
    short |= {"admit_anyway": True, "learning_rate": 3e-3}
    return LearnConfig(**{**short, **changes})


def run(store: Store, name: str = "law", *, source: Path | None = None, update: bool = False, **changes: Any):
    source = source or store.path.parent / "leases.jsonl"
    return learn(store, name, [source], config(**changes), update=update, progress=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A base with general text beside it, text to learn, and an empty store that knows the general text."""
    home = tmp_path_factory.mktemp("made")
    save_base(home / "base")
    write_jsonl(home / "base" / "heldout.jsonl", [f"{text} {n}" for n in range(12) for text in TEXT])
    write_jsonl(home / "leases.jsonl", [lease(n) for n in range(80)])
    write_jsonl(home / "drugs.jsonl", [f"Drug {n} inhibits enzyme {n * 5 % 31} and reduces fever." for n in range(80)])
    Store.create(home / "store", home / "base")
    return home


def weights_of(store: Store, name: str = "law", version: int = 1) -> bytes:
    return (store.path / "modules" / name / str(version) / "module.safetensors").read_bytes()


def assert_nothing_left(store: Store) -> None:
    """Locks aside, which have a test of their own."""
    left = [*(store.path / "work").glob("*"), *(store.path / "scratch").glob("*")]
    assert [p.name for p in left if not (p.suffix == ".lock" and p.stat().st_size == 0)] == []


# What is learned


def test_learning_lowers_the_loss_of_text_it_never_saw(home, store):
    result = run(store, epochs=4)
    base = store.load_base()
    tokenizer = store.load_tokenizer()
    unseen = [tokenizer(lease(n))["input_ids"] for n in range(1000, 1030)]
    module = store.load("law", base)
    before, after = (
        float(passage_losses(modules, unseen).sum()) / num_labels(unseen)
        for modules in (ModuleSet(base), ModuleSet(base, [module]))
    )
    assert after < 0.7 * before
    assert result.loss_after < 0.7 * result.loss_before
    assert result.loss_before == pytest.approx(before, rel=0.1)
    assert result.loss_after == pytest.approx(after, rel=0.3)


def test_a_module_of_the_same_text_is_named(home, store, capsys):
    def said(name: str, **more) -> str:
        learn(store, name, [home / "leases.jsonl"], config(epochs=1, admit_anyway=True, **more), progress=True)
        return capsys.readouterr().err

    assert "same files" not in said("law")
    assert "module 'law' was learned from the same files: a router can hardly tell them apart" in said("tenancy")
    edit(store.path / "modules" / "law" / "1" / "module.json", format=99)  # a damaged one is no reason to stop
    assert "module 'tenancy' was learned from the same files" in said("rent")


def test_the_result_and_the_manifest_say_the_same(home, store):
    result = run(store, epochs=2, seed=3)
    assert isinstance(result, LearnResult)
    manifest = Store.open(store.path).module("law").manifest
    training = manifest.training
    assert (result.name, result.version) == (manifest.name, manifest.version) == ("law", 1)
    assert training["loss_before"] == result.loss_before
    assert training["loss_after"] == result.loss_after
    assert training["tokens"] == result.tokens
    assert training["seconds"] == result.seconds > 0
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert training["documents"] == 80
    assert training["seed"] == 3
    assert training["settings"] == config(epochs=2, seed=3).on(0).to_json()
    (source,) = training["sources"]
    content = (home / "leases.jsonl").read_bytes()
    assert (source["path"], source["bytes"], source["documents"]) == (str(home / "leases.jsonl"), len(content), 80)
    assert source["sha256"] == hashlib.sha256(content).hexdigest()
    assert json.loads(json.dumps(result.to_json()))["name"] == "law"
    loaded = store.load("law", store.load_base())
    assert manifest.parameters == loaded.num_parameters()
    assert manifest.bytes == loaded.num_bytes()


def test_losses_are_those_of_the_module_as_it_was_saved(home):
    store = Store.create(home / "half", home / "base", dtype="bfloat16")
    result = run(store)
    base = store.load_base()
    tensors = load_file(store.module("law").folder / "module.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16, torch.int64}
    tokenizer = store.load_tokenizer()
    texts = [tokenizer(lease(n))["input_ids"][:16] for n in range(80)]
    losses = [
        float(passage_losses(modules, texts).sum()) / num_labels(texts)
        for modules in (ModuleSet(base), ModuleSet(base, [store.load("law", base)]))
    ]
    assert result.loss_before == pytest.approx(losses[0], rel=0.1)
    assert result.loss_after == pytest.approx(losses[1], rel=0.3)
    assert losses[1] < losses[0]


def test_a_family_of_another_shape_learns(home):
    """gemma2: norms behind the projections, scaled embeddings, capped logits, sliding windows."""
    save_base(home / "gemma2", "gemma2")
    result = run(Store.create(home / "other", home / "gemma2"), epochs=2)
    assert result.loss_after < 0.95 * result.loss_before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "fork", "rows"),
    [
        ({"vocabulary": "none"}, 3, ""),
        ({"vocabulary": "head"}, 3, "head"),
        ({"vocabulary": "both"}, 0, "head input"),
        ({"placement": "interleaved", "num_layers": 2, "vocabulary": "none"}, 2, ""),
        ({"placement": "interleaved", "num_layers": 3}, 2, "head"),
        ({"precision": "bfloat16", "vocabulary": "both"}, 0, "head input"),
        ({"precision": "auto"}, 3, "head"),
    ],
    ids=str,
)
def test_every_shape_of_module_learns(store, changes, fork, rows):
    result = run(store, epochs=2, **changes)
    assert result.loss_after < 0.95 * result.loss_before
    module = store.load("law", store.load_base())
    assert module.fork == fork
    assert len(module.layers) == changes.get("num_layers", 1)
    assert [name for name in ("head", "input") if getattr(module.rows, name) is not None] == rows.split()
    assert_nothing_left(store)


def test_rows_are_for_tokens_that_the_text_uses_and_no_more_than_allowed(store):
    run(store, max_rows=10)
    ids = store.load("law", store.load_base()).rows.head.ids.tolist()
    tokenizer = store.load_tokenizer()
    used = {i for n in range(80) for i in tokenizer(lease(n))["input_ids"]} | {tokenizer.eos_token_id}
    assert len(ids) == 10
    assert set(ids) <= used


def test_the_number_of_tokens_bounds_the_run(store):
    per_step = 4 * 16
    assert run(store, tokens=5 * per_step).tokens == 5 * per_step
    assert run(store, tokens=300, update=True).tokens == pytest.approx(300, abs=per_step)
    once = run(store, update=True).tokens
    assert run(store, epochs=2, update=True).tokens == 2 * once
    assert once < run(store, tokens=f"{2 * once}", update=True).tokens <= 2 * once + per_step


@pytest.mark.parametrize("times", [0.3, 3, 7.7])
def test_no_fewer_tokens_are_trained_on_than_asked_for(store, times):
    """The last batch of an epoch is short."""
    once = run(store, "once", batch_size=50).tokens
    asked = int(times * once)
    assert asked <= run(store, batch_size=50, tokens=asked).tokens < asked + 50 * 16


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_base_is_rounded_only_where_it_is_multiplied(home, family, monkeypatch):
    """Rotary frequencies are as exact as they are served, and tied weights stay tied (qwen2)."""
    original = Base.pass_for
    seen = []

    def watched(self: Base, *arguments: Any, **options: Any) -> Any:
        tied = self.embedding.weight.data_ptr() == self.head_weight.data_ptr()
        seen.append((self.dtype, tied, self.decoder.rotary_emb.inv_freq.clone()))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Base, "pass_for", watched)
    save_base(home / family, family)
    store = Store.create(home / "other", home / family)
    run(store, precision="bfloat16")
    exact = store.load_base().decoder.rotary_emb.inv_freq
    assert {dtype for dtype, _, _ in seen} == {torch.float32, torch.bfloat16}
    assert {tied for _, tied, _ in seen} == {family == "qwen2"}
    assert all(f.dtype == exact.dtype and torch.equal(f, exact) for _, _, f in seen)


def test_a_module_is_made_from_the_weights_as_they_are_stored(store):
    run(store, precision="bfloat16", learning_rate=1e-30)
    base = store.load_base()
    learned = dict(store.load("law", base).layers[0].named_parameters())
    kept = dict(base.layers[-1].named_parameters())
    assert torch.equal(learned["self_attn.q_proj.weight"], kept["self_attn.q_proj.weight"])
    assert not torch.equal(kept["self_attn.q_proj.weight"], kept["self_attn.q_proj.weight"].bfloat16().float())


def save_tokenizer_with_start(folder: Path) -> int:
    """Beside a base whose vocabulary has room for one more; returns the token that every text now begins with."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    start = tokenizer.bos_token_id
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(folder)
    return start


@pytest.mark.parametrize("general", ["beside the base", "of the base's own"])
def test_texts_begin_with_the_start_token_where_prompts_do(home, general, monkeypatch):
    save_base(home / "llama", vocab_size=VOCAB + 1)
    start = save_tokenizer_with_start(home / "llama")
    if general == "beside the base":
        shutil.copy(home / "base" / "heldout.jsonl", home / "llama")
    shown: list[list[list[int]]] = []
    original = router.gather_evidence

    def watched(base: Base, train: Any, heldout: Any, **options: Any) -> Any:
        shown.append([*train, *heldout])
        return original(base, train, heldout, **options)

    monkeypatch.setattr(router, "gather_evidence", watched)
    monkeypatch.setattr(router.evidence, "gather_evidence", watched)
    store = Store.create(home / "other", home / "llama")
    result = run(store)
    assert result.loss_after < result.loss_before
    *forms, learned = shown
    texts = [text for some in shown for text in some]
    assert len(forms) == (2 if general == "beside the base" else 8)
    assert {text[0] for text in texts} == {start}
    assert start not in {text[1] for text in texts}
    assert max(len(text) for text in learned) == 16


def test_the_router_knows_what_was_learned(home, store):
    run(store, "law")
    run(store, "med", source=home / "drugs.jsonl")
    base, tokenizer = store.load_base(), store.load_tokenizer()
    router = load_router(store)
    assert router.names == ["law", "med"]
    for name, text in (("law", lease(777)), ("med", "Drug 500 inhibits enzyme 9 and reduces fever.")):
        answers = names_of(router.route(*router.states(base, [tokenizer(text)["input_ids"]])))
        assert answers == [name]
    assert store.verify() == []


# Guarantee 1: isolation


def test_base_and_earlier_modules_keep_their_bytes_and_outputs(home, store):
    run(store, "law")
    before = (
        all_files(home / "base"),
        all_files(store.path / "modules" / "law"),
        (store.path / "store.json").read_bytes(),
    )
    base = store.load_base()
    outputs = [ModuleSet(base, m).logits(IDS) for m in ([], [store.load("law", base)])]
    run(store, "med", source=home / "drugs.jsonl", vocabulary="both", num_layers=2)
    run(store, "med", source=home / "drugs.jsonl", update=True)
    assert before == (
        all_files(home / "base"),
        all_files(store.path / "modules" / "law"),
        (store.path / "store.json").read_bytes(),
    )
    base = store.load_base()
    again = [ModuleSet(base, m).logits(IDS) for m in ([], [store.load("law", base)])]
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


def test_what_was_learned_before_does_not_change_what_is_learned(home, store):
    run(store, "law")
    other = Store.create(home / "other", home / "base")
    run(other, "med", source=home / "drugs.jsonl")
    run(other, "law")
    assert all_files(store.path / "modules" / "law" / "1")["module.safetensors"] == weights_of(other)
    assert (
        all_files(store.path / "modules" / "law" / "1")["router.safetensors"]
        == (all_files(other.path / "modules" / "law" / "1")["router.safetensors"])
    )


def test_the_router_is_shown_the_base_as_it_is_served_and_general_text_of_one_length(home, store):
    """Guarantee 9: the class *none* is the same whichever module is learned first, and however."""
    other = Store.create(home / "other", home / "base")
    run(store, precision="float32")
    run(other, "med", source=home / "drugs.jsonl", precision="bfloat16", sequence_length=48)
    run(other, precision="bfloat16")
    shown, again = (all_files(s.path / "router" / "general") for s in (store, other))
    tensors = [name for name in shown if name.endswith(".safetensors")]
    assert tensors
    assert [shown[name] for name in tensors] == [again[name] for name in tensors]
    kept = [{k: v for k, v in all_files(s.module("law").folder).items() if "router" in k} for s in (store, other)]
    assert set(kept[0]) >= {"router.safetensors"}
    assert kept[0] == kept[1]


# Guarantee 10: the same run gives the same module


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_bytes(home, store, precision):
    other = Store.create(home / "other", home / "base")
    run(store, precision=precision)
    torch.rand(1000)  # whatever this process has drawn before
    run(other, precision=precision)
    assert weights_of(store) == weights_of(other)
    run(other, precision=precision, seed=1, update=True)
    assert weights_of(other, version=2) != weights_of(store)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "limit"), [("float32", 0), ("float32", "4kB"), ("bfloat16", 0)])
def test_the_feature_cache_changes_the_speed_and_not_the_result(home, store, precision, limit):
    other = Store.create(home / "other", home / "base")
    run(store, epochs=2, feature_cache="1GB", precision=precision)
    run(other, epochs=2, feature_cache=limit, precision=precision)
    assert weights_of(store) == weights_of(other)


RUNS = {
    "one epoch": {},
    "two epochs": {"epochs": 2},
    "tokens": {"tokens": 5000, "batch_size": 7},
    "bfloat16": {"epochs": 2, "precision": "bfloat16"},
    "interleaved": {"epochs": 2, "placement": "interleaved", "num_layers": 2, "vocabulary": "both"},
}


@pytest.mark.parametrize("name", list(RUNS))
def test_an_interrupted_run_goes_on_to_the_same_bytes(home, store, name):
    changes = RUNS[name]
    steps = len(steps_of(lambda: run(store, **changes)))
    other = Store.create(home / "other", home / "base")
    for at in (3, steps - 5):  # stopped again and again, in the first epoch and in the last
        with at_step(at, interrupt), pytest.raises(Interrupted, match=f"stopped after step {at + 1} of {steps}"):
            run(other, **changes)
        assert other.modules == {}
        assert other.verify() == []
    begun = []
    with at_step(steps - 1, lambda: begun.append(True)):
        run(other, **changes)
    assert weights_of(other) == weights_of(store)
    assert_nothing_left(other)


def test_a_run_that_goes_on_does_not_begin_anew(store):
    with at_step(9, interrupt), pytest.raises(Interrupted):
        run(store)
    assert steps_of(lambda: run(store))[0] == 10


def test_a_run_that_goes_on_has_chosen_its_vocabulary_rows(home, store, monkeypatch):
    """It does not ask the base again; a list that is damaged is made again, and the bytes are the same."""
    whole = store.beside(home / "whole")
    run(whole)
    with at_step(9, interrupt), pytest.raises(Interrupted):
        run(store)
    (file,) = (store.path / "work").glob("*/rows.json")
    kept = file.read_bytes()
    rows = json.loads(kept)
    fewer, other = {**rows, "rows": rows["rows"][:-1]}, {**rows, "rows": [rows["rows"][0] + 1, *rows["rows"][1:]]}
    for at, damaged in enumerate((b"", b"[]", b'{"rows": 1}', *(json.dumps(d).encode() for d in (fewer, other))), 10):
        file.write_bytes(damaged)
        with at_step(at, interrupt), pytest.raises(Interrupted):
            run(store)
        assert file.read_bytes() == kept
    monkeypatch.setattr("growlm.training.module_training.choose_rows", None)
    run(store)
    files = [s.module("law").manifest.files["module.safetensors"] for s in (whole, store)]
    assert files[0] == files[1]


def test_a_finished_run_leaves_no_lock(store):
    run(store)
    run(store, update=True)
    assert [p.name for p in (store.path / "work").glob("*")] == []


def test_restart_begins_anew_and_ends_the_same(home, store):
    with at_step(9, interrupt), pytest.raises(Interrupted):
        run(store)
    with at_step(0, lambda: None):
        learn(store, "law", [home / "leases.jsonl"], config(), restart=True, progress=False)
    other = Store.create(home / "other", home / "base")
    run(other)
    assert weights_of(store) == weights_of(other)
    assert_nothing_left(store)


@pytest.mark.slow
@pytest.mark.parametrize("instant", ["growlm.router.committing.add_domain", "growlm.training.learn.empty"])
@pytest.mark.parametrize("update", [False, True])
def test_a_run_that_was_killed_once_its_module_was_saved_only_has_to_end(home, store, monkeypatch, instant, update):
    if update:
        run(store)
    other = Store.open(shutil.copytree(store.path, home / "other"))
    wanted = run(other, update=update)

    def killed(*arguments: Any) -> None:
        raise SystemExit  # as good as a kill: nothing catches it

    with monkeypatch.context() as patch:
        patch.setattr(instant, killed)
        with pytest.raises(SystemExit):
            run(store, update=update)
    saved = all_files(store.path / "modules")
    results = []
    assert steps_of(lambda: results.append(run(store, update=update))) == []
    assert all_files(store.path / "modules") == saved
    assert results[0].to_json() | {"seconds": 0, "tokens_per_second": 0} == (
        wanted.to_json() | {"seconds": 0, "tokens_per_second": 0}
    )
    assert load_router(store).names == ["law"]
    assert_nothing_left(store)
    assert run(store, update=True).version == wanted.version + 1


def test_a_name_whose_manifest_is_damaged_is_learned_again(home, store):
    run(store)
    load_router(store)  # and keeps its sums
    path = store.module("law").folder / "module.json"
    path.write_text(path.read_text()[:-1])
    assert run(store, update=True).version == 2
    assert load_router(store).names == ["law"]


def test_other_settings_or_data_do_not_go_on_with_a_stopped_run(home, store):
    for name in ("a", "b", "c"):
        with at_step(9, interrupt), pytest.raises(Interrupted):
            run(store, name)
    assert steps_of(lambda: run(store, "other"))[0] == 0
    assert steps_of(lambda: run(store, "a", learning_rate=1e-4))[0] == 0
    write_jsonl(home / "leases.jsonl", [lease(n) for n in range(81)])
    assert steps_of(lambda: run(store, "b"))[0] == 0
    write_jsonl(home / "leases.jsonl", [lease(n) for n in range(80)])
    assert steps_of(lambda: run(store, "c"))[0] == 10


@pytest.mark.parametrize("changes", [{"feature_cache": 0}, {"checkpoint_seconds": 1.0}], ids=str)
def test_a_run_goes_on_with_settings_that_cannot_change_its_result(store, changes):
    with at_step(9, interrupt), pytest.raises(Interrupted):
        run(store, epochs=2)
    assert steps_of(lambda: run(store, epochs=2, **changes))[0] == 10


def test_a_run_goes_on_in_the_precision_that_it_was_stopped_in(store, monkeypatch):
    """Whatever a processor takes `auto` for."""

    def processor(*, native: bool) -> None:
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda: native)
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")  # of which the flags tell all

    for name in ("law", "rent"):
        processor(native=False)
        with at_step(9, interrupt), pytest.raises(Interrupted):
            run(store, name, precision="auto")
    processor(native=True)
    assert steps_of(lambda: run(store, "law", precision="auto"))[0] == 0
    assert steps_of(lambda: run(store, "rent", precision="float32"))[0] == 10


def test_features_do_not_depend_on_the_batch_that_they_were_computed_in(home, store, monkeypatch):
    """Matrix libraries round a row differently in batches of different sizes, here so much that it cannot be missed.

    After a stop the features of early rows are computed again, in the batches of another epoch.
    """
    original = Base.run

    def rounded(self: Base, hidden: Tensor, *arguments: Any) -> Tensor:
        return original(self, hidden, *arguments) * (1 + len(hidden) / 64)

    monkeypatch.setattr(Base, "run", rounded)
    changes = {"epochs": 2, "batch_size": 5}
    steps = len(steps_of(lambda: run(store, **changes)))
    other = Store.create(home / "other", home / "base")
    for at in (steps // 4, steps * 2 // 3):
        with at_step(at, interrupt), pytest.raises(Interrupted):
            run(other, **changes)
    run(other, **changes)
    assert weights_of(other) == weights_of(store)


# The feature cache


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_features_are_kept_as_they_were_computed(store, precision, monkeypatch):
    original = FeatureCache.get
    seen = []

    def watched(self: FeatureCache, rows: Any, compute: Any) -> Tensor:
        computed = torch.cat([compute(rows[i : i + 1]) for i in range(len(rows))])
        given = original(self, rows, compute)
        seen.append((given.dtype, torch.equal(given, computed)))
        return given

    monkeypatch.setattr(FeatureCache, "get", watched)
    run(store, epochs=2, precision=precision)
    assert set(seen) == {(getattr(torch, precision), True)}


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 2.5, 4])
def test_the_feature_cache_leaves_room_for_checkpoints(home, store, room, monkeypatch):
    """For the last one, the next one beside it, and the module."""
    other = Store.create(home / "other", home / "base")
    run(other, epochs=2)
    checkpoint = 3 * 4 * other.module("law").manifest.parameters
    free = SimpleNamespace(free=int(room * checkpoint))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    kept = []
    with each_step(lambda step: kept.extend(p.stat().st_size for p in store.path.rglob("features.bin"))):
        run(store, epochs=2)
    assert (max(kept) > 0) == (room > 3)
    assert weights_of(store) == weights_of(other)


# A run that goes wrong


def test_a_loss_that_is_no_number_stops_the_run_and_nothing_is_committed(store, monkeypatch):
    count = itertools.count()

    def loss(*arguments: Any, **options: Any) -> Tensor:
        value = linear_cross_entropy(*arguments, **options)
        return value * math.nan if next(count) == 5 else value

    monkeypatch.setattr("growlm.training.module_training.linear_cross_entropy", loss)
    message = refused(TrainingError, store, checkpoint_seconds=0.0)
    assert "loss at step 6 of" in message
    assert "is nan" in message
    assert "--learning-rate" in message
    assert "--clip" in message


@pytest.mark.parametrize(("what", "clip"), [("loss", 1.0), ("gradient", 1.0), ("gradient", 0.0)])
def test_no_step_is_made_on_what_is_no_number(tmp_path, what, clip):
    p = torch.nn.Parameter(torch.ones(3))
    seen = []

    def loss(step: int) -> list[Tensor]:
        seen.append(p.detach().clone())
        if step < 2:
            return [p.sum()]
        return [p.sum() * math.nan if what == "loss" else (p - p.detach()).sqrt().sum()]

    with pytest.raises(TrainingError, match=rf"the {what}.* at step 3 of 9 is (nan|inf)"):
        train({"p": p}, loss, 9, lambda step: 1, config(clip=clip), 0.1, folder=tmp_path, resume_hint="")
    assert len(seen) == 3
    assert torch.equal(p, seen[-1])
    assert [path.name for path in tmp_path.iterdir()] == ["losses.jsonl"]
    assert [line["step"] for line in history.read(tmp_path)] == [1, 2]


def test_a_module_that_overflows_where_it_is_served_is_not_committed(home):
    store = Store.create(home / "half", home / "base", dtype="float16")
    message = refused(TrainingError, store, learning_rate=0.99, clip=0.0, precision="float32")
    assert "held-out loss after training" in message
    assert "--learning-rate" in message


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped", "missing", "empty", "list", "numbers", "elsewhere"])
def test_a_damaged_checkpoint_is_named_and_restart_begins_anew(home, store, damage):
    with at_step(9, interrupt), pytest.raises(Interrupted):
        run(store)
    (tensors,) = (store.path / "work").rglob("step-*.safetensors")
    pointer = tensors.with_name("checkpoint.json")
    if damage == "flipped":
        flip(tensors)
    elif damage == "missing":
        tensors.unlink()
    elif damage == "elsewhere":
        edit(pointer, file="../../store.json")
    else:
        pointer.write_text({"empty": "{}", "list": "[10, 20]", "numbers": '{"step": "ten", "seconds": 1.0}'}[damage])
    damaged = tensors if damage in ("flipped", "missing") else pointer
    for _ in range(2):
        with pytest.raises(IntegrityError) as caught:
            run(store)
        message = str(caught.value)
        assert str(damaged) in message
        assert "--restart" in message
        assert "\n" not in message
    learn(store, "law", [home / "leases.jsonl"], config(), restart=True, progress=False)
    assert_nothing_left(store)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(store):
    with at_step(9, interrupt), pytest.raises(Interrupted):
        run(store)
    next((store.path / "work").rglob("checkpoint.json")).unlink()
    assert steps_of(lambda: run(store))[0] == 0


# Processes: killed, and several at once

KILLS = [("one epoch", 11), ("two epochs", 40)]


def kill_in_its_course(home: Path, number: int) -> None:
    """A run that is killed in its course, and then goes on and is finished, in the store `home/kill-<number>`."""
    name, at = KILLS[number]
    store = Store.create(home / f"kill-{number}", home / "base")

    def until_killed() -> None:
        with at_step(at, kill):
            run(store, checkpoint_seconds=0.0, **RUNS[name])

    assert exit_code(forked(until_killed)) == -signal.SIGKILL
    assert Store.open(store.path).modules == {}
    assert steps_of(lambda: run(store, **RUNS[name]))[0] == at


def interrupt_from_outside(home: Path) -> None:
    """Ctrl-C as a terminal sends it, to a process that is in the middle of training."""

    def until_interrupted() -> None:
        try:
            with at_step(4, (home / "begun").touch):
                run(Store.create(home / "stopped", home / "base"), epochs=1000)
        except Interrupted:
            os._exit(7)

    pid = forked(until_interrupted)
    while not (home / "begun").exists():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGINT)
    assert exit_code(pid) == 7


def many_processes(home: Path) -> None:
    children = {f"kill {n}": forked(kill_in_its_course, home, n) for n in range(len(KILLS))}
    children["ctrl-c"] = forked(interrupt_from_outside, home)
    codes = {name: exit_code(pid) for name, pid in children.items()}
    # Three names at once, on a store that has never learned anything.
    store = Store.open(home / "store")
    children = {name: forked(run, store, name) for name in ("law", "lease", "rent")}
    codes |= {name: exit_code(pid) for name, pid in children.items()}
    (home / "codes.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def processes(made, tmp_path_factory) -> Path:
    home = shutil.copytree(made, tmp_path_factory.mktemp("processes") / "home")
    in_new_process(many_processes, home)
    return home


def code_of(processes: Path, name: str) -> int:
    return json.loads((processes / "codes.json").read_text())[name]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(KILLS)), ids=str)
def test_a_killed_run_goes_on_to_the_same_bytes(home, store, processes, number):
    assert code_of(processes, f"kill {number}") == 0
    resumed = Store.open(processes / f"kill-{number}")
    run(store, **RUNS[KILLS[number][0]])
    assert weights_of(resumed) == weights_of(store)
    assert resumed.verify() == []
    assert_nothing_left(resumed)


def test_learning_several_names_at_once_all_succeed(processes):
    assert [code_of(processes, name) for name in ("law", "lease", "rent")] == [0, 0, 0]
    store = Store.open(processes / "store")
    assert list(store.modules) == ["law", "lease", "rent"]
    assert weights_of(store, "law") == weights_of(store, "rent")
    assert load_router(store).names == ["law", "lease", "rent"]
    assert store.verify() == []
    assert_nothing_left(store)


def test_ctrl_c_stops_after_a_step(processes):
    assert code_of(processes, "ctrl-c") == 0
    store = Store.open(processes / "stopped")
    assert store.modules == {}
    assert store.verify() == []


# Refusals


def test_the_same_run_twice_at_once_is_refused(store):
    refused = []

    def again() -> None:
        with pytest.raises(StoreError, match="running already") as caught:
            run(store)
        refused.append(str(caught.value))

    with at_step(3, again):
        run(store)
    assert "law" in refused[0]
    assert store.module("law").version == 1
    assert_nothing_left(store)


def test_a_taken_name_wants_update(store):
    run(store)
    before = all_files(store.path / "modules")
    with pytest.raises(StoreError, match=r"module 'law' exists \(version 1\); use --update"):
        run(store)
    assert all_files(store.path / "modules") == before
    assert run(store, update=True, seed=1).version == 2
    assert store.module("law").version == 2
    assert load_router(store).names == ["law"]
    assert run(store, "new", update=True).version == 1


def test_a_name_that_is_taken_while_it_is_learned_is_not_replaced_unasked(home, store):
    """Two runs of one name, with different settings: the second to finish was not told to update."""
    with at_step(3, lambda: run(store, seed=1)), pytest.raises(StoreError, match="exists"):
        run(store)
    assert store.module("law").version == 1


@pytest.mark.parametrize("name", ["", "..", "a/b", "A"])
def test_bad_names_are_refused_before_any_work(store, name):
    with pytest.raises(StoreError, match="not allowed"):
        learn(store, name, ["no such file"], config())


def refused(error: type[Exception], store: Store, source: Path | None = None, **changes: Any) -> str:
    before = all_files(store.path / "modules")
    with pytest.raises(error) as caught:
        run(store, source=source, **changes)
    assert "\n" not in str(caught.value)
    assert all_files(store.path / "modules") == before
    assert_nothing_left(store)
    return str(caught.value)


def test_bad_data_is_refused(home, store):
    assert "no such file" in refused(DataError, store, home / "absent.txt")
    (home / "empty.txt").write_text(" \n")
    refused(DataError, store, home / "empty.txt")
    (home / "short.txt").write_text("Three words only.")
    refused(DataError, store, home / "short.txt")
    (home / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    assert "bad.jsonl:2" in refused(DataError, store, home / "bad.jsonl")
    assert "'body'" in refused(DataError, store, text_key="body")
    assert "smaller --sequence-length" in refused(DataError, store, sequence_length=100_000)


def test_bad_settings_are_refused(store):
    for changes in (
        {"kind": "bricks"},
        {"num_layers": 0},
        {"placement": "bottom"},
        {"vocabulary": "all"},
        {"precision": "int8"},
        {"tokens": "many"},
        {"tokens": 3},
        {"batch_size": 0},
        {"epochs": 0},
        {"sequence_length": 1},
        {"learning_rate": 0.0},
        {"learning_rate": 2.0},
        {"warmup": 1.0},
        {"feature_cache": "big"},
        {"max_rows": 0},
        {"router_samples": 0},
        {"seed": -1},
        {"seed": 2**64},
        {"weight_decay": -0.1},
        {"weight_decay": math.nan},
        {"clip": -1.0},
        {"clip": math.inf},
        {"warmup": math.nan},
        {"learning_rate": math.nan},
        {"checkpoint_seconds": -1.0},
        {"checkpoint_seconds": math.nan},
    ):
        refused(ConfigError, store, **changes)


def test_sequences_longer_than_learned_positions_are_refused(home):
    save_base(home / "gpt2", "gpt2", n_positions=32)
    store = Store.create(home / "other", home / "gpt2")
    assert "32 positions" in refused(ConfigError, store, sequence_length=33)


def test_sequences_as_long_as_learned_positions_are_learned(home):
    save_base(home / "gpt2", "gpt2", n_positions=32)
    result = run(Store.create(home / "other", home / "gpt2"), sequence_length=32)
    assert result.loss_after < result.loss_before


def test_a_changed_base_is_refused(home, store):
    flip(home / "base" / "model.safetensors")
    refused(BaseModelError, store)


def test_general_text_that_is_too_little_is_refused(home):
    write_jsonl(home / "base" / "heldout.jsonl", ["One line."])
    refused(DataError, Store.create(home / "other", home / "base"))


def test_without_general_text_beside_the_base_the_router_is_shown_a_sample(home):
    (home / "base" / "heldout.jsonl").unlink()
    store = Store.create(home / "other", home / "base")
    run(store)
    assert load_router(store).names == ["law"]
    kept = unpack_samples(store.router_files(GENERAL_SAMPLES).read())
    tokenizer = store.load_tokenizer()
    texts = [tokenizer.decode(ids) for ids in kept]
    assert len(kept) >= 96
    for piece in ("breakfast is from seven until ten", "Vocês podem me ajudar"):
        assert sum(piece in text for text in texts) == 1


def test_a_full_disk_stops_the_run_with_the_number_of_bytes(home, store):
    with largest_file(20_000), pytest.raises(StoreError, match=r"no room to write [\d,]{5,} bytes"):
        run(store)
    assert store.modules == {}
    assert store.verify() == []
    assert run(store).version == 1
