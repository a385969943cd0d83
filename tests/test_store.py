"""Store: modules stay apart, run on their own base only, survive a kill at any instant, and are never unpickled."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from disk import all_files, edit, flip, largest_file
from growlm.base import Base
from growlm.disk import files
from growlm.disk.tensors import read_tensors
from growlm.errors import BaseModelError, GrowlmError, IntegrityError, StoreError, UnknownModuleError
from growlm.modules import ModuleSet
from growlm.modules.blocks import Blocks, BlocksConfig
from growlm.store import Store, StoredModule, check_name
from interruptions import exit_code, forked, in_new_process, kill_everywhere
from tiny import make_model, make_tokenizer, perturb, random_ids, save_base

IDS = random_ids(2, 9)
TRAINING = {"tokens": 123, "seed": 0}


def make_module(base: Base, seed: int) -> Blocks:
    return perturb(Blocks.create(base, BlocksConfig(num_layers=1), torch.arange(7, 12)), seed)


def make_evidence(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randint(-999, 999, (n, 32), generator=generator).short() for k, n in (("vectors", 6), ("x", 2))}


def commit(store: Store, name: str, base: Base, seed: int) -> StoredModule:
    return store.commit(name, make_module(base, seed), TRAINING, {"router.safetensors": make_evidence(seed)})


def put_general(store: Store, seed: int) -> None:
    with store.lock():
        store.router_files("general").write(make_evidence(seed))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A base, and a store that holds modules `a` and `law`, and general text."""
    home = tmp_path_factory.mktemp("made")
    store = Store.create(home / "store", save_base(home / "base"))
    base = store.load_base()
    commit(store, "a", base, 1)
    commit(store, "law", base, 2)
    put_general(store, 3)
    return home


@pytest.fixture(scope="module")
def base(made) -> Base:
    return Store.open(made / "store").load_base()


def contents(folder: Path) -> dict[str, bytes]:
    """What counts in a store: all but its lock, its memory of hashes and what is being written."""
    return {k: v for k, v in all_files(folder).items() if k.split("/")[0] not in ("lock", "cache", "scratch")}


def logits_of(store: Store, *names: str) -> torch.Tensor:
    base = store.load_base()
    return ModuleSet(base, [store.load(name, base) for name in names]).logits(IDS)


# Saving and loading


def test_a_module_comes_back_with_the_same_bits(store, base):
    module = make_module(base, 5)
    stored = commit(store, "b", base, 5)
    assert (stored.name, stored.version, stored.kind) == ("b", 1, "blocks")
    loaded = Store.open(store.path).load("b", base)
    wanted, found = module.state_dict(), loaded.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[k], found[k]) for k in wanted)
    assert torch.equal(ModuleSet(base, [loaded]).logits(IDS), ModuleSet(base, [module]).logits(IDS))
    assert not torch.equal(ModuleSet(base, [loaded]).logits(IDS), base.logits(IDS))


def test_the_manifest_says_what_the_module_is(store, base):
    stored = commit(store, "b", base, 5)
    manifest, module = stored.manifest, make_module(base, 5)
    assert manifest.training == TRAINING
    assert manifest.parameters == stored.parameters == module.num_parameters()
    assert manifest.bytes == stored.bytes == module.num_bytes()
    assert manifest.base_fingerprint == store.manifest.base_fingerprint
    assert set(manifest.files) == {"module.safetensors", "router.safetensors"}
    assert manifest.config["num_layers"] == 1
    assert read_tensors(stored.folder / "router.safetensors").keys() == {"vectors", "x"}
    assert datetime.fromisoformat(manifest.created).tzinfo is not None


def test_a_version_that_is_not_current_any_more_is_not_built_upon(store, base):
    commit(store, "b", base, 5)
    commit(store, "b", base, 6)
    before = contents(store.path)
    with pytest.raises(StoreError, match=r"version 1 of 'b' is not the current one any more \(version 2 is\)"):
        store.commit("b", make_module(base, 7), TRAINING, made_from=1)
    assert contents(store.path) == before
    assert store.commit("b", make_module(base, 7), TRAINING, made_from=2).version == 3
    store.remove("b")
    with pytest.raises(StoreError, match="none is left"):
        store.commit("b", make_module(base, 7), TRAINING, made_from=3)
    assert store.find("b") is None


