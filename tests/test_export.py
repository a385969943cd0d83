"""Export: base and module as one ordinary checkpoint, which transformers reads without any code of ours."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from disk import all_files
from growlm.base import Base
from growlm.errors import StoreError, UnknownModuleError
from growlm.modules import KnowledgeModule, ModuleSet, kind_of
from growlm.store import Store
from growlm.surgery.export import export, merge
from tiny import FAMILIES, TEXT, VOCAB, WINDOW, make_base, make_tokenizer, perturb, random_ids, save_base

PLACEMENTS = ["top", "interleaved"]
VOCABULARIES = ["none", "head", "both"]
ROW_IDS = torch.arange(1, VOCAB, 3)
LONG = 2 * WINDOW + 1


@functools.cache
def base_of(family: str) -> Base:
    return make_base(family)


def make_module(base: Base, placement: str, vocabulary: str) -> KnowledgeModule:
    """A module that has learned something."""
    kind = kind_of("blocks")
    config = kind.Config(num_layers=2, placement=placement, vocabulary=vocabulary)
    return perturb(kind.create(base, config, None if vocabulary == "none" else ROW_IDS), 1)


@torch.no_grad()
def reload(folder: Path, input_ids: Tensor) -> tuple[AutoModelForCausalLM, Tensor]:
    """The checkpoint as any user of transformers reads it; every weight from the file, none left over."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[keys], keys
    return model, model.eval()(input_ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_checkpoint_computes_what_base_and_module_do(family, placement, vocabulary, tmp_path):
    base = base_of(family)
    module = make_module(base, placement, vocabulary)
    input_ids = random_ids(2, LONG)
    modules = ModuleSet(base, [module])
    with torch.no_grad():
        wanted = modules.logits(input_ids)
        assert (wanted - base.logits(input_ids)).abs().max() > 1e-2
    merge(make_base(family), module).save_pretrained(tmp_path)

    model, logits = reload(tmp_path, input_ids)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    assert model.config.model_type == family
    assert model.config.num_hidden_layers == len(modules.layers)

    # The deeper model's own cache knows its layers; and it can be a base in turn.
    out = model.generate(input_ids, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
    assert torch.equal(out[:, LONG], wanted[:, -1, 1:].argmax(-1) + 1)
    with torch.no_grad():
        assert torch.equal(Base(model).logits(input_ids), logits)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2"])
def test_tied_weights_stay_tied_only_while_they_are_the_same(family, vocabulary):
    model = merge(make_base(family), make_module(base_of(family), "top", vocabulary))
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == (vocabulary == "none")
    assert model.config.tie_word_embeddings == (vocabulary == "none")
    assert torch.equal(embedding, base_of(family).embedding.weight) == (vocabulary != "both")


# Out of a store


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store.create(tmp_path / "brain", save_base(tmp_path / "base"))
    base = store.load_base()
    store.commit("law", make_module(base, "interleaved", "both"), {})
    store.commit("empty", kind_of("blocks").create(base, kind_of("blocks").Config(num_layers=1)), {})
    return store


def contents(folder: Path) -> dict[str, bytes]:
    """Every file except what is only remembered."""
    return {k: v for k, v in all_files(folder).items() if "cache" not in Path(k).parts}


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_export_from_a_store_loads_with_transformers_alone(family, tmp_path):
    store = Store.create(tmp_path / "brain", save_base(tmp_path / "base", family))
    base = store.load_base()
    store.commit("law", make_module(base, "interleaved", "both"), {})
    out = export(store, tmp_path / "out", "law")
    assert out == tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer(TEXT[0]).input_ids == make_tokenizer()(TEXT[0]).input_ids
    input_ids = torch.tensor([tokenizer(TEXT[0]).input_ids])
    with torch.no_grad():
        wanted = ModuleSet(base, [store.load("law", base)]).logits(input_ids)
    torch.testing.assert_close(reload(out, input_ids)[1], wanted, atol=1e-5, rtol=1e-5)


def test_export_in_bfloat16(tmp_path):
    store = Store.create(tmp_path / "brain", save_base(tmp_path / "base"), dtype="bfloat16")
    base = store.load_base()
    store.commit("law", make_module(base, "top", "both"), {})
    out = export(store, tmp_path / "out", "law")
    input_ids = random_ids(2, LONG)
    with torch.no_grad():
        wanted = ModuleSet(base, [store.load("law", base)]).logits(input_ids)
    model, logits = reload(out, input_ids)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits, wanted, atol=0.03, rtol=0.03)


def test_a_module_that_learned_nothing_exports_as_the_base(store, tmp_path):
    input_ids = random_ids(2, LONG)
    with torch.no_grad():
        wanted = store.load_base().logits(input_ids)
    assert torch.equal(reload(export(store, tmp_path / "out", "empty"), input_ids)[1], wanted)


def test_export_of_an_older_version(store, tmp_path):
    base = store.load_base()
    store.commit("law", make_module(base, "top", "none"), {})
    assert store.modules["law"].version == 2
    input_ids = random_ids(1, 9)
    for version in (1, 2):
        out = export(store, tmp_path / str(version), "law", version=version)
        with torch.no_grad():
            wanted = ModuleSet(base, [store.load("law", base, version=version)]).logits(input_ids)
        torch.testing.assert_close(reload(out, input_ids)[1], wanted, atol=1e-5, rtol=1e-5)


def test_export_leaves_store_and_base_byte_identical(store, tmp_path):
    before = contents(tmp_path)
    export(store, tmp_path / "out", "law")
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert all(Path(name).parts[0] == "out" for name in after.keys() - before.keys())
    assert {path.name for path in tmp_path.iterdir()} == {"base", "brain", "out"}


def test_export_holds_safe_files_only(store, tmp_path):
    out = export(store, tmp_path / "out", "law")
    assert {path.suffix for path in out.iterdir()} <= {".json", ".safetensors", ".jinja", ".txt"}
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 5


def test_an_empty_folder_may_be_given(store, tmp_path):
    (tmp_path / "out").mkdir()
    export(store, tmp_path / "out", "law")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("as_file", [False, True])
def test_export_over_something_is_refused(store, tmp_path, as_file):
    out = tmp_path / "out"
    kept = out if as_file else out / "kept.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(StoreError, match="exists already"):
        export(store, out, "law")
    assert kept.read_text() == "mine"
    assert as_file or [path.name for path in out.iterdir()] == ["kept.txt"]


def test_export_of_an_unknown_module_is_refused_and_writes_nothing(store, tmp_path):
    with pytest.raises(UnknownModuleError, match="'laws'"):
        export(store, tmp_path / "out", "laws")
    assert not (tmp_path / "out").exists()


def test_an_export_that_fails_leaves_nothing(store, tmp_path, monkeypatch):
    before = {path.name for path in tmp_path.iterdir()}

    def fail(self):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Store, "load_tokenizer", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        export(store, tmp_path / "out", "law")
    assert {path.name for path in tmp_path.iterdir()} == before
