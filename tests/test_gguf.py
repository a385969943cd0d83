"""A GGUF file as a base: what it computes, which ids its text has, and what is said of a file that cannot be one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from disk import all_files, flip
from gguf_files import FAMILIES, byte_pairs, model_of, pieces, write_gguf
from growlm import cli
from growlm.base.checkpoint import resolve
from growlm.base.gguf_file import read_gguf
from growlm.engine import Engine
from growlm.engine.chat import Chat
from growlm.errors import BaseModelError, ConfigError, StoreError
from growlm.store import Store
from growlm.surgery.conversion import convert_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(1, 41).repeat(2, 1)  # longer than the window of those that slide
PLACE = "cache/base"  # where a store keeps what it makes of a file


def store_of(folder: Path, *arguments: Any, **changes: Any) -> Store:
    write_gguf(folder / "model.gguf", *arguments, **changes)
    return Store.create(folder / "store", folder / "model.gguf")


def tokenizer_of(folder: Path, tokenizer: dict[str, Any], family: str = "llama", **changes: Any) -> Any:
    return store_of(folder, family, tokenizer, **changes).load_tokenizer()


# What it computes


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_computes_what_the_model_computed(tmp_path, family):
    model = write_gguf(tmp_path / "model.gguf", family)
    base = Store.create(tmp_path / "store", tmp_path / "model.gguf").load_base()
    assert base.config.model_type == family
    assert torch.equal(base.logits(IDS), model(IDS).logits)


@pytest.mark.versions
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@torch.no_grad()
def test_it_computes_what_transformers_reads_of_the_file(tmp_path, family):
    pytest.importorskip("accelerate")  # which transformers needs for it
    store = store_of(tmp_path, family)
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ours = store.load_base().model.state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_1, Kind.F16], ids=lambda kind: kind.name)
@torch.no_grad()
def test_quantised_weights_are_those_that_can_be_read(tmp_path, kind):
    model = write_gguf(tmp_path / "model.gguf", "llama", kind=kind, intermediate_size=64)
    whole = model_of("llama", len(byte_pairs()["tokens"]), intermediate_size=64)
    base = Store.create(tmp_path / "store", tmp_path / "model.gguf").load_base()
    assert torch.equal(base.logits(IDS), model(IDS).logits)
    assert not torch.equal(base.logits(IDS), whole(IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_head_and_embedding_are_tied_where_the_file_has_one(tmp_path, tied):
    model = write_gguf(tmp_path / "model.gguf", "llama", tie_word_embeddings=tied)
    base = Store.create(tmp_path / "store", tmp_path / "model.gguf").load_base()
    assert (base.head_weight is base.embedding.weight) == tied
    assert torch.equal(base.logits(IDS), model(IDS).logits)


FINGERPRINTS = {
    "llama": (
        "27e51de74bd27fa3e2499c1deb2e7ec9551c5ce0473a63e00abb688e50d42443",
        "f832f333f165049dbaeea5e9596bffa7e5fb493d8b094d40de86b900b188a21a",
    ),
    "gemma3_text": (
        "1e2cd24031b11d6337935cb0efe645fea0a967b122719343a2b6fad326e2117e",
        "fed3d2c486c2e88cf40d9d1425b21207baff9aa663f78b316487e2e5d6b66d4a",
    ),
}


@pytest.mark.versions
@pytest.mark.parametrize("family", list(FINGERPRINTS))
@torch.no_grad()
def test_every_release_makes_the_same_folder_of_a_file(tmp_path, family):
    """Of weights that are the same on every machine; a change here makes every store of a GGUF file another one."""
    tokenizer = byte_pairs() if family == "llama" else pieces()
    model = write_gguf(tmp_path / "model.gguf", family, tokenizer, kind=Kind.Q8_0, intermediate_size=64)
    store = Store.create(tmp_path / "store", tmp_path / "model.gguf")
    assert torch.equal(store.load_base().logits(IDS), model(IDS).logits)
    assert (store.manifest.base_fingerprint, store.manifest.tokenizer_fingerprint) == FINGERPRINTS[family]


@pytest.mark.parametrize("factor", [8.0, 32.0])
@torch.no_grad()
def test_positions_stretched_as_llama_3_are(tmp_path, factor):
    """Which transformers' own reader leaves out."""
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = model_of("llama", len(byte_pairs()["tokens"]), rope_parameters=rope, head_dim=32)
    plain = 1 / 500_000.0 ** (torch.arange(0, 32, 2) / 32)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    assert factors.max() > 1.5
    write_gguf(
        tmp_path / "model.gguf", "llama", rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        head_dim=32, tensors={"rope_freqs.weight": factors},
    )  # fmt: skip
    base = Store.create(tmp_path / "store", tmp_path / "model.gguf").load_base()
    assert torch.equal(base.decoder.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert torch.equal(base.logits(IDS), model(IDS).logits)


def test_factors_of_positions_that_no_setting_gives_are_refused(tmp_path):
    with pytest.raises(BaseModelError, match=r"rope_freqs.weight stretches positions"):
        store_of(tmp_path, tensors={"rope_freqs.weight": np.float32([1.0, 1.5, 2.0, 8.0])})
    assert not (tmp_path / "store").exists()


# Which ids its text has


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("smollm", ["2", "0", "2", "4"]),
        ("gpt-2", ["2024"]),
        ("llama-bpe", ["202", "4"]),
        ("dbrx", ["202", "4"]),
        ("qwen2", ["2", "0", "2", "4"]),
    ],
)
def test_the_file_says_how_words_are_cut(tmp_path, pre, words):
    tokenizer = tokenizer_of(tmp_path, byte_pairs(pre))
    ids = tokenizer.encode("2024", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == words
    ids = tokenizer.encode(" the\n\n a", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["Ġthe", "ĊĊ", "Ġa"]


def test_a_word_that_is_a_token_is_that_token_for_llama_3(tmp_path):
    """Whether or not merges lead to it."""
    for pre, tokens in (("llama-bpe", ["xyz"]), ("dbrx", ["x", "y", "z"])):
        made = byte_pairs(pre)
        made["tokens"].append("xyz")
        made["token_type"].append(1)
        (tmp_path / pre).mkdir()
        tokenizer = tokenizer_of(tmp_path / pre, made)
        assert tokenizer.tokenize("xyz") == tokens


def test_pieces_are_merged_by_their_scores(tmp_path):
    tokenizer = tokenizer_of(tmp_path, pieces())
    assert tokenizer.tokenize("the cat and  an") == ["▁the", "▁cat", "▁and", "▁", "▁an"]
    assert tokenizer.tokenize("thing é") == ["▁t", "h", "ing", "▁", "<0xC3>", "<0xA9>"]
    # A sequence that stands in the text as it is.
    assert tokenizer.tokenize("a\n\nb\n") == ["▁a", "\n\n", "▁", "b", "<0x0A>"]


def test_text_begins_with_a_space_only_where_the_file_says_so(tmp_path):
    tokenizer = tokenizer_of(tmp_path, {**pieces(), "add_space_prefix": False})
    assert tokenizer.tokenize("the cat") == ["t", "he", "▁cat"]
    assert tokenizer.decode(tokenizer.encode("the cat", add_special_tokens=False)) == "the cat"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Any]:
    made = {"pieces": pieces(), "unprefixed": {**pieces(), "add_space_prefix": False}}
    made |= {pre: byte_pairs(pre) for pre in ("smollm", "gpt-2", "llama-bpe", "dbrx")}
    return {name: tokenizer_of(tmp_path_factory.mktemp(name), value) for name, value in made.items()}


@settings(max_examples=60)
@given(text=st.text() | st.text("the cat 2024\n\n\t'sé▲中🎉", max_size=60))
def test_what_is_written_as_ids_is_read_back(tokenizers, text):
    for name, tokenizer in tokenizers.items():
        if name in ("pieces", "unprefixed") and "▁" in text:
            continue  # which is how pieces spell a space
        if name == "pieces" and "\n\n" in text:
            continue  # a token; what comes after it begins with a space as the text does
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text, name


def test_control_tokens_are_special_and_those_of_the_user_are_not(tmp_path):
    tokenizer = tokenizer_of(tmp_path, byte_pairs())
    ids = tokenizer.encode("<|im_start|>a<tool>", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "a", "<tool>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<tool>"


CONVERSATION = [{"role": "user", "content": "a"}]


@pytest.mark.versions
@pytest.mark.parametrize(
    ("family", "made", "begins"),
    [
        ("llama", byte_pairs(), False),
        ("llama", byte_pairs("llama-bpe"), True),
        ("llama", {**byte_pairs("llama-bpe"), "add_bos_token": False}, False),
        ("llama", {**byte_pairs(), "add_bos_token": True}, True),
        ("qwen2", {**byte_pairs("qwen2"), "add_bos_token": True}, True),
        ("qwen2", byte_pairs("qwen2"), False),
        ("phi3", pieces(), True),
        ("gemma3_text", {**pieces(), "add_space_prefix": False}, True),
        ("gemma3_text", {**pieces(), "add_bos_token": False}, False),
    ],
)
def test_text_begins_as_the_file_says_and_a_conversation_as_its_template_says(tmp_path, family, made, begins):
    """Whatever class a release of transformers takes for the family."""
    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    store = store_of(tmp_path, family, {**made, "chat_template": template})
    tokenizer = store.load_tokenizer()
    start, a = made["bos_token_id"], tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer("")["input_ids"] == [start] * begins
    assert tokenizer("a")["input_ids"] == [start] * begins + a
    assert tokenizer.apply_chat_template(CONVERSATION, return_dict=False) == [start, *a]
    assert len(tokenizer) == len(made["tokens"])
    with Engine(store, memory="1GB") as engine:
        seen: list[Any] = []
        stream = engine.stream
        engine.stream = lambda prompt, **more: (seen.append(prompt), stream(prompt, **more))[1]  # type: ignore[method-assign]
        list(Chat(engine, None, max_new_tokens=1).say("a"))
    assert seen == [[start, *a]]


@pytest.mark.parametrize(
    ("made", "text", "ends"),
    [
        (pieces(), "</s>", [2, 4]),
        (byte_pairs(), "<|im_end|>", 2),
        ({**byte_pairs(), "eos_token_id": 0}, "<|endoftext|>", [0, 2]),  # known by its name
    ],
)
def test_the_end_of_a_turn_ends_an_answer_too(tmp_path, made, text, ends):
    store = store_of(tmp_path, "gemma3_text", made)
    assert json.loads((store.path / PLACE / "generation_config.json").read_text())["eos_token_id"] == ends
    assert store.load_tokenizer().eos_token == text
    assert store.load_base().config.eos_token_id == made["eos_token_id"]


# The file, and what was made of it


def test_a_store_remembers_its_file(tmp_path):
    store = store_of(tmp_path)
    assert store.manifest.base == "../model.gguf"
    assert store.manifest.dtype == "float32"
    assert store.verify() == []
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("model.gguf", "store"):
        (tmp_path / name).rename(moved / name)
    Store.open(moved / "store").load_base()


def test_a_file_that_has_changed_is_refused(tmp_path):
    store = store_of(tmp_path)
    write_gguf(tmp_path / "model.gguf", tokenizer=byte_pairs("gpt-2"))
    with pytest.raises(BaseModelError, match=r"model.gguf: not the file that .*store was made for") as caught:
        Store.open(store.path).load_base()
    assert "\n" not in str(caught.value)
    assert [line for line in store.verify() if "not the file that" in line]


def test_what_was_made_of_a_file_does_without_it(tmp_path):
    store = store_of(tmp_path)
    logits = store.load_base().logits(IDS)
    (tmp_path / "model.gguf").unlink()
    store = Store.open(store.path)
    assert torch.equal(store.load_base().logits(IDS), logits)
    assert store.verify() == []
    beside = store.beside(tmp_path / "beside")
    assert torch.equal(beside.load_base().logits(IDS), logits)
    shutil.rmtree(store.path / PLACE)
    with pytest.raises(BaseModelError, match=r"model.gguf: the base of .*store is not there"):
        Store.open(store.path).load_base()


@pytest.mark.parametrize("damage", ["folder", "model.safetensors", "config.json", "tokenizer.json", "flipped", "text"])
def test_what_was_made_of_a_file_is_made_again(tmp_path, damage):
    store = store_of(tmp_path)
    place = store.path / PLACE
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    if damage == "folder":
        shutil.rmtree(place)
    elif damage == "flipped":
        flip(place / "model.safetensors")
    elif damage == "text":
        (place / "config.json").write_text("{")
    else:
        (place / damage).unlink()
    Store.open(store.path).load_base()
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before


def test_what_was_made_of_a_file_is_refused_where_it_is_damaged_and_the_file_is_gone(tmp_path):
    store = store_of(tmp_path)
    flip(store.path / PLACE / "model.safetensors")
    (tmp_path / "model.gguf").unlink()
    with pytest.raises(BaseModelError, match="not the base that"):
        Store.open(store.path).load_base()


def test_a_file_becomes_a_checkpoint_folder(tmp_path):
    store = store_of(tmp_path)
    out, before, after = convert_checkpoint(tmp_path / "model.gguf", tmp_path / "out")
    assert (before, after) == ("gguf", "llama")
    other = Store.create(tmp_path / "other", out)
    assert other.manifest.base_gguf is None
    assert other.manifest.base_fingerprint == store.manifest.base_fingerprint
    assert other.manifest.tokenizer_fingerprint == store.manifest.tokenizer_fingerprint
    with pytest.raises(StoreError, match="exists already"):
        convert_checkpoint(tmp_path / "model.gguf", out)
    with pytest.raises(ConfigError, match="--to"):
        convert_checkpoint(tmp_path / "model.gguf", tmp_path / "out2", to="growlm")


def test_verbs_that_need_a_folder_say_how_to_get_one(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    with pytest.raises(BaseModelError, match=r'is a GGUF file; .*"growlm convert .*model.gguf FOLDER"'):
        resolve(tmp_path / "model.gguf")
    with pytest.raises(BaseModelError, match=r"none.gguf: no such file"):
        resolve(tmp_path / "none.gguf")
    with pytest.raises(BaseModelError, match=r"no config.json in it; .*or the GGUF file model.gguf"):
        resolve(tmp_path)


# What cannot be a base


def refused(tmp_path: Path, capsys: Any, path: Path) -> str:
    """The line that `growlm new` and `growlm convert` say, once it is known that they leave nothing."""
    lines = []
    before = all_files(tmp_path)
    for arguments in (["new", tmp_path / "deep" / "store", "--base", path], ["convert", path, tmp_path / "out"]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (1, "")
        assert err.count("\n") == 1
        assert err.startswith(f"growlm: {path}")
        assert all_files(tmp_path) == before
        assert not (tmp_path / "deep").exists()
        lines.append(err)
    assert lines[0] == lines[1]
    return lines[0]


def changed(**values: Any) -> dict[str, Any]:
    return {"values": {key.replace("__", "."): value for key, value in values.items()}}


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (changed(general__architecture="bloom"), "architecture 'bloom' is not supported as GGUF; supported are llama"),
        (changed(general__architecture="clip"), "a vision projector"),
        (changed(general__type="mmproj"), "a vision projector"),
        (changed(general__type="adapter"), "of type 'adapter', no model"),
        (changed(split__count=3, split__no=1), "part 2 of 3 of a split model"),
        (changed(llama__context_length=None), "llama.context_length is missing"),
        (changed(llama__block_count=0), "llama.block_count is 0"),
        (changed(llama__attention__head_count="four"), "llama.attention.head_count is 'four'"),
        (changed(llama__attention__head_count=[4, 4, 4]), "llama.attention.head_count is [4, 4, 4]"),
        (changed(llama__attention__head_count_kv=None), "llama.attention.head_count_kv is missing"),
        (changed(llama__attention__layer_norm_rms_epsilon=0.0), "expected a number between 0 and 1"),
        (changed(llama__rope__dimension_count=4, llama__attention__key_length=8), "expected the width of a head, 8"),
        (changed(llama__rope__scaling__type="yarn"), "llama.rope.scaling.type is 'yarn'"),
        ({"tokenizer": {}}, "no tokenizer in it"),
        ({"tokenizer": {**byte_pairs(), "model": "bert"}}, "a tokenizer of kind 'bert'"),
        ({"tokenizer": byte_pairs("tekken")}, "not known, 'tekken' (tokenizer.ggml.pre); known are gpt-2"),
        ({"tokenizer": {**byte_pairs(), "pre": None}}, "no word of how to cut words"),
        ({"tokenizer": {**byte_pairs(), "merges": ["a nothing"]}}, "tokenizer.ggml.merges has 'a nothing'"),
        ({"tokenizer": {**byte_pairs(), "eos_token_id": 9999}}, "tokenizer.ggml.eos_token_id is 9999"),
        ({"tokenizer": {**pieces(), "scores": [0.0]}}, "1 scores of them"),
        ({"tensors": {"output_norm.weight": None}}, "lacks the tensor output_norm.weight"),
        ({"tensors": {"token_embd.weight": None}}, "no tensor token_embd.weight"),
        ({"tensors": {"blk.0.ffn_gate_exps.weight": np.zeros((2, 4), np.float32)}}, "not read, blk.0.ffn_gate_exps"),
        ({"tensors": {"blk.1.attn_norm.weight": np.zeros(31, np.float32)}}, "blk.1.attn_norm.weight has shape (31,)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_no_base_is_one_line(tmp_path, capsys, made, told):
    path = tmp_path / "model.gguf"
    write_gguf(path, **made)
    assert told in refused(tmp_path, capsys, path)


def test_a_file_that_is_cut_is_one_line_wherever_it_is_cut(tmp_path, capsys):
    whole = tmp_path / "whole"
    write_gguf(whole)
    content = whole.read_bytes()
    whole.unlink()
    path = tmp_path / "model.gguf"
    for size in (4, 7, 20, 30, 200, 3000, len(content) // 4, len(content) // 2, len(content) - 200):
        path.write_bytes(content[:size])
        assert "cut short" in refused(tmp_path, capsys, path), size
    for other in (b"", b"GG", b"PK\3\4 a zip archive"):
        path.write_bytes(other)
        assert "not a GGUF file" in refused(tmp_path, capsys, path)


@pytest.mark.parametrize(("version", "told"), [(1, "of version 1"), (3 << 24, "of the other byte order")])
def test_versions_that_are_not_known_are_refused(tmp_path, version, told):
    write_gguf(tmp_path / "model.gguf")
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    content[4:8] = version.to_bytes(4, "little")
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(BaseModelError, match=told):
        read_gguf(tmp_path / "model.gguf")


@pytest.fixture(scope="module")
def header(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("header") / "model.gguf"
    write_gguf(path, num_hidden_layers=1)
    return path


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_are_more_than_one_line(header, tmp_path, data):
    content = bytearray(header.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, 400) | st.integers(4, len(content) - 8))
        content[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8) | st.just(b"\xff" * 8))
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    message = str(path)
    try:
        read_gguf(path)
    except BaseModelError as error:
        message = str(error)
    assert message.startswith(str(path))
    assert "\n" not in message