def test_modules_are_saved_in_the_dtype_of_the_store(made, tmp_path, base):
    store = Store.create(tmp_path / "store", made / "base", dtype="bfloat16")
    stored = commit(store, "b", base, 5)
    tensors = load_file(stored.folder / "module.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16, torch.int64}
    half = store.load_base()
    assert half.dtype == torch.bfloat16
    assert ModuleSet(half, [store.load("b", half)]).logits(IDS).dtype == torch.bfloat16
    assert store.base_bytes() == half.num_bytes()


def test_dtype_auto_is_that_of_the_checkpoint(tmp_path):
    make_model().to(torch.float16).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    assert Store.create(tmp_path / "store", tmp_path / "base").manifest.dtype == "float16"


def test_every_module_and_version_has_its_own_identity(store, base):
    commit(store, "b", base, 1)
    commit(store, "b", base, 1)
    modules = [store.load("a", base), store.load("b", base), store.load("b", base, version=1)]
    assert len({m.identity for m in modules}) == 3
    assert store.load("a", base).identity == modules[0].identity


def test_a_store_and_its_base_can_be_moved_together(home, tmp_path):
    before = logits_of(Store.open(home / "store"), "a")
    home.rename(tmp_path / "elsewhere")
    assert torch.equal(logits_of(Store.open(tmp_path / "elsewhere" / "store"), "a"), before)


def test_a_base_is_found_from_any_working_folder(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    store = Store.create("other", "base")
    monkeypatch.chdir(tmp_path)
    assert Store.open(home / "other").check_base().samefile(home / "base")
    assert store.manifest.base == "../base"


# Guarantee 1: isolation


def test_adding_updating_and_removing_another_module_changes_no_byte_and_no_bit(home, base):
    def state() -> tuple:
        store = Store.open(home / "store")
        kept = {k: v for k, v in contents(home / "store").items() if not k.startswith("modules/b/")}
        outputs = logits_of(store), logits_of(store, "a")
        return contents(home / "base"), kept, [o.numpy().tobytes() for o in outputs]

    before = state()
    store = Store.open(home / "store")
    commit(store, "b", base, 5)
    assert state() == before
    commit(store, "b", base, 6)
    assert state() == before
    assert sorted(store.modules) == ["a", "b", "law"]
    store.remove("b")
    assert state() == before
    assert not (home / "store" / "modules" / "b").exists()
    commit(store, "b", base, 7)
    assert state() == before


def test_an_update_leaves_the_version_before_it_as_it_was(store, base):
    before = contents(store.path / "modules" / "a" / "1")
    output = logits_of(store, "a")
    commit(store, "a", base, 5)
    assert contents(store.path / "modules" / "a" / "1") == before
    assert torch.equal(ModuleSet(base, [store.load("a", base, version=1)]).logits(IDS), output)
    assert not torch.equal(logits_of(store, "a"), output)


def test_committing_changes_neither_the_module_nor_the_base(store, base):
    module = make_module(base, 5)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    weights = {k: v.clone() for k, v in base.model.state_dict().items()}
    store.commit("b", module, TRAINING)
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in module.state_dict().items())
    assert all(torch.equal(v, weights[k]) for k, v in base.model.state_dict().items())


# Guarantee 3: the right base


def refused_base(store: Store) -> str:
    with pytest.raises(BaseModelError) as caught:
        store.load_base()
    assert "\n" not in str(caught.value)
    assert store.verify()
    return str(caught.value)


@pytest.mark.parametrize("checked_before", [False, True])
def test_a_base_with_other_weights_is_refused(home, store, checked_before):
    if checked_before:
        store.check_base()
    flip(home / "base" / "model.safetensors")
    assert "fingerprint" in refused_base(store)


@pytest.mark.parametrize(
    "change",
    [{"rms_norm_eps": 0.5}, {"rope_theta": 5.0}, {"hidden_act": "gelu"}, {"num_attention_heads": 2}, {"new_key": 1}],
    ids=str,
)
def test_a_base_with_another_config_is_refused(home, store, change):
    edit(home / "base" / "config.json", **change)
    assert "fingerprint" in refused_base(store)


def test_a_base_whose_config_was_only_written_anew_is_the_same_base(home, store):
    path = home / "base" / "config.json"
    edit(path, transformers_version="99.0", _name_or_path="elsewhere", use_cache=False)
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items())), indent=8))
    assert store.load_base().num_layers == 3
    assert store.verify() == []


@pytest.mark.parametrize("content", ["", '{"model_type": "ll', "[]", "null", "\ufffd"])
def test_a_base_with_a_spoilt_config_is_refused(home, store, content):
    (home / "base" / "config.json").write_text(content)
    refused_base(store)


def test_a_base_with_another_tokenizer_is_refused(home, store):
    path = home / "base" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    path.write_text(json.dumps(tokenizer))
    assert "tokenizer" in refused_base(store)


