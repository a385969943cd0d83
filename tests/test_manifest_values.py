"""Values that a manifest's keys cannot mean are refused: every key of every manifest, and of every kind's config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from disk import edit, write_jsonl
from growlm.disk.files import read_json
from growlm.disk.tensors import read_tensors, write_tensors
from growlm.engine import Engine
from growlm.errors import ConfigError, GrowlmError, IntegrityError
from growlm.modules import KINDS, kind_of
from growlm.modules.lora import Lora
from growlm.modules.peer import Peer
from growlm.modules.shapes import LoraConfig, PeerConfig
from growlm.router import load_router
from growlm.store import ROUTER_FITTED, Store
from growlm.store.manifests import ModuleManifest, RouterManifest, StoreManifest, read_manifest
from growlm.training.config import GrowConfig, LearnConfig, RouterConfig
from growlm.training.grow import grow, take_back
from growlm.training.learn import learn
from growlm.training.router import last_config, train_router
from stores import add_experts, add_module, make_store
from tiny import perturb

MODULES = ("letters", "routed", "pools", "adapted", "quoted")
WRONG = {
    int: [-1, 2**70, "3", 1.5, None, True, [], {}],
    str: ["x" * 5000, 7, None, [], {}, ""],
    list: ["x", 7, {}, [-1], [2**70], ["x"], [None]],
    dict: ["x", 7, [], None],
    bool: ["x", 7, None, []],
    float: [-1.0, 0, "x", None, [], {}],
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A store with a module of every kind, one of which has grown."""
    home = tmp_path_factory.mktemp("made")
    store = make_store(home, modules={"letters": {}}, keep_samples=2000)
    base = store.load_base()
    add_module(store, base, "digits", 2)
    add_experts(store, base, "routed", 3, domain="signs", expert_size=24)  # not what it would be by default
    pools = Peer.create(base, PeerConfig(num_experts=16, num_heads=1, top_k=2), torch.arange(20, 300))
    pools.enable_new_experts()
    store.commit("pools", perturb(pools, 4), {"tokens": 5, "seed": 0})
    grow(store, "pools", 4, config=GrowConfig())
    lora = Lora.create(base, LoraConfig(r=2, target_modules=("q_proj",), rank_pattern={"1.self_attn.q_proj": 3}))
    store.commit("adapted", perturb(lora, 5), {"tokens": 5, "seed": 0})
    add_module(store, base, "quoted", 6, domain="other", kind="recall")
    load_router(store)  # is kept
    return home


def manifest_of(store: Store, name: str) -> Path:
    return store.module(name).folder / "module.json"


def keys_of(model: type[BaseModel], content: dict[str, Any]) -> list[tuple[str, Any]]:
    unsaid = {"recall"} & model.model_fields.keys() - content.keys()  # that a module recalls nothing is not said
    assert content.keys() | unsaid == model.model_fields.keys()  # not one is left out below
    return [*content.items(), *((key, False) for key in unsaid)]


def wrong_values(value: Any) -> list[Any]:
    return [wrong for wrong in WRONG[type(value)] if wrong != value]


@pytest.mark.parametrize(
    ("file", "model"),
    [
        ("store.json", StoreManifest),
        ("modules/letters/1/module.json", ModuleManifest),
        ("router/general/1/router.json", RouterManifest),
    ],
)
def test_every_key_of_a_manifest_has_a_type_and_bounds(made, tmp_path, file, model):
    content = json.loads((made / "store" / file).read_text())
    path = tmp_path / "manifest.json"
    for key, value in keys_of(model, content):
        if value is None:
            wrongs: list[Any] = [7, [], {}, "x" * 5000, ""]
        elif key in ("config", "modules", "training") and value == {}:
            wrongs = ["x", 7, [], None]
        else:
            wrongs = [w for w in wrong_values(value) if not (w is None and key == "routing_layer")]  # of old stores
        for wrong in wrongs:
            path.write_text(json.dumps({**content, key: wrong}))
            with pytest.raises(GrowlmError) as caught:
                read_manifest(path, model)
            text = str(caught.value)
            assert str(path) in text
            assert key in text
            assert "\n" not in text
            assert len(text) < 500
    path.write_text(json.dumps(content))
    assert read_manifest(path, model).model_dump(mode="json") == content


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("created", "yesterday"),
        ("created", "2026-13-01T00:00:00"),
        ("growlm", "0" * 70),
        ("format", 0),
        ("format", -1),
        ("version", 0),
        ("fork", 70_000),
        ("bytes", 2**53),
        ("parameters", 10**12),  # more than its bytes
        ("base_fingerprint", "0" * 63),
        ("base_fingerprint", "G" * 64),
        ("tokenizer_fingerprint", "A" * 64),
        ("dtype", "float8"),
        ("files", {"module.safetensors": "0" * 65}),
        ("files", {"module.safetensors": 7}),
        ("files", {"": "0" * 64}),
        ("files", {"..": "0" * 64}),
        ("files", {"../x": "0" * 64}),
        ("files", {"a\0": "0" * 64}),
        ("files", {"x" * 300: "0" * 64}),
        ("training", {"tokens": -1}),
        ("training", {"seconds": -0.5}),
        ("training", {"seed": 2**63}),
        ("training", {"run": "../../x"}),
        ("training", {"loss_after": "low"}),
        ("training", {"growth": [{"experts": [1]}]}),
        ("training", {"growth": [{"experts": [1, -2]}]}),
        ("training", {"growth": [{"experts": [1, 2], "evidence": {"vectors": -1}}]}),
        ("training", {"growth": {}}),
        ("training", {"pruned": {}}),
        ("training", {"probe": 7}),
    ],
)
def test_a_value_of_the_right_type_that_cannot_be_is_refused(store, key, value):
    path = manifest_of(store, "letters")
    edit(path, **{key: value})
    with pytest.raises(IntegrityError) as caught:
        store.load("letters", store.load_base())
    assert str(caught.value).startswith(f"{path}: ")
    assert key in str(caught.value)
    assert any(line.startswith(f"{path}: ") for line in store.verify())


