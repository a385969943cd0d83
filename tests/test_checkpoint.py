"""Checkpoint: a base on disk is counted as it is loaded, found at its revision, and read from its own folder only."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from growlm.base import Base
from growlm.base.checkpoint import (
    check,
    fingerprint,
    hub_revision,
    load_model,
    loaded_bytes,
    num_parameters,
    resolve,
    weight_files,
)
from growlm.errors import BaseModelError
from tiny import FAMILIES, make_model, save_base

pytestmark = pytest.mark.usefixtures("one_thread")


def store_also(folder: Path, **tensors: torch.Tensor) -> None:
    """Adds tensors to a checkpoint's file; `a__b` is named `a.b`."""
    path = folder / "model.safetensors"
    more = {name.replace("__", "."): t.clone() for name, t in tensors.items()}
    save_file({**load_file(path), **more}, path, metadata={"format": "pt"})


def as_loaded(folder: Path, dtype: str) -> tuple[int, int]:
    base = Base(load_model(folder, dtype))
    return base.num_bytes(), base.num_parameters()


# Bytes and parameters


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_counted_is_what_is_loaded(tmp_path, family, tied):
    save_base(tmp_path, family, tie_word_embeddings=tied)
    for dtype in ("float32", "bfloat16", "float16"):
        assert (loaded_bytes(tmp_path, dtype), num_parameters(tmp_path)) == as_loaded(tmp_path, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "name"), [("qwen2", "model.embed_tokens"), ("gpt2", "transformer.wte")])
def test_a_tied_head_that_is_stored_too_counts_once(tmp_path, family, name, dtype):
    save_base(tmp_path, family)
    before = as_loaded(tmp_path, dtype)
    store_also(tmp_path, lm_head__weight=load_file(tmp_path / "model.safetensors")[f"{name}.weight"])
    assert (loaded_bytes(tmp_path, dtype), num_parameters(tmp_path)) == before == as_loaded(tmp_path, dtype)


def test_a_head_that_is_stored_with_other_values_is_not_tied_and_counts(tmp_path):
    save_base(tmp_path, "qwen2")
    before = num_parameters(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    other = stored.clone()
    other[-1, -1] += 1
    store_also(tmp_path, lm_head__weight=other)
    assert num_parameters(tmp_path) == before + other.numel()
    for dtype in ("float32", "bfloat16"):
        assert (loaded_bytes(tmp_path, dtype), num_parameters(tmp_path)) == as_loaded(tmp_path, dtype)
    # A difference that the dtype cannot hold is none.
    store_also(tmp_path, lm_head__weight=stored * (1 + 1e-7))
    for dtype in ("float32", "bfloat16"):
        assert loaded_bytes(tmp_path, dtype) == as_loaded(tmp_path, dtype)[0]


def test_a_head_in_another_file_than_the_embedding_it_is_tied_to(tmp_path):
    make_model("qwen2").save_pretrained(tmp_path, max_shard_size="45kB")
    before = num_parameters(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = tmp_path / content["weight_map"]["model.embed_tokens.weight"]
    save_file({"lm_head.weight": load_file(file)["model.embed_tokens.weight"]}, tmp_path / "head.safetensors")
    content["weight_map"]["lm_head.weight"] = "head.safetensors"
    index.write_text(json.dumps(content))
    assert num_parameters(tmp_path) == before
    save_file({"lm_head.weight": torch.randn(320, 32)}, tmp_path / "head.safetensors")
    assert num_parameters(tmp_path) == before + 320 * 32
    assert loaded_bytes(tmp_path, "float32") == as_loaded(tmp_path, "float32")[0]


def test_masks_that_old_files_hold_are_not_counted(tmp_path):
    save_base(tmp_path, "gpt2")
    before = as_loaded(tmp_path, "float32")
    weights = load_file(tmp_path / "model.safetensors")
    # As the first files of this family are written: without a prefix, and with each layer's mask.
    old = {name.removeprefix("transformer."): t for name, t in weights.items()}
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256).tril() for i in range(3)}
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert (loaded_bytes(tmp_path, "float32"), num_parameters(tmp_path)) == before == as_loaded(tmp_path, "float32")


def test_missing_and_malformed_weights_are_refused(tmp_path):
    save_base(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for spoilt in (b"", content[:100], b"\xff" * 100, b"\x02" + bytes(7) + b"[]" + bytes(100)):
        path.write_bytes(spoilt)
        for count in (num_parameters, lambda folder: loaded_bytes(folder, "float32")):
            with pytest.raises(BaseModelError, match=r"model\.safetensors") as caught:
                count(tmp_path)
            assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(BaseModelError, match="is missing"):
        loaded_bytes(tmp_path, "float32")


# Files


@pytest.mark.parametrize(
    "name",
    ["../other/model.safetensors", "/etc/passwd", "part/model.safetensors", "..", "", ".", None, 3, ["a"], "a\0b"],
)
def test_an_index_names_files_beside_it_and_no_others(tmp_path, name):
    """transformers takes the path as it is written: what is hashed and what is loaded would not be the same."""
    folder = tmp_path / "base"
    save_base(folder)
    save_base(tmp_path / "other")
    (folder / "part").mkdir()
    (folder / "model.safetensors").rename(folder / "whole.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "whole.safetensors", "b": "whole.safetensors"}}))
    assert weight_files(folder) == [folder / "whole.safetensors"]
    index.write_text(json.dumps({"weight_map": {"a": "whole.safetensors", "b": name}}))
    for read in (weight_files, fingerprint):
        with pytest.raises(BaseModelError, match=r"index\.json") as caught:
            read(folder)
        assert "\n" not in str(caught.value)


# The hub


@pytest.fixture
def asked(tmp_path, monkeypatch) -> list[str | None]:
    """The revisions that the hub was asked for; it has what is in `snapshots/<revision>`, and main is abc123."""
    revisions: list[str | None] = []

    def download(repository: str, *, revision: str | None = None, **options: object) -> str:
        assert repository == "owner/name"
        revisions.append(revision)
        folder = tmp_path / "snapshots" / (revision or "abc123")
        if not folder.is_dir():
            raise FileNotFoundError(f"no revision {revision}\nsecond line")
        return str(folder)

    (tmp_path / "snapshots" / "abc123").mkdir(parents=True)
    (tmp_path / "snapshots" / "def456").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return revisions


def test_a_base_of_the_hub_is_found_at_its_revision(tmp_path, asked):
    assert resolve("owner/name") == tmp_path / "snapshots" / "abc123"
    assert resolve("owner/name", revision="def456") == tmp_path / "snapshots" / "def456"
    assert asked == [None, "def456"]
    with pytest.raises(BaseModelError, match="did not give revision gone ") as caught:
        resolve("owner/name", revision="gone")
    assert "\n" not in str(caught.value)


def test_the_revision_of_what_the_hub_gave_is_known(tmp_path, asked):
    assert hub_revision(resolve("owner/name")) == "abc123"
    assert hub_revision(resolve(save_base(tmp_path / "base"))) is None
    assert asked == [None]


def test_a_folder_has_no_revision(tmp_path, asked):
    folder = save_base(tmp_path / "base")
    assert resolve(folder, revision="def456") == folder
    assert asked == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_every_family_is_found_whole(tmp_path, family):
    """Also where the names in the file are not the model's, as `embed_out` of gpt_neox."""
    save_base(tmp_path, family)
    check(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    missing = next(name for name in stored if "norm" in name or "ln_" in name)
    del stored[missing]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="its weights lack"):
        check(tmp_path)