def test_a_base_whose_tokenizer_has_a_new_token_in_its_settings_is_refused(home, store):
    """tokenizer_config.json, too, decides which ids a text gets."""
    before = store.load_tokenizer()("a <note> b")["input_ids"]
    edit(home / "base" / "tokenizer_config.json", extra_special_tokens=["<note>"])
    assert store.load_tokenizer()("a <note> b")["input_ids"] != before
    assert "tokenizer" in refused_base(store)


def test_a_base_without_tokenizer_or_weights_is_refused(home, store):
    shutil.move(home / "base" / "tokenizer.json", home / "t")
    refused_base(store)
    shutil.move(home / "t", home / "base" / "tokenizer.json")
    shutil.move(home / "base" / "model.safetensors", home / "w")
    assert "model.safetensors" in refused_base(store)
    shutil.move(home / "w", home / "base" / "model.safetensors")
    assert store.verify() == []
    shutil.move(home / "base", home / "gone")
    assert "put it back" in refused_base(store)


def test_weights_in_several_files_are_all_compared(tmp_path):
    make_model().save_pretrained(tmp_path / "base", max_shard_size="20kB")
    make_tokenizer().save_pretrained(tmp_path / "base")
    shards = sorted((tmp_path / "base").glob("model-*.safetensors"))
    assert len(shards) > 2
    store = Store.create(tmp_path / "store", tmp_path / "base")
    assert torch.equal(store.load_base().logits(IDS), Base(make_model()).logits(IDS))
    flip(shards[1])
    assert "fingerprint" in refused_base(store)
    flip(shards[1])
    assert store.verify() == []
    (tmp_path / "base" / "model.safetensors.index.json").write_text('{"weight_map":')
    refused_base(store)


def test_weights_that_are_put_beside_those_of_several_files_are_never_loaded_in_their_place(tmp_path):
    """transformers reads model.safetensors where both are there."""
    make_model().save_pretrained(tmp_path / "base", max_shard_size="20kB")
    make_tokenizer().save_pretrained(tmp_path / "base")
    store = Store.create(tmp_path / "store", tmp_path / "base")
    before = store.load_base().logits(IDS)
    make_model(seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "base")
    try:
        after = store.load_base().logits(IDS)
    except BaseModelError:
        return
    assert torch.equal(after, before)


def test_an_adapter_that_is_put_beside_the_weights_is_never_loaded(home, store):
    peft = pytest.importorskip("peft")
    before = store.load_base().logits(IDS)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        peft.get_peft_model(make_model(), config).save_pretrained(home / "base")
        try:
            after = store.load_base().logits(IDS)
        except BaseModelError:
            return
    assert torch.equal(after, before)


def test_a_module_is_not_loaded_on_another_base(store, base):
    with pytest.raises(BaseModelError, match="another base"):
        store.load("a", Base(make_model()))  # equal weights perhaps, but of no known folder
    other = Base(make_model(seed=1))
    other.fingerprint = "0" * 64
    with pytest.raises(BaseModelError, match="another base"):
        store.load("a", other)


def test_a_module_is_not_loaded_on_its_base_in_another_dtype(home, store):
    base = store.load_base()
    base.model.to(torch.bfloat16)
    with pytest.raises(BaseModelError, match=r"made for float32, .*bfloat16"):
        store.load("a", base)
    half = Store.create(home / "half", home / "base", dtype="bfloat16")
    with pytest.raises(BaseModelError):
        store.load("a", half.load_base())


@pytest.mark.parametrize("difference", ["base", "tokenizer", "dtype"])
def test_a_module_copied_from_another_store_is_refused(home, store, difference):
    other = home / "other"
    if difference == "base":
        save_base(other, seed=1)
    else:
        shutil.copytree(home / "base", other)
    if difference == "tokenizer":
        tokenizer = make_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(other)
    target = Store.create(home / "target", other, dtype="float16" if difference == "dtype" else "float32")
    shutil.copytree(store.path / "modules" / "a", target.path / "modules" / "a")
    with pytest.raises(BaseModelError, match="made for another base, tokenizer or dtype"):
        target.load("a", target.load_base())
    problems = "\n".join(target.verify())
    field = {"base": "base_fingerprint", "tokenizer": "tokenizer_fingerprint", "dtype": "dtype"}[difference]
    assert f"{field} is not the store's" in problems


# Creating and opening


def test_creating_refuses_a_folder_that_holds_something(home):
    with pytest.raises(StoreError, match="is a store already"):
        Store.create(home / "store", home / "base")
    (home / "full").mkdir()
    (home / "full" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="exists already"):
        Store.create(home / "full", home / "base")
    with pytest.raises(StoreError, match="exists already"):
        Store.create(home / "full" / "notes.txt", home / "base")
    assert contents(home / "full") == {"notes.txt": b"mine"}
    (home / "empty").mkdir()
    assert Store.create(home / "empty", home / "base").modules == {}