def test_a_trained_routers_record_is_checked_too(store):
    good = {"created": "2026-01-01", "files": {"router.safetensors": "0" * 64}}
    path = store.path / "router.json"
    for wrong in (
        {"modules": {"letters": [0, 1]}},
        {"modules": {"letters": [1, -1]}},
        {"modules": {"letters": [1, 2**70]}},
        {"modules": {"letters": [1]}},
        {"modules": {"x" * 65: [1, 1]}},
        {"training": {"accuracy": 1.5}},
        {"training": {"accuracy": "good"}},
        {"training": {"heldout": -1}},
        {"training": {"samples": {"letters": "x"}}},
        {"training": {"settings": []}},
    ):
        path.write_text(json.dumps({**good, **wrong}))
        with pytest.raises(IntegrityError, match=next(iter(wrong))) as caught:
            read_manifest(path, RouterManifest)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", MODULES)
def test_every_key_of_a_kinds_config_has_a_type_and_bounds(store, name):
    """Refused when it is read, or when it is laid on a base that has no such layers."""
    path, base = manifest_of(store, name), store.load_base()
    content = json.loads(path.read_text())
    kind = kind_of(content["kind"])
    for key, value in keys_of(kind.Config, content["config"]):
        wrongs = [-1, 2**70, 2**40 + 1, "x", 1.5, {}] if value is None else wrong_values(value)
        for wrong in wrongs:
            if (name, key, wrong) in (("pools", "layers", None), ("adapted", "lora_alpha", None)):
                continue  # the middle one and twice the rank, which they are
            edit(path, config={**content["config"], key: wrong})
            with pytest.raises(IntegrityError) as caught:
                Store.open(store.path).load(name, base)
            text = str(caught.value)
            assert str(path.parent) in text
            assert "\n" not in text
            assert len(text) < 600


def test_no_kind_is_left_out_here(store):
    assert {store.module(name).kind for name in MODULES} == KINDS.keys()


# The fork


def test_a_fork_beyond_the_bases_layers_names_file_key_and_range(store):
    path = manifest_of(store, "letters")
    with Engine(store) as engine:  # its router was fitted before
        edit(path, fork=4)
        for ask in (
            lambda: engine.generate("abc", module="letters"),
            lambda: engine.logits(torch.tensor([[5]]), module="letters"),
            lambda: store.load("letters", engine.base),
        ):
            with pytest.raises(IntegrityError) as caught:
                ask()
            assert str(caught.value).startswith(f"{path}: fork is 4, on this base it is from 0 to 3; restore it")
    assert [line for line in store.verify() if "fork is 4" in line]
    with pytest.raises(IntegrityError, match="fork is 4"):
        Engine(store)


def test_a_fork_that_is_not_the_modules_own_is_refused(store):
    path = manifest_of(store, "letters")
    own = json.loads(path.read_text())["fork"]
    edit(path, fork=own - 1)
    with pytest.raises(IntegrityError, match=f"fork is {own - 1}, its config says {own}") as caught:
        store.load("letters", store.load_base())
    assert str(path) in str(caught.value)
    with Engine(store) as engine, pytest.raises(IntegrityError, match="fork"):
        engine.generate("abc", module="letters")


def test_a_fitted_router_of_other_forks_is_not_followed(store):
    load_router(store)
    files = store.router_files(ROUTER_FITTED)
    kept = files.read()
    assert kept is not None
    kept["forks"] = kept["forks"] + 1000
    files.write(kept)
    with pytest.raises(IntegrityError, match=ROUTER_FITTED):
        Engine(store)


