"""Whatever a JSON file of a base or a store holds, every verb works or says in one line which file is wrong."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disk import edit, write_jsonl
from growlm.base.checkpoint import load_model, load_tokenizer, read_config
from growlm.disk.tensors import read_tensors
from growlm.engine import Engine
from growlm.engine.chat import Chat
from growlm.errors import BaseModelError, GrowlmError, GrowlmWarning
from growlm.modules.peer import Peer, PeerConfig
from growlm.store import Store
from growlm.training.config import GrowConfig, LearnConfig, PretrainConfig, RouterConfig
from growlm.training.grow import grow
from growlm.training.learn import learn
from growlm.training.pretrain import pretrain
from growlm.training.router import describe_router, train_router
from mutations import mutated, rewritten
from stores import add_experts, add_module, make_store, save_lively_base
from tiny import VOCAB, perturb, save_base

BASE_FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
]  # fmt: skip
STORE_FILES = [
    "store.json", "modules/letters/1/module.json", "modules/routed/1/module.json", "modules/pools/1/module.json",
    "modules/pools/2/module.json", "router/general/1/router.json", "router/transformer/1/router.json",
]  # fmt: skip
LEARN = LearnConfig(num_layers=1, sequence_length=16, batch_size=4, precision="float32", tokens=64, admit_anyway=True)
_new = itertools.count()

pytestmark = pytest.mark.usefixtures("one_thread")
fuzzed = settings(
    max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A base with every JSON file that one may have, a store for it, and a store with modules of every kind."""
    home = tmp_path_factory.mktemp("made")
    base = save_lively_base(home / "base")
    (base / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    (base / "added_tokens.json").write_text('{"<|endoftext|>": 0}')
    (base / "generation_config.json").write_text('{"eos_token_id": [0, 1], "do_sample": true, "temperature": 0.6}')
    write_jsonl(home / "text.jsonl", [f"The tenant of room {n} pays {n * 7 % 90} crowns." for n in range(80)])
    write_jsonl(base / "heldout.jsonl", [f"Drug {n} inhibits enzyme {n * 5 % 31}." for n in range(40)])
    Store.create(home / "plain", base)
    (home / "full").mkdir()
    store = make_store(home / "full", modules={"letters": {}}, keep_samples=1000)
    train_router(store, RouterConfig(tokens=64, sequence_length=16, router_layers=1), progress=False)
    loaded = store.load_base()
    add_experts(store, loaded, "routed", 3, domain="signs")
    pools = Peer.create(loaded, PeerConfig(num_experts=16, num_heads=1, top_k=2), torch.arange(20, 300))
    pools.enable_new_experts()
    folder = store.module("letters").folder
    files = {p.name: read_tensors(p) for p in folder.glob("router*.safetensors")}
    store.commit("pools", perturb(pools, 4), {"tokens": 5, "seed": 0}, files)
    grow(store, "pools", 4, config=GrowConfig())
    return home


def works_or_says_why(path: Path, *verbs: Callable[[], Any]) -> None:
    for verb in verbs:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", GrowlmWarning)
                verb()
        except GrowlmError as error:
            text = str(error)
            assert "\n" not in text
            assert len(text) < 1500
            # Of several files together, as config and weights, the folder is named.
            assert path.name in text or str(path.parent) in text or f"/{path.parent.name}: " in text


def ask(store: Path, module: Any = "auto", **options: Any) -> None:
    with Engine(Store.open(store), **options) as engine:
        engine.generate("abc de", module=module, max_new_tokens=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASE_FILES)
@fuzzed
@given(data=st.data())
def test_a_base_with_any_value_in_its_files_works_or_is_refused_by_name(made, name, data):
    path, new = made / "base" / name, made / f"new{next(_new)}"
    before = rewritten(path, data.draw(mutated(path.read_bytes())))

    def made_and_asked() -> None:
        Store.create(new, made / "base")
        ask(new)

    verbs = [
        made_and_asked,
        lambda: ask(made / "plain"),
        lambda: Store.open(made / "plain").status(),
        lambda: Store.open(made / "plain").verify(),
    ]
    try:
        works_or_says_why(path, verbs[0], verbs[1 + next(_new) % 3])
    finally:
        path.write_bytes(before)


@fuzzed
@given(data=st.data())
def test_a_store_with_any_value_in_its_files_works_or_is_refused_by_name(made, data):
    store = made / "full" / "store"
    path = store / data.draw(st.sampled_from(STORE_FILES))
    before = rewritten(path, data.draw(mutated(path.read_bytes())))
    verbs = [
        lambda: ask(store),
        lambda: ask(store, "letters"),
        lambda: ask(store, "routed"),
        lambda: ask(store, "pools", experts_on="disk"),
        lambda: ask(store, router="transformer"),
        lambda: describe_router(Store.open(store)),
        lambda: Store.open(store).verify(),
    ]
    try:
        works_or_says_why(path, lambda: Store.open(store).status(), verbs[next(_new) % len(verbs)])
    finally:
        path.write_bytes(before)


# What was found, and the like of it, one by one


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", []),
        ("model_type", {"a": 1}),
        ("model_type", None),
        ("num_hidden_layers", "3"),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 2**70),  # of which transformers makes a list
        ("num_hidden_layers", 60_000),
        ("num_labels", 2**40),  # of which it makes a table
        ("hidden_size", -1),
        ("hidden_size", 2**70),
        ("hidden_size", 1.5),
        ("vocab_size", None),
        ("vocab_size", True),
        ("num_attention_heads", 0),
        ("num_key_value_heads", -2),
        ("max_position_embeddings", -1),
        ("max_position_embeddings", "x"),
        ("max_position_embeddings", 2**70),
        ("intermediate_size", []),
        ("head_dim", 0),
        ("rope_parameters", 7),
        ("rope_parameters", {"rope_type": "yarn"}),
        ("rope_parameters", {"rope_theta": 2**70}),
        ("layer_types", {}),
        ("layer_types", ["full_attention"]),
        ("layer_types", ["full_attention", "sideways", "full_attention"]),
        ("eos_token_id", "x"),
        ("eos_token_id", VOCAB),
        ("eos_token_id", -1),
        ("eos_token_id", [0, VOCAB]),
        ("eos_token_id", True),
        ("sliding_window", "a"),
        ("sliding_window", -1),
        ("final_logit_softcapping", "x"),
        ("final_logit_softcapping", -1.0),
        ("tie_word_embeddings", "yes"),
        ("hidden_act", 5),
        ("attention_bias", 3),
        ("rms_norm_eps", "x"),
        ("to_dict", 5),
        ("__class__", 5),
    ],
)
def test_a_setting_that_cannot_be_names_file_and_key(home, key, value):
    path = home / "base" / "config.json"
    edit(path, **{key: value})
    for verb in (lambda: Store.create(home / "new", home / "base"), lambda: load_model(home / "base", "float32")):
        with pytest.raises(BaseModelError) as caught:
            verb()
        text = str(caught.value)
        assert str(path) in text
        assert "\n" not in text
        shown = {"model_type": "model family", ("num_hidden_layers", 60_000): "60000 layers"}
        assert shown.get(key, shown.get((key, value) if isinstance(value, int) else None, key)) in text
    assert not (home / "new").exists()


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("gpt2", "n_layer", 2**70),
        ("gpt2", "n_layer", 10**9),
        ("gpt2", "n_layer", 0),
        ("gpt2", "n_head", "4"),
        ("gpt2", "n_positions", 2**70),
        ("qwen2", "num_hidden_layers", 2**70),
        ("gemma2", "sliding_window", "a"),
        ("gemma2", "layer_types", ["full_attention"] * 3),
        ("mistral", "sliding_window", -3),
        ("smollm3", "no_rope_layers", 5),
        ("phi3", "num_key_value_heads", "x"),
        ("growlm", "num_experts", [2**70]),
        ("growlm", "attention", {}),
    ],
)
def test_settings_of_other_families_are_checked_under_their_own_names(tmp_path, family, key, value):
    save_base(tmp_path, family)
    edit(tmp_path / "config.json", **{key: value})
    with pytest.raises(BaseModelError, match=key) as caught:
        Store.create(tmp_path / "new", tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size"])
def test_sizes_that_the_weights_do_not_have_are_refused_before_memory_is_taken(tmp_path, key):
    """Nothing of this size could be made here."""
    save_base(tmp_path)
    edit(tmp_path / "config.json", **{key: 2**40})
    with pytest.raises(BaseModelError, match="its config asks for"):
        load_model(tmp_path, "float32")


@pytest.mark.parametrize("ends", ["x", VOCAB, -1, [0, -1], [0, "x"], [None], {}, 1.0, True, 2**70])
def test_an_end_of_text_that_is_no_token_of_the_base_is_refused(home, ends):
    path = home / "base" / "generation_config.json"
    edit(path, eos_token_id=ends)
    for verb in (
        lambda: Store.create(home / "new", home / "base"),
        lambda: Engine(Store.open(home / "plain")),
    ):
        with pytest.raises(BaseModelError, match="eos_token_id") as caught:
            verb()
        assert str(caught.value).startswith(f"{home / 'base' / path.name}") or path.name in str(caught.value)


@pytest.mark.parametrize("ends", [None, 3, [0, 3], []])
def test_an_end_of_text_that_is_a_token_ends_answers(home, ends):
    edit(home / "base" / "generation_config.json", eos_token_id=ends)
    with Engine(Store.open(home / "plain")) as engine:
        wanted = {0} | set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        assert engine._loop.writer.end_tokens == wanted


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tokenizer_config.json", {"model_max_length": "x"}),
        ("tokenizer_config.json", {"added_tokens_decoder": 7}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": 7}}),
        ("tokenizer_config.json", {"chat_template": 7}),
        ("tokenizer_config.json", {"tokenizer_class": 7}),
        ("tokenizer_config.json", {"bos_token": []}),
        ("tokenizer.json", {"model": 7}),
        ("tokenizer.json", {"added_tokens": {}}),
        ("tokenizer.json", {"decoder": {"type": "nope"}}),
        ("special_tokens_map.json", {"eos_token": 7}),
    ],
)
def test_a_tokenizer_file_with_a_value_of_another_type_is_named(home, name, changes):
    edit(home / "base" / name, **changes)
    with pytest.raises(BaseModelError) as caught:
        load_tokenizer(home / "base")
    assert str(caught.value).startswith(f"{home / 'base' / name}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BASE_FILES)
@pytest.mark.parametrize(
    "content", [b"[]", b"null", b"\xff", b"\xef\xbb\xbf{}", b'{"a": 1, "a": 2}', b"[" * 100_000, b'{"a": NaN}', b""],
    ids=lambda c: repr(c[:8]),
)  # fmt: skip
def test_a_file_that_is_no_json_object_is_named(home, name, content):
    (home / "base" / name).write_bytes(content)
    if name == "tokenizer.json" and content == b'{"a": 1, "a": 2}':
        return  # its own reader says that a key is missing
    with pytest.raises(BaseModelError) as caught:
        Store.create(home / "new", home / "base")
    assert str(caught.value).startswith(f"{home / 'base' / name}: ")
    assert "\n" not in str(caught.value)


def test_a_chat_template_that_cannot_write_is_one_line(home):
    edit(home / "base" / "tokenizer_config.json", chat_template="{{ raise_exception('roles\nmust alternate') }}")
    store = Store.create(home / "new", home / "base")
    with Engine(store) as engine, pytest.raises(BaseModelError, match="roles must alternate") as caught:
        list(Chat(engine, None, max_new_tokens=2).say("abc"))
    assert "\n" not in str(caught.value)


def test_a_header_of_weights_with_values_of_another_type_is_refused(home):
    path = home / "base" / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = next(n for n in header if n != "__metadata__")
    for change in ({"shape": ["x"]}, {"shape": [-1]}, {"shape": 7}, {"dtype": 7}, {"data_offsets": ["a", "b"]}, None):
        changed = {**header, name: change if change is None else {**header[name], **change}}
        text = json.dumps(changed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
        with pytest.raises(BaseModelError, match="not a safetensors file") as caught:
            Store.create(home / "new", home / "base")
        assert str(caught.value).startswith(f"{path}: ")


def test_a_config_to_pretrain_by_is_checked_as_well(home):
    path = home / "base" / "config.json"
    edit(path, num_hidden_layers=2**70)
    with pytest.raises(BaseModelError, match="num_hidden_layers"):
        pretrain(home / "out", [home / "text.jsonl"], PretrainConfig(config=str(path)), progress=False)


def test_a_base_as_it_was_works_in_all_of_this(home):
    store = Store.create(home / "new", home / "base")
    assert read_config(home / "base").num_hidden_layers == 3
    learn(store, "law", [home / "text.jsonl"], LEARN, progress=False)
    ask(home / "new", "law")
    assert store.verify() == []
    full = home / "full" / "store"
    for module in ("auto", "letters", "routed", "pools"):
        ask(full, module)
    add_module(Store.open(full), Store.open(full).load_base(), "digits", 2)
    assert Store.open(full).verify() == []