def test_creating_with_what_cannot_be_a_base_leaves_nothing_behind(home):
    def refused(base: Path | str, error: type[GrowlmError] = BaseModelError, **options: str) -> str:
        with pytest.raises(error) as caught:
            Store.create(home / "new", base, **options)
        assert "\n" not in str(caught.value)
        assert not (home / "new").exists()
        return str(caught.value)

    refused(home / "base", StoreError, dtype="int8")
    refused(home / "absent")
    refused(home / "base" / "config.json")
    (home / "empty").mkdir()
    refused(home / "empty")
    for name, content in (
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "bert"}'),
        ("config.json", b'{"model_type": "no-such-family"}'),
        ("model.safetensors", b""),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0not json"),
        ("model.safetensors.index.json", b"{"),
        ("model.safetensors.index.json", b"{}"),
        ("tokenizer.json", None),
    ):
        bad = shutil.copytree(home / "base", home / "bad")
        if "index" in name:
            (bad / "model.safetensors").unlink()
        if content is None:
            (bad / name).unlink()
        else:
            (bad / name).write_bytes(content)
        assert str(bad) in refused(bad)
        shutil.rmtree(bad)
    Store.create(home / "new", home / "base")


def test_opening_what_is_no_store_is_refused(home):
    for path in (home, home / "absent", home / "store" / "store.json"):
        with pytest.raises(StoreError, match="not a store"):
            Store.open(path)


def test_opening_and_listing_read_no_module(store):
    """The cost does not depend on how many modules there are: not one of their files is opened."""
    for file in store.path.glob("modules/*/*/*"):
        file.write_bytes(b"spoilt")
    opened = Store.open(store.path)
    assert [(m.name, m.version) for m in opened.modules.values()] == [("a", 1), ("law", 1)]
    assert opened.module("a").folder.name == "1"
    assert opened.manifest == store.manifest


def test_what_lies_about_in_a_store_is_no_module(store):
    modules = store.path / "modules"
    (modules / "notes.txt").write_text("x")
    (modules / "Upper" / "1").mkdir(parents=True)
    (modules / "Upper" / "1" / "module.json").write_text("{}")
    (modules / "empty").mkdir()
    for odd in ("draft", "-2", "1.5", "²", "٣"):
        shutil.copytree(modules / "a" / "1", modules / "a" / odd)
    (modules / "a" / "9").write_text("a file")
    assert [(m.name, m.version) for m in store.modules.values()] == [("a", 1), ("law", 1)]
    assert store.module("a").version == 1


# Versions


def test_the_current_version_is_the_largest_complete_one(store, base):
    assert [commit(store, "a", base, seed).version for seed in (5, 6)] == [2, 3]
    for version in ("10", "11"):
        (store.path / "modules" / "a" / version).mkdir()
    (store.path / "modules" / "a" / "11" / "module.safetensors").write_bytes(b"half")
    assert store.module("a").version == 3
    assert store.modules["a"].version == 3
    assert Store.open(store.path).load("a", base).identity.startswith("a@3:")
    for _ in range(7):
        version = commit(store, "a", base, 7).version
    assert version == 10
    assert store.module("a").version == 10  # by number: as text, 9 comes after 10
    assert store.module("a", 2).version == 2


def test_an_incomplete_folder_is_replaced(store, base):
    shutil.rmtree(store.path / "modules" / "a" / "1")
    (store.path / "modules" / "a" / "1").mkdir()
    (store.path / "modules" / "a" / "1" / "left").write_bytes(b"half")
    assert list(store.modules) == ["law"]
    assert commit(store, "a", base, 5).version == 1
    assert store.verify() == []


def test_unknown_modules_are_an_error_that_lists_the_known(store, base):
    for call in (store.module, lambda name: store.load(name, base), store.remove):
        with pytest.raises(UnknownModuleError, match=r"no module 'tax'; modules are: a, law$"):
            call("tax")
        for near in ("lav", "Law", "la"):
            with pytest.raises(UnknownModuleError, match=rf"no module '{near}'; did you mean law\?$"):
                call(near)
    with pytest.raises(UnknownModuleError, match=r"no version 4; versions are \[1\]"):
        store.load("a", base, version=4)
    empty = Store.create(store.path.parent / "empty", store.base_folder)
    with pytest.raises(UnknownModuleError, match="none yet"):
        empty.module("a")


def test_of_many_modules_some_are_listed(store, monkeypatch):
    names = [f"m{n:03}" for n in range(30)]
    monkeypatch.setattr(Store, "versions", lambda self: iter([(name, [1]) for name in names]))
    with pytest.raises(UnknownModuleError) as caught:
        store.module("zzz")
    assert str(caught.value).endswith(f"modules are: {', '.join(names[:20])} and 10 more (growlm status)")
    with pytest.raises(UnknownModuleError, match=r"did you mean m007\?"):
        store.module("m00-7")