# Sizes


@pytest.mark.parametrize("change", [1, -1, 10**9])
def test_bytes_that_are_not_those_of_the_weights_are_refused(store, change):
    path = manifest_of(store, "letters")
    found = json.loads(path.read_text())["bytes"]
    edit(path, bytes=found + change)
    assert [line for line in store.verify() if line.startswith(f"{path}: bytes is {found + change}")]
    with Engine(store) as engine, pytest.raises(IntegrityError, match="bytes"):
        engine.generate("abc", module="letters", max_new_tokens=1)


def test_parameters_that_the_weights_do_not_have_are_named(store):
    path = manifest_of(store, "letters")
    found = json.loads(path.read_text())
    edit(path, parameters=found["bytes"] // 2)
    assert [line for line in store.verify() if line.startswith(f"{path}: parameters is ")]


# What was kept for the router, where its hash says that it is whole


def put(store: Store, name: str, file: str, **changes: torch.Tensor | None) -> Path:
    """Changes tensors of a file that a manifest names, and its hash there."""
    folder = store.module(name).folder
    tensors = {k: v.clone() for k, v in read_tensors(folder / file).items()} | changes
    digest = write_tensors(folder / file, {k: v for k, v in tensors.items() if v is not None})
    manifest = json.loads((folder / "module.json").read_text())
    edit(folder / "module.json", files={**manifest["files"], file: digest})
    return folder / file


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("router.safetensors", {"count": torch.tensor([0])}),
        ("router.safetensors", {"count": torch.tensor([-5])}),
        ("router.safetensors", {"count": torch.tensor([5.0])}),
        ("router.safetensors", {"count": None}),
        ("router.safetensors", {"sum": torch.zeros(7, dtype=torch.int64)}),
        ("router.safetensors", {"heldout": torch.zeros(0, 32, dtype=torch.int16)}),
        ("router.safetensors", {"more": torch.zeros(1)}),
        ("router-vectors.safetensors", {"vectors": torch.zeros(3, 7, dtype=torch.int16)}),
        ("router-vectors.safetensors", {"vectors": torch.zeros(3, 32)}),
    ],
)
def test_evidence_that_is_none_is_refused(store, file, changes):
    path = put(store, "letters", file, **changes)
    with pytest.raises(IntegrityError) as caught:
        load_router(store, kind="gaussian")
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"lengths": torch.tensor([-1], dtype=torch.int32)},
        {"lengths": torch.tensor([3], dtype=torch.int32)},
        {"lengths": torch.tensor([1.0])},
        {"lengths": None},
        {"tokens": torch.tensor([-1.5])},
    ],
)
def test_kept_text_that_is_none_trains_no_router(store, changes):
    path = put(store, "letters", "samples.safetensors", **changes)
    for name in ("routed", "pools", "adapted"):
        store.remove(name)
    with pytest.raises(IntegrityError) as caught:
        train_router(store, RouterConfig(epochs=1), progress=False)
    assert str(caught.value).startswith(f"{path}: ")


# A training that was stopped or is recorded