def test_missing_names_are_those_that_were_never_there_or_are_gone(home, store, base):
    names = set(store.modules)
    assert store.missing({*names, "never"}) == {"never"}
    store.remove(next(iter(names)))
    assert store.missing(names) == names - set(store.modules) != set()
    assert Store.create(home / "empty", home / "base").missing(["law"]) == {"law"}


def test_a_removed_module_is_unknown(store, base):
    store.remove("a")
    assert list(Store.open(store.path).modules) == ["law"]
    with pytest.raises(UnknownModuleError):
        store.load("a", base)
    assert store.verify() == []
    assert commit(store, "a", base, 5).version == 1


# Guarantee 7: safe files


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_pickle(path: Path, canary: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"weight": Canary(canary)}, path)


def test_pickled_weights_are_never_read(home, store, base):
    canary = home / "canary"
    write_pickle(home / "base" / "pytorch_model.bin", canary)
    assert store.load_base().num_layers == 3
    (home / "base" / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"pytorch_model\.bin holds pickled weights"):
        store.load_base()
    with pytest.raises(BaseModelError, match=r"pytorch_model\.bin holds pickled weights"):
        Store.create(home / "new", home / "base")
    for stored in (store.module("a"), store.module("law")):
        write_pickle(stored.folder / "module.safetensors", canary)
        for verify in (True, False):
            with pytest.raises(IntegrityError):
                store.load(stored.name, base, verify=verify)
    assert store.verify()
    assert not canary.exists()


BAD_NAMES = ["", ".", "..", "...", "a/b", "/a", "../a", "a/../b", "a\\b", "A", "Law", "-a", "_a", ".a", "a..b", "a b"]
BAD_NAMES += ["a\n", "a\0", "é", "a" * 65, "~", "a:b", "*"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_could_leave_the_store_are_refused(store, base, name):
    before = contents(store.path.parent)
    for call in (check_name, lambda n: commit(store, n, base, 5)):
        with pytest.raises(StoreError, match="not allowed") as caught:
            call(name)
        assert not isinstance(caught.value, UnknownModuleError)
        assert "\n" not in str(caught.value)
    for look in (store.module, store.remove, lambda n: store.load(n, base)):
        with pytest.raises(UnknownModuleError, match="no module") as caught:
            look(name)
        assert "\n" not in str(caught.value)
    assert contents(store.path.parent) == before


@pytest.mark.parametrize("name", ["a", "0", "law-2.v1_x", "a" * 64])
def test_good_names_are_accepted(name):
    check_name(name)


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=70) | st.text(alphabet="a0.-_/\\A", max_size=70) | st.from_regex(r"[a-z0-9.]{0,9}[/.]*"))
@example("..")
def test_every_accepted_name_stays_inside(name):
    modules = Path("/store/modules")
    with suppress(StoreError):
        check_name(name)
        assert Path(os.path.normpath(modules / name)) == modules / name
        assert (modules / name).parent == modules
        assert 0 < len(os.fsencode(name)) <= 64
        assert name == name.lower()


def test_a_manifest_cannot_name_files_outside_its_folder(store):
    (store.path / "secret").write_text("x")
    path = store.path / "modules" / "a" / "1" / "module.json"
    manifest = json.loads(path.read_text())
    edit(path, files={**manifest["files"], "../../../secret": "0" * 64})
    assert any("outside its folder" in line and "modules/a/1" in line for line in store.verify())


# Manifests


def manifests(store: Store) -> list[Path]:
    return [
        store.path / "store.json",
        store.path / "modules" / "a" / "1" / "module.json",
        store.path / "router" / "general" / "1" / "router.json",
    ]


def read_manifests(path: Path) -> None:
    store = Store.open(path)
    assert store.module("a").manifest.name == "a"
    assert store.router_files("general").read() is not None


@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_unknown_key_is_refused(store, which):
    path = manifests(store)[which]
    edit(path, suprise=1)
    with pytest.raises(IntegrityError, match=r"unknown key 'suprise'") as caught:
        read_manifests(store.path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("found", [2, 99, 2.0, "2"])
def test_a_newer_format_is_refused(store, which, found):
    path = manifests(store)[which]
    edit(path, format=found, unknown_in_format_1=True)
    with pytest.raises(StoreError, match=r"format") as caught:
        read_manifests(store.path)
    assert str(path) in str(caught.value)
    edit(path, format=found)
    path.write_text(path.read_text().replace(', "unknown_in_format_1": true', ""))
    with pytest.raises(StoreError, match=r"format"):
        read_manifests(store.path)


def test_a_newer_format_asks_for_a_newer_growlm(store):
    edit(store.path / "store.json", format=2)
    with pytest.raises(StoreError, match=r"format 2, this growlm reads up to 1; install a newer growlm"):
        Store.open(store.path)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_truncated_manifest_is_refused(store, which):
    path = manifests(store)[which]
    whole = path.read_bytes().rstrip()
    for size in range(0, len(whole), max(len(whole) // 40, 1)):
        path.write_bytes(whole[:size])
        with pytest.raises(IntegrityError, match=r"not readable JSON") as caught:
            read_manifests(store.path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b"{}", b"\xff", b"[" * 100_000], ids=lambda c: repr(c[:6]))
def test_a_spoilt_manifest_is_refused(store, which, content):
    path = manifests(store)[which]
    path.write_bytes(content)
    with pytest.raises(IntegrityError) as caught:
        read_manifests(store.path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    if which:
        assert any(str(path) in line for line in store.verify())


@pytest.mark.parametrize("field", ["name", "version", "kind", "config", "base_fingerprint", "dtype", "files", "bytes"])
def test_a_manifest_without_a_field_is_refused(store, field):
    path = manifests(store)[1]
    content = json.loads(path.read_text())
    del content[field]
    path.write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match=field):
        read_manifests(store.path)


def test_a_folder_moved_by_hand_is_refused(store, base):
    modules = store.path / "modules"
    (modules / "a" / "1").rename(modules / "a" / "7")
    shutil.copytree(modules / "law", modules / "lore")
    for name in ("a", "lore"):
        with pytest.raises(IntegrityError, match="moved by hand"):
            store.load(name, base)
    assert len([line for line in store.verify() if "moved by hand" in line]) == 2


def test_an_unknown_kind_or_config_of_module_is_refused(store, base):
    path = manifests(store)[1]
    config = json.loads(path.read_text())["config"]
    edit(path, config={**config, "colour": "red"})
    with pytest.raises(IntegrityError, match="unknown key 'colour'"):
        store.load("a", base)
    edit(path, config=config, kind="quantum")
    with pytest.raises(GrowlmError, match="kind 'quantum' does not exist"):
        store.load("a", base)


# Integrity


def test_verify_misses_general_text_where_there_are_modules(store):
    shutil.rmtree(store.router_path / "general")
    assert any("router/general: is missing" in line for line in store.verify())
    for name in list(store.modules):
        store.remove(name)
    assert store.verify() == []


def test_a_module_that_another_removes_first_is_unknown(store, monkeypatch):
    lock = Store.lock

    @contextmanager
    def late(self):
        """Another process removes the module while this one waits for the lock."""
        monkeypatch.setattr(Store, "lock", lock)
        Store.open(self.path).remove("a")
        with lock(self):
            yield

    monkeypatch.setattr(Store, "lock", late)
    with pytest.raises(UnknownModuleError):
        store.remove("a")
    assert not any((store.path / "scratch").glob("*"))


def test_router_files_that_are_replaced_under_a_reader_are_still_there(store, monkeypatch):
    """Two replacements between the listing of versions and the look into them."""
    exists = os.path.exists

    def late(path):
        if str(path).endswith("router.json"):
            monkeypatch.setattr("growlm.store.versions.os.path.exists", exists)
            put_general(store, 7)
            put_general(store, 8)
        return exists(path)

    monkeypatch.setattr("growlm.store.versions.os.path.exists", late)
    assert store.router_files("general").digest() is not None
    assert torch.equal(store.router_files("general").read()["vectors"], make_evidence(8)["vectors"])


def test_changed_weights_are_refused(store, base):
    path = store.path / "modules" / "a" / "1" / "module.safetensors"
    flip(path)
    with pytest.raises(IntegrityError, match=r"modules/a/1/module\.safetensors: sha256"):
        store.load("a", base)
    store.load("law", base)
    path.write_bytes(path.read_bytes()[:-10])
    for verify in (True, False):
        with pytest.raises(IntegrityError):
            store.load("a", base, verify=verify)
    path.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        store.load("a", base)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_tensors_of_another_module_are_refused_even_unhashed(store, base, damage):
    path = store.path / "modules" / "a" / "1" / "module.safetensors"
    tensors = load_file(path)
    name = next(k for k in tensors if k.startswith("layers"))
    if damage == "missing":
        del tensors[name]
    elif damage == "unexpected":
        tensors["layers.9.weight"] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(3, 3)
    save_file(tensors, path)
    with pytest.raises(IntegrityError, match=r"layers"):
        store.load("a", base, verify=False)


def test_verify_finds_nothing_wrong_with_a_good_store(store):
    assert store.verify() == []


def test_verify_names_every_bad_file(home, store, base):
    commit(store, "a", base, 5)
    commit(store, "c", base, 6)
    commit(store, "d", base, 7)
    (store.path / "modules" / "law" / "1" / "extra.bin").write_bytes(b"x")
    (store.path / "modules" / "d" / "1" / "router.safetensors").unlink()
    bad = [
        store.path / "modules" / "a" / "1" / "module.safetensors",
        store.path / "modules" / "a" / "2" / "router.safetensors",
        store.path / "modules" / "law" / "1" / "module.safetensors",
        store.path / "modules" / "law" / "1" / "router.safetensors",
        store.path / "router" / "general" / "1" / "router.safetensors",
    ]
    for file in bad:
        flip(file)
    (store.path / "modules" / "c" / "1" / "module.json").write_text("{")
    bad += [
        store.path / "modules" / "law" / "1" / "extra.bin",
        store.path / "modules" / "d" / "1" / "router.safetensors",
        store.path / "modules" / "c" / "1" / "module.json",
    ]
    problems = store.verify()
    assert len(problems) == len(bad)
    for file in bad:
        assert sum(line.startswith(f"{file}:") for line in problems) == 1, file


def test_verify_names_base_and_tokenizer_both(home, store):
    flip(home / "base" / "model.safetensors")
    (home / "base" / "tokenizer.json").write_text("{}")
    flip(store.path / "modules" / "a" / "1" / "module.safetensors")
    problems = "\n".join(store.verify())
    assert "not the base" in problems
    assert "tokenizer" in problems
    assert "modules/a/1/module.safetensors" in problems


def test_verify_sees_a_change_that_left_size_and_time_as_they_were(home, store):
    path = home / "base" / "model.safetensors"
    store.check_base()
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert any("not the base" in line for line in store.verify())


# Guarantee 6: durability


def test_a_full_disk_changes_nothing_and_says_how_much_was_asked_for(store, base):
    before, module = contents(store.path), make_module(base, 5)
    for name in ("b", "a"):
        with largest_file(10_000), pytest.raises(StoreError, match=f"no room to write {module.num_bytes():,} bytes"):
            store.commit(name, module, TRAINING)
    assert contents(store.path) == before
    assert list((store.path / "scratch").iterdir()) == []
    assert store.verify() == []
    assert store.commit("b", module, TRAINING).version == 1


def test_a_disk_that_is_full_at_the_last_file_changes_nothing(store, base):
    before, module = contents(store.path), make_module(base, 5)
    room = 10 + (store.path / "modules" / "a" / "1" / "module.safetensors").stat().st_size
    record = {"note": "x" * room}
    with largest_file(room), pytest.raises(StoreError, match="no room to write"):
        store.commit("b", module, record)
    assert contents(store.path) == before
    assert list((store.path / "scratch").iterdir()) == []


def test_the_manifest_is_written_last_and_all_is_synced_before_the_module_has_its_name(store, base, monkeypatch):
    synced: set[int] = set()
    checked = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(handle):
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def watched_rename(source, target):
        if "modules" in str(target):
            files = sorted(Path(source).iterdir(), key=lambda p: p.stat().st_mtime_ns)
            assert files[-1].name == "module.json"
            assert {p.stat().st_ino for p in [Path(source), *files]} <= synced
            checked.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    commit(store, "b", base, 5)
    assert len(checked) == 1
    assert (store.path / "modules" / "b").stat().st_ino in synced


# The drill

SCENARIOS: dict[str, Callable[[Store, Base], object]] = {
    "add": lambda store, base: commit(store, "b", base, 5),
    "update": lambda store, base: commit(store, "a", base, 5),
    "remove": lambda store, base: store.remove("a"),
    "router": lambda store, base: put_general(store, 4),
}


def drill(template: Path, out: Path) -> None:
    base = Store.open(template / "store").load_base()
    for name, action in SCENARIOS.items():
        kill_everywhere(lambda copy, action=action: action(Store.open(copy / "store"), base), template, out / name)


@pytest.fixture(scope="module")
def killed(made, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("killed")
    in_new_process(drill, made, out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_a_kill_at_any_instant_loses_nothing(made, base, killed, scenario):
    template = contents(made / "store")
    points = sorted((killed / scenario).iterdir(), key=lambda p: int(p.name))
    assert len(points) > 10
    outcomes = []
    for folder in points:
        store = Store.open(folder / "store")
        assert store.verify() == []
        found = {name: module.version for name, module in store.modules.items()}
        outcomes.append(found)
        assert all((version / "module.json").exists() for version in store.path.glob("modules/*/*"))  # no halves
        for name in found:
            store.load(name, base)
        # Whatever was finished before has kept its bytes, but for what was to be removed or replaced.
        gone = {"remove": "modules/a/", "router": "router/"}.get(scenario, "nothing")
        now = contents(folder / "store")
        for file, content in template.items():
            if not file.startswith(gone) or ("a" in found and scenario == "remove"):
                assert now[file] == content
        vectors = store.router_files("general").read()["vectors"]
        allowed = [make_evidence(seed)["vectors"] for seed in ((3, 4) if scenario == "router" else (3,))]
        assert any(torch.equal(vectors, a) for a in allowed)
        # The command can be given again, and what the kill left is cleared away.
        again = commit(store, "b", base, 9)
        assert again.version == found.get("b", 0) + 1
        assert list((store.path / "scratch").iterdir()) == []
        put_general(store, 5)
        assert torch.equal(store.router_files("general").read()["vectors"], make_evidence(5)["vectors"])
        assert store.verify() == []
    before = {"a": 1, "law": 1}
    after = {"add": {"a": 1, "b": 1, "law": 1}, "update": {"a": 2, "law": 1}, "remove": {"law": 1}}
    wanted = after.get(scenario, before)
    assert all(found in (before, wanted) for found in outcomes)
    assert outcomes[0] == before
    assert outcomes[-1] == wanted
    assert outcomes == sorted(outcomes, key=lambda found: found == wanted)


def commit_at_once(path: Path, processes: int, each: int) -> None:
    base = Store.open(path).load_base()
    go, ready = os.pipe()

    def commit_all(process: int) -> None:
        os.close(ready)
        os.read(go, 1)  # returns when the parent closes its end
        store = Store.open(path)
        for i in range(each):
            commit(store, f"own-{process}-{i}", base, i)
            commit(store, "shared", base, i)

    children = [forked(commit_all, process) for process in range(processes)]
    os.close(ready)
    assert [exit_code(pid) for pid in children] == [0] * processes


def test_processes_that_commit_at_once_all_succeed(store, base):
    in_new_process(commit_at_once, store.path, 3, 4)
    assert store.verify() == []
    owned = [name for name in store.modules if name.startswith("own-")]
    assert len(owned) == 12
    assert store.module("shared").version == 12
    assert all(store.load("shared", base, version=v) for v in range(1, 13))
    assert list((store.path / "scratch").iterdir()) == []


def read_while_replaced(path: Path) -> None:
    """One process replaces what the router keeps, again and again; this one reads it all the while."""
    store = Store.open(path)

    def replace() -> None:
        for i in range(150):
            put_general(store, i % 2)

    writer = forked(replace)
    allowed = [make_evidence(seed)["vectors"] for seed in (0, 1, 3)]
    while os.waitpid(writer, os.WNOHANG) == (0, 0):
        found = store.router_files("general").read()
        assert found is not None
        assert any(torch.equal(found["vectors"], a) for a in allowed)


def test_the_router_can_be_read_while_it_is_replaced(store):
    in_new_process(read_while_replaced, store.path)


def test_a_new_store_remembers_the_hashes_of_its_base(tmp_path, store, monkeypatch):
    """The first command after `new` does not read the base's files once more to know them."""
    store = Store.create(tmp_path / "new", store.base_folder)
    read: list[Path] = []
    original = files.sha256_file

    def counted(path: Path) -> str:
        read.append(path)
        return original(path)

    monkeypatch.setattr(files, "sha256_file", counted)
    store.check_base()
    assert read == []
    (store.path / "cache" / "hashes.json").unlink()
    store.check_base()
    assert [path.name for path in read] == ["model.safetensors"]


def test_verify_names_a_version_that_lost_its_manifest(store, base):
    commit(store, "a", base, 5)
    (store.path / "modules" / "a" / "2" / "module.json").unlink()
    assert store.verify() == [f"{store.path / 'modules' / 'a' / '2' / 'module.json'}: file is missing"]


def test_verify_names_what_is_no_file_or_no_folder(home):
    store = Store.open(home / "store")
    for put in (lambda path: path.symlink_to(path), os.mkfifo, os.mkdir):
        weights = store.module("law").folder / "module.safetensors"
        weights.rename(home / "kept")
        put(weights)
        assert store.verify() == [f"{weights}: file is missing"]
        weights.rmdir() if weights.is_dir() else weights.unlink()
        (home / "kept").rename(weights)
    version = store.router_path / "general" / "1"
    version.rename(home / "kept")
    for put in (lambda path: path.symlink_to("nowhere"), lambda path: path.write_text("")):
        put(version)
        assert any(f"{version}/router.json" in problem for problem in store.verify())
        version.unlink()
    (home / "kept").rename(version)
    assert store.verify() == []