@pytest.mark.parametrize(
    "settings",
    [
        None,
        [],
        {},
        {"epochs": "2"},
        {"epochs": -1},
        {"epochs": 1.5},
        {"seed": None},
        {"unknown": 1},
        {"batch_size": 2.5},
    ],
)
def test_a_router_that_does_not_say_how_it_was_trained_is_refused(store, settings):
    for name in ("routed", "pools", "adapted"):
        store.remove(name)
    train_router(store, RouterConfig(tokens=64, sequence_length=16, router_layers=1), progress=False)
    assert last_config(store).router_layers == 1
    path = store.path / "router" / "transformer" / "1" / "router.json"
    training = json.loads(path.read_text())["training"]
    if settings is None:
        del training["settings"]
        edit(path, training=training)
    elif settings != {}:
        whole = {**training["settings"], **settings} if isinstance(settings, dict) else settings
        edit(path, training={**training, "settings": whole})
    else:
        return
    with pytest.raises(IntegrityError) as caught:
        last_config(store)
    assert str(store.path) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 2**70}, {"step": -1}, {"step": 0}, {"step": "3"}, {"step": True}, {"step": 10**6},
        {"seconds": -1.0}, {"seconds": "x"}, {"seconds": None}, {"file": "../x"}, {"file": 7},
        {"sha256": "x"}, {"sha256": None}, {"more": 1},
    ],
)  # fmt: skip
def test_a_pointer_to_a_checkpoint_that_cannot_be_is_refused(tmp_path, changes):
    from growlm.training.loop import train

    parameter = torch.nn.Parameter(torch.zeros(2))
    settings = LearnConfig(checkpoint_seconds=0)

    def run() -> None:
        train({"p": parameter}, lambda step: [(parameter - step).square().sum()], 3, lambda step: 1, settings, 0.1,
              folder=tmp_path, resume_hint="")  # fmt: skip

    run()
    path = tmp_path / "checkpoint.json"
    found = json.loads(path.read_text())
    if isinstance(step := changes.get("step"), int) and step > 3:  # as if it were there
        changes = {**changes, "file": f"step-{step}.safetensors"}
        (tmp_path / found["file"]).rename(tmp_path / changes["file"])
    edit(path, **changes)
    with pytest.raises(IntegrityError, match="restore it, or use --restart") as caught:
        run()
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("evidence", [{}, {"vectors": 10**6, "heldout": 0, "samples": 0}, {"vectors": 1}])
def test_growth_that_counts_more_text_than_there_is_cannot_be_taken_back(store, evidence):
    base = store.load_base()
    path = manifest_of(store, "pools")
    vectors = {"router.safetensors": None, "router-vectors.safetensors": None}
    letters = store.module("letters")
    module = store.load("pools", base)
    files = {file: read_tensors(letters.folder / file) for file in vectors}
    store.commit("pools", module, store.module("pools").manifest.training, files)
    path = manifest_of(store, "pools")
    training = json.loads(path.read_text())["training"]
    training["growth"][-1]["evidence"] = evidence
    edit(path, training=training)
    with pytest.raises(IntegrityError, match="does not say how its pools have grown") as caught:
        take_back(store, "pools")
    assert str(path.parent) in str(caught.value)


def test_a_finished_run_whose_record_is_gone_is_named(store, tmp_path):
    """`learn` of the same once more tells what the manifest says; without it there is nothing to tell."""
    text = write_jsonl(
        tmp_path / "text.jsonl", [f"The tenant of room {n} pays {n * 7 % 90} crowns." for n in range(80)]
    )
    settings = LearnConfig(num_layers=1, sequence_length=16, batch_size=4, precision="float32", admit_anyway=True)
    learn(store, "law", [text], settings, progress=False)
    path = manifest_of(store, "law")
    training = json.loads(path.read_text())["training"]
    (store.path / "work" / f"law-{training['run'][:16]}").mkdir(parents=True)
    del training["tokens"]
    edit(path, training=training)
    with pytest.raises(IntegrityError, match="'tokens' is missing") as caught:
        learn(store, "law", [text], settings, progress=False)
    assert str(path) in str(caught.value)


# Settings of users, which go the same way


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 5000},
        {"kind": "experts", "num_experts": 10**6},
        {"kind": "experts", "expert_size": 2**40},
        {"kind": "peer", "top_k": 2**40},
        {"kind": "peer", "num_experts": 2**60},
        {"kind": "peer", "layers": "-1"},
    ],
)
def test_settings_beyond_the_bounds_are_a_clear_error(changes):
    with pytest.raises(ConfigError) as caught:
        LearnConfig(**changes)
    message, (*_, (name, value)) = str(caught.value), changes.items()
    assert message.startswith(f"{name} is {value}, expected at ") or name == "layers"
    assert "\n" not in message


# JSON


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"a": 1, "a": 2}', "'a' twice"),
        (b'{"b": {"a": 1, "a": 1}}', "'a' twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "1e999"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b"\xff", "utf-8"),
        ("{}".encode("utf-16"), "utf-8"),
        (b'{"a": "\\ud800"}', "utf-8"),
        (b"[" * 100_000, "deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "digits"),
        (b"", "line 1"),
        (b"{}{}", "line 1"),
    ],
)
def test_json_that_others_would_read_otherwise_is_refused(tmp_path, content, named):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=named) as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_json_is_read_as_it_is(tmp_path):
    content = {"a": [1, -2.5, "é😀", None, True, {}], "b": 2**70}
    path = tmp_path / "file.json"
    for ascii_only in (True, False):
        path.write_text(json.dumps(content, ensure_ascii=ascii_only), encoding="utf-8")
        assert read_json(path) == content


def test_remembered_hashes_that_are_none_are_forgotten(store):
    path = store.path / "cache" / "hashes.json"
    path.unlink()
    base = store.load_base()
    good = json.loads(path.read_text())
    for wrong in (None, 7, "x", ["x"]):
        path.write_text(json.dumps({key: [*mark, wrong] for key, (*mark, _) in good.items()}))
        assert store.load_base().fingerprint == base.fingerprint
        assert json.loads(path.read_text()) == good
    for spoilt in (b"[" * 100_000, b"\xff", b"[]"):
        path.write_bytes(spoilt)
        store.check_base()
