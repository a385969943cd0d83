"""Growing a module of kind peer: what it learned keeps its bits, steps can be taken back; and pruning of its pools."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import growlm
from disk import all_files, edit, flip, write_jsonl
from growlm import cli, router
from growlm.disk.files import locked
from growlm.engine import Engine
from growlm.errors import ConfigError, DataError, IntegrityError, Interrupted, StoreError, UnknownModuleError
from growlm.evaluation.forgetting import forgetting
from growlm.layers.product_keys import retrievals
from growlm.modules import ModuleSet
from growlm.modules.peer import Peer, PeerConfig
from growlm.router import load_router, names_of
from growlm.store import Store
from growlm.surgery.module_pruning import prune_module
from growlm.training.config import GrowConfig, LearnConfig, RouterConfig
from growlm.training.corpus import evidence_beside
from growlm.training.grow import GrowResult, grow, take_back
from growlm.training.learn import learn
from growlm.training.router import train_router
from growlm.usage.usage import count_usage, open_modules
from interruptions import at_step, exit_code, forked, in_new_process, interrupt, kill, steps_of
from tiny import TEXT, random_ids, save_base

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = random_ids(2, 11)
TRAINED: dict[str, Any] = {
    "sequence_length": 16, "batch_size": 4, "epochs": 1, "precision": "float32", "router_samples": 16,
    "admit_anyway": True, "learning_rate": 3e-3,
}  # fmt: skip
POOL: dict[str, Any] = {"num_experts": 100, "num_heads": 2, "top_k": 4}  # 10 x 10 sub-keys


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and two stores with a module of kind peer: in float32 with one of blocks beside it, and in bfloat16."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("made")
    save_base(home / "base")
    write_jsonl(home / "base" / "heldout.jsonl", [f"{text} {n}" for n in range(6) for text in TEXT])
    write_jsonl(home / "law.jsonl", [f"The tenant of room {n} pays {n * 7 % 90} crowns." for n in range(60)])
    write_jsonl(home / "drugs.jsonl", [f"Drug {n} inhibits enzyme {n * 5 % 31}." for n in range(60)])
    write_jsonl(home / "code.jsonl", [f"def f{n}(x):\n    return x + {n * 3 % 17}\n" for n in range(60)])
    for name, dtype in (("store", "float32"), ("half", "bfloat16")):
        store = Store.create(home / name, home / "base", dtype=dtype)
        learn(store, "law", [home / "law.jsonl"], LearnConfig(kind="peer", **POOL, **TRAINED), progress=False)
    blocks = LearnConfig(num_layers=1, **TRAINED)
    learn(Store.open(home / "store"), "other", [home / "code.jsonl"], blocks, progress=False)
    torch.set_num_threads(threads)
    return home


def more(
    store: Store, experts: int | str | None = None, *texts: str, restart: bool = False, **changes: Any
) -> GrowResult:
    data = [store.path.parent / f"{text}.jsonl" for text in texts]
    return grow(store, "law", experts, data, GrowConfig(**{**TRAINED, **changes}), restart=restart, progress=False)


def tensors(store: Store, version: int | None = None) -> dict[str, Tensor]:
    return dict(store.load("law", store.load_base(), version=version).state_dict())


def logits(store: Store, version: int | None = None, name: str = "law") -> Tensor:
    base = store.load_base()
    with torch.no_grad():
        return ModuleSet(base, [store.load(name, base, version=version)]).logits(IDS)


def config_of(store: Store, version: int | None = None) -> PeerConfig:
    return store.module("law", version).shape()[1]


def steps_said(store: Store, version: int | None = None) -> list[dict[str, Any]]:
    return store.module("law", version).manifest.training["growth"]


def same_but_rows(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Every bit of `before` is in `after`, and only tables and the sub-keys of side a have more rows."""
    assert before.keys() == after.keys()
    for name, old in before.items():
        grows = name.endswith((".up", ".down", ".keys_a"))
        new = after[name][: len(old)] if grows else after[name]
        assert (len(after[name]) > len(old)) if grows else new.shape == old.shape
        assert torch.equal(old, new), name


# Before it is trained


def test_what_is_appended_changes_no_output_before_it_is_trained(home: Path, store: Store) -> None:
    files = all_files(store.path / "modules")
    wanted, others = logits(store), logits(store, name="other")
    result = more(store, "+50")
    assert (result.version, result.experts_before, result.experts, result.experts_open) == (2, 100, 150, 100)
    assert more(store, 10).experts == 160
    same_but_rows(tensors(store, 1), tensors(store, 3))
    assert config_of(store).steps == (10, 15, 16)
    assert config_of(store).open_steps == 1
    assert torch.equal(logits(store), wanted)
    assert torch.equal(logits(store, name="other"), others)
    after = all_files(store.path / "modules")
    assert {name: after[name] for name in files} == files
    for file in (router.EVIDENCE, router.VECTORS):
        assert store.module("law").manifest.files[file] == store.module("law", 1).manifest.files[file]
    assert store.verify() == []
    with Engine(store) as engine:
        assert torch.equal(engine.logits(IDS, "law"), wanted)
        assert forgetting(engine)[1]["changed"] == []
        assert engine.modules.resident_bytes == sum(store.module(n).bytes for n in engine.modules.resident)
    with Engine(store, experts_on="disk") as engine:
        torch.testing.assert_close(engine.logits(IDS, "law"), wanted)


def test_steps_of_one_seed_draw_different_sub_keys(store: Store) -> None:
    more(store, "+50")
    more(store, "+50")
    keys = tensors(store)["pools.0.keys.keys_a"]
    assert len(keys.unique(dim=0)) == 20
    old, new = keys[:10], keys[10:]
    assert 0.5 < float(new.square().mean() / old.square().mean()) < 2
    assert not tensors(store)["pools.0.down"][100:].any()


# Training


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_training_changes_new_rows_alone(home: Path, dtype: str, precision: str) -> None:
    store = Store.open(home / ("store" if dtype == "float32" else "half"))
    wanted = logits(store)
    result = more(store, "+50", "drugs", weight_decay=0.9, epochs=4, precision=precision)
    assert (result.version, result.experts_open) == (2, 150)
    assert result.loss_after < 0.95 * result.loss_before
    before, after = tensors(store, 1), tensors(store)
    same_but_rows(before, after)
    assert {t.dtype for t in after.values() if t.is_floating_point()} == {getattr(torch, dtype)}
    assert "pools.0.keys.norm.running_var" in before
    assert after["pools.0.down"][100:].any(-1).sum() > 10
    assert not torch.equal(logits(store), wanted)
    assert torch.equal(logits(store, 1), wanted)
    more(store, "+10", "code", weight_decay=0.9)
    same_but_rows(after, tensors(store))


def test_nothing_but_what_can_have_new_rows_has_a_gradient(store: Store) -> None:
    base = store.load_base()
    module = store.load("law", base)
    assert isinstance(module, Peer)
    module = module.grown(base, 50)
    module.requires_grad_(True).train_new()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {"pools.0.up", "pools.0.down", "pools.0.keys.keys_a"}
    ModuleSet(base, [module]).logits(IDS).square().sum().backward()
    for name, first in (("up", 100), ("down", 100), ("keys.keys_a", 10)):
        grad = module.get_parameter(f"pools.0.{name}").grad
        assert grad is not None
        rows = grad.coalesce().indices()[0] if grad.is_sparse else grad.any(-1).nonzero()[:, 0]
        assert len(rows) > 0
        assert int(rows.min()) >= first


def test_new_sub_keys_and_inputs_are_trained_too(store: Store) -> None:
    more(store, "+50")
    more(store, None, "drugs", epochs=4)
    drawn, learned = tensors(store, 2), tensors(store, 3)
    for name, first in (("up", 100), ("down", 100), ("keys.keys_a", 10)):
        assert not torch.equal(drawn[f"pools.0.{name}"][first:], learned[f"pools.0.{name}"][first:])


def test_appended_and_trained_at_once_or_one_after_the_other_is_the_same(home: Path, store: Store) -> None:
    other = Store.open(shutil.copytree(store.path, home / "twin"))
    more(store, "+50", "drugs")
    more(other, "+50")
    more(other, None, "drugs")
    for file in ("module.safetensors", router.EVIDENCE, router.VECTORS):
        assert other.module("law").manifest.files[file] == store.module("law").manifest.files[file]
    assert config_of(other) == config_of(store)


def test_what_was_appended_in_parts_is_one_step_once_it_is_trained(store: Store) -> None:
    more(store, "+50")
    more(store, "+10")
    more(store, "+20", "drugs")
    assert config_of(store).steps == (10, 18)
    assert config_of(store).open_steps == 2
    assert [step["experts"] for step in steps_said(store)] == [[100, 180]]
    assert take_back(store, "law").experts == 100
    assert torch.equal(logits(store), logits(store, 1))


@pytest.mark.parametrize("shape", [{"replace_feed_forward": True}, {"layers": "0,2", "vocabulary": "both"}], ids=str)
def test_every_shape_of_module_grows(home: Path, store: Store, shape: dict[str, Any]) -> None:
    settings = LearnConfig(kind="peer", **POOL, **TRAINED, **shape)
    learn(store, "law", [home / "law.jsonl"], settings, update=True, progress=False)
    wanted = logits(store)
    result = more(store, "+50", "drugs", epochs=4)
    assert result.loss_after < 0.98 * result.loss_before
    same_but_rows(tensors(store, 2), tensors(store))
    take_back(store, "law")
    assert torch.equal(logits(store), wanted)


def test_the_manifest_records_every_step(home: Path, store: Store) -> None:
    result = more(store, "+50", "drugs", seed=3)
    more(store, "+10")
    one, two = steps_said(store)
    assert one["experts"] == [100, 150]
    assert two["experts"] == [150, 160]
    assert one["from"] == {"version": 1, "sha256": store.module("law", 1).manifest.files["module.safetensors"]}
    assert (one["seed"], one["tokens"], one["loss_before"], one["loss_after"]) == (
        3, result.tokens, result.loss_before, result.loss_after,
    )  # fmt: skip
    assert [source["path"] for source in one["sources"]] == [str(home / "drugs.jsonl")]
    assert one["settings"]["seed"] == 3
    said = store.module("law").manifest.training
    assert said["loss_before"] == store.module("law", 1).manifest.training["loss_before"]  # that of learning
    assert json.loads(json.dumps(result.to_json()))["experts"] == 150


# The router


def test_the_router_knows_old_and_new_text(home: Path, store: Store) -> None:
    base, tokenizer = store.load_base(), store.load_tokenizer()
    first = load_router(store)
    states = [
        first.states(base, [tokenizer(text)["input_ids"]])
        for text in ("Drug 77 inhibits enzyme 13.", "The tenant of room 7")
    ]
    (before,) = first.route(*states[0])
    more(store, "+50", "drugs")
    for given in states:
        assert names_of(load_router(store).route(*given)) == ["law"]
    (after,) = load_router(store).route(*states[0])
    assert after.scores["law"] > before.scores["law"]
    old, new = (evidence_beside(store.module("law", version)) for version in (1, 2))
    count = len(old[router.VECTORS]["vectors"])
    assert torch.equal(new[router.VECTORS]["vectors"][:count], old[router.VECTORS]["vectors"])
    assert int(new[router.EVIDENCE]["count"]) == len(new[router.VECTORS]["vectors"]) > count
    assert torch.equal(new[router.EVIDENCE]["sum"], new[router.VECTORS]["vectors"].long().sum(0))
    assert steps_said(store)[0]["evidence"]["vectors"] == len(new[router.VECTORS]["vectors"]) - count
    assert steps_said(store)[0]["evidence"]["heldout"] > 0
    # Grown in another order of verbs, the router is the same.
    other = Store.open(shutil.copytree(store.path, home / "twin", ignore=shutil.ignore_patterns("router", "scratch")))
    shutil.copytree(store.path / "router" / "general", other.path / "router" / "general")
    assert load_router(other).route(*states[0]) == load_router(store).route(*states[0])


def test_kept_text_of_all_steps_stays_for_a_router_that_is_trained_on_it(home: Path, store: Store) -> None:
    settings = LearnConfig(kind="peer", keep_samples="1kB", **POOL, **TRAINED)
    learn(store, "law", [home / "law.jsonl"], settings, update=True, progress=False)
    before = router.read_samples(store.module("law"))
    more(store, "+50", "drugs", keep_samples="1kB")
    after = router.read_samples(store.module("law"))
    assert after[: len(before)] == before
    new = store.load_tokenizer().batch_decode(after[len(before) :])
    assert any("Drug" in text for text in new)
    assert steps_said(store)[0]["evidence"]["samples"] == len(new)
    take_back(store, "law")
    assert store.module("law").manifest.files == store.module("law", 2).manifest.files


def test_a_transformer_router_is_trained_with_the_new_text(home: Path) -> None:
    store = Store.create(home / "trained", home / "base", keep_samples="2kB")
    learn(store, "law", [home / "law.jsonl"], LearnConfig(kind="peer", **POOL, **TRAINED), progress=False)
    train_router(store, RouterConfig(router_layers=1, passages=8), progress=False)
    store.set_router("transformer")
    with pytest.raises(StoreError, match="leave out --keep-samples 0"):
        more(store, "+50", "drugs", keep_samples=0)
    assert more(store, "+50", "drugs").router == 2
    assert more(store, "+50").router is None


# Taking back


def test_steps_are_taken_back_one_after_another(store: Store) -> None:
    wanted = logits(store)
    more(store, "+50", "drugs")
    more(store, "+20", "code")
    more(store, "+10")
    for back_to in (3, 2, 1):
        result = take_back(store, "law")
        now, then = (store.module("law", version) for version in (result.version, back_to))
        assert now.manifest.files == then.manifest.files  # weights and the router's evidence
        assert now.manifest.config == then.manifest.config
        assert now.manifest.training["probe"] == then.manifest.training["probe"]
        assert now.manifest.training["growth"] == then.manifest.training.get("growth", [])
    assert torch.equal(logits(store), wanted)
    assert store.module("law").version == 7
    with pytest.raises(ConfigError, match="there is no step to take back"):
        take_back(store, "law")
    assert store.verify() == []
    assert store.module("law", 3).parameters > store.module("law").parameters  # the versions with them stay


def test_it_grows_again_after_a_step_was_taken_back(store: Store) -> None:
    more(store, "+50", "drugs")
    take_back(store, "law")
    more(store, "+50", "drugs")
    assert store.module("law").manifest.files == store.module("law", 2).manifest.files


# Stopped and going on


def test_an_interrupted_growth_goes_on_to_the_same_bytes(home: Path, store: Store) -> None:
    other = Store.open(shutil.copytree(store.path, home / "twin"))
    steps = steps_of(lambda: more(other, "+50", "drugs"))
    for at in (3, len(steps) - 4):
        with at_step(at, interrupt), pytest.raises(Interrupted, match="run the same command again"):
            more(store, "+50", "drugs")
        assert store.module("law").version == 1
    assert steps_of(lambda: more(store, "+50", "drugs"))[0] == len(steps) - 3
    assert store.module("law").manifest.files == other.module("law").manifest.files
    assert list((store.path / "work").glob("*")) == []


def test_other_text_experts_or_settings_are_another_run(store: Store) -> None:
    with at_step(5, interrupt), pytest.raises(Interrupted):
        more(store, "+50", "drugs")
    for arguments, changes in (
        (("+60", "drugs"), {}),
        (("+50", "code"), {}),
        (("+50", "drugs"), {"weight_decay": 0.1}),
    ):
        with at_step(0, interrupt), pytest.raises(Interrupted):
            more(store, *arguments, **changes)
    assert steps_of(lambda: more(store, "+50", "drugs"))[0] == 6


def test_restart_begins_anew(store: Store) -> None:
    with at_step(5, interrupt), pytest.raises(Interrupted):
        more(store, "+50", "drugs")
    assert steps_of(lambda: more(store, "+50", "drugs", restart=True))[0] == 0


@pytest.mark.parametrize("instant", ["growlm.router.committing.add_domain", "growlm.training.grow.empty"])
def test_a_growth_that_was_killed_once_its_version_was_saved_only_has_to_end(
    home: Path, store: Store, monkeypatch: pytest.MonkeyPatch, instant: str
) -> None:
    other = Store.open(shutil.copytree(store.path, home / "twin"))
    wanted = more(other, "+50", "drugs")

    def killed(*arguments: Any) -> None:
        raise SystemExit  # as good as a kill: nothing catches it

    with monkeypatch.context() as patch:
        patch.setattr(instant, killed)
        with pytest.raises(SystemExit):
            more(store, "+50", "drugs")
    results: list[GrowResult] = []
    assert steps_of(lambda: results.append(more(store, "+50", "drugs"))) == []
    timed = {"seconds": 0, "tokens_per_second": 0}
    assert results[0].to_json() | timed == wanted.to_json() | timed
    assert store.module("law").manifest.files == other.module("law").manifest.files
    assert load_router(store).names == ["law", "other"]
    assert list((store.path / "work").glob("*")) == []
    assert more(store, "+50", "drugs").version == 3


def kill_and_go_on(home: Path) -> None:
    store = Store.open(home / "store")

    def until_killed() -> None:
        with at_step(9, kill):
            more(store, "+50", "drugs", checkpoint_seconds=0.0)

    assert exit_code(forked(until_killed)) == -signal.SIGKILL
    assert Store.open(store.path).module("law").version == 1
    assert steps_of(lambda: more(store, "+50", "drugs"))[0] == 9


@pytest.mark.slow
def test_a_killed_growth_goes_on_to_the_same_bytes(home: Path, store: Store) -> None:
    other = Store.open(shutil.copytree(store.path, home / "twin"))
    in_new_process(kill_and_go_on, home)
    more(other, "+50", "drugs")
    assert store.module("law").manifest.files == other.module("law").manifest.files


# Pruning


def rewritten(store: Store, change: Any) -> Peer:
    """Commits the module as its next version after `change` was made to it."""
    stored, base = store.module("law"), store.load_base()
    module = store.load("law", base)
    assert isinstance(module, Peer)
    with torch.no_grad():
        change(module)
    store.commit("law", module, stored.manifest.training, evidence_beside(stored))
    return module


def hide_rows(module: Peer, hidden: list[int]) -> None:
    """Makes sub-keys zero, and all others so large and in such pairs that a query always prefers one of them."""
    for pool in module.pools:
        keys = pool.keys.keys_a
        seen = [row for row in range(len(keys)) if row not in hidden]
        half = len(seen) // 2
        keys[seen[:half]] *= 50
        keys[seen[half : 2 * half]] = -keys[seen[:half]]
        keys[hidden] = 0


def test_sub_keys_that_are_never_found_go_without_a_trace(home: Path, store: Store) -> None:
    rewritten(store, lambda module: hide_rows(module, [0, 3, 4, 7]))
    whole = store.load("law", store.load_base())
    row = 8 + 10 * 2 * 32  # half a key, and ten experts
    keep = (whole.num_parameters() - 4 * row) / whole.num_parameters()
    result = prune_module(store, "law", [home / "law.jsonl"], keep=keep + 1e-9)
    assert result["experts"] == [{"place": "layer 1 sub-keys", "kept": [1, 2, 5, 6, 8, 9], "of": 10, "experts": 10}]
    assert (result["parameters"], config_of(store).steps) == (whole.num_parameters() - 4 * row, (6,))
    pruned, before = tensors(store), tensors(store, 2)
    assert torch.equal(pruned["pools.0.keys.keys_a"], before["pools.0.keys.keys_a"][[1, 2, 5, 6, 8, 9]])
    assert torch.equal(pruned["pools.0.up"][10:20], before["pools.0.up"][20:30])
    base = store.load_base()
    ids = torch.tensor([store.load_tokenizer()("The tenant of room 7 pays 49 crowns.")["input_ids"]])
    for at in (ids, IDS):
        two = ModuleSet(base, [store.load("law", base, version=2)])
        with retrievals() as found:
            wanted = two.logits(at)
        assert not set((found[0].experts // 10).flatten().tolist()) & {0, 3, 4, 7}
        torch.testing.assert_close(ModuleSet(base, [store.load("law", base)]).logits(at), wanted)
    assert store.verify() == []
    with Engine(store) as engine:
        assert forgetting(engine)[1]["changed"] == []


@pytest.mark.parametrize("normalise", ["max", "sum"])
def test_the_least_used_sub_keys_go(home: Path, store: Store, normalise: str) -> None:
    more(store, "+50", "drugs")
    usage = count_usage(*open_modules(store.path, ["law"]), {"text": [home / "drugs.jsonl"]})
    (pool,) = usage.pools["text"]
    uses = pool.gates.view(15, 10).sum(-1)
    result = prune_module(store, "law", [home / "drugs.jsonl"], keep=0.5, normalise=normalise)
    (place,) = result["experts"]
    gone = [row for row in range(15) if row not in place["kept"]]
    assert 0.4 < result["kept"] <= 0.5
    assert float(uses[gone].max()) <= float(uses[place["kept"]].min())
    # Steps keep their own: what was learned first, then what the text taught.
    first = sum(row < 10 for row in place["kept"])
    assert config_of(store).steps == (first, len(place["kept"]))
    assert steps_said(store)[0]["experts"] == [first * 10, len(place["kept"]) * 10]
    step = take_back(store, "law")
    assert step.experts == first * 10
    assert torch.equal(tensors(store)["pools.0.down"], tensors(store, 3)["pools.0.down"][: first * 10])


def test_as_many_rows_of_the_first_step_stay_as_a_token_needs(home: Path, store: Store) -> None:
    more(store, "+50", "drugs")
    rewritten(store, lambda module: hide_rows(module, list(range(10))))
    with pytest.raises(ConfigError, match=r"module 'law': keep is 0\.01; .* 0\.\d\d of the parameters stay") as caught:
        prune_module(store, "law", [home / "law.jsonl"], keep=0.01)
    least = float(str(caught.value).split(" of the parameters")[0].split()[-1])
    prune_module(store, "law", [home / "law.jsonl"], keep=least)
    assert config_of(store).steps == (1, 1)  # the step has lost all, and its text can still be taken back
    assert logits(store).isfinite().all()
    take_back(store, "law")
    assert store.module("law").manifest.files[router.VECTORS] == store.module("law", 1).manifest.files[router.VECTORS]
    assert more(store, "+50", "drugs").experts == 60


def test_pools_of_several_layers_keep_steps_of_one_size(home: Path, store: Store) -> None:
    settings = LearnConfig(kind="peer", layers="0,2", **POOL, **TRAINED)
    learn(store, "law", [home / "law.jsonl"], settings, update=True, progress=False)
    more(store, "+50", "drugs")
    result = prune_module(store, "law", [home / "law.jsonl"], keep=0.6)
    one, two = (place["kept"] for place in result["experts"])
    assert [p["place"] for p in result["experts"]] == ["layer 0 sub-keys", "layer 2 sub-keys"]
    assert len(one) == len(two) < 15
    assert sum(row < 10 for row in one) == sum(row < 10 for row in two) == config_of(store).steps[0]
    assert one != two
    take_back(store, "law")
    assert logits(store).isfinite().all()


@pytest.mark.parametrize("replace", [False, True])
def test_pools_of_the_base_are_not_taken_for_the_module_s(home: Path, replace: bool) -> None:
    own = {"feed_forward": ["dense", "peer", "peer", "dense"], "peer_num_experts": [0, 64, 36, 0]}
    plain = {"attention": "softmax", "num_attention_experts": 0, "num_experts": 0}
    save_base(home / "pools", "growlm", peer_num_heads=2, peer_top_k=4, **own, **plain)
    store = Store.create(home / "mixed", home / "pools")
    settings = LearnConfig(kind="peer", layers="1,2", replace_feed_forward=replace, **POOL, **TRAINED)
    learn(store, "law", [home / "law.jsonl"], settings, progress=False)
    result = prune_module(store, "law", [home / "law.jsonl"], keep=0.6)
    assert [(place["place"], place["of"]) for place in result["experts"]] == [
        ("layer 1 sub-keys", 10),
        ("layer 2 sub-keys", 10),
    ]
    module = store.load("law", store.load_base())
    assert isinstance(module, Peer)
    assert [len(pool.up) for pool in module.pools] == [config_of(store).steps[0] * 10] * 2


# Bad input


def refused(store: Store, error: type[Exception], words: str, action: Any) -> None:
    """It is refused in one line, and nothing has changed."""
    before = all_files(store.path / "modules")
    with pytest.raises(error, match=words) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert all_files(store.path / "modules") == before
    assert [p for p in (store.path / "work").glob("*") if p.suffix == ".lock"] == []


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ("+55", r"experts is \+55; a sub-key of this module's pools has 10 experts, .* use \+50 or \+60"),
        (3, r"experts is \+3; .* use \+10 or \+20"),
        ("many", "experts is 'many'; give how many"),
        ("0", "experts is '0'; give how many"),
        ("-50", "experts is '-50'; give how many"),
        ("1.5", r"experts is '1\.5'; give how many"),
        ("", "experts is ''; give how many"),
        (10**13, r"bytes, and .* are free"),
        ("9" * 15, "use .* or|bytes, and .* are free"),
        ("9" * 5000, r"experts is '9{40}\.\.\.'; give how many"),
        ("１０", "experts is '１０'; give how many"),
    ],
)
def test_numbers_by_which_it_cannot_grow_are_refused(store: Store, experts: int | str, words: str) -> None:
    for texts in ((), ("drugs",)):
        refused(store, ConfigError, words, lambda texts=texts: more(store, experts, *texts))


def test_status_tells_how_many_experts_there_are(store: Store) -> None:
    def told() -> str:
        return next(m["about"] for m in store.status()["modules"] if m["name"] == "law")

    assert told() == "100 experts"
    more(store, "+50")
    assert told() == "150 experts, 50 of them not trained"
    more(store, None, "drugs")
    assert told() == "150 experts"


def test_what_cannot_be_grown(home: Path, store: Store) -> None:
    refused(store, ConfigError, "nothing to do", lambda: more(store))
    refused(
        store, ConfigError, "law/1: all its experts are trained; say with --experts", lambda: more(store, None, "drugs")
    )
    refused(store, ConfigError, "law/1: .* no step to take back", lambda: take_back(store, "law"))
    for action in (lambda name: grow(store, name, 10), lambda name: take_back(store, name)):
        refused(
            store, ConfigError, "other/1: is of kind blocks; modules of kind peer grow", lambda a=action: a("other")
        )
        refused(store, UnknownModuleError, "no module 'nobody'", lambda a=action: a("nobody"))
    refused(store, DataError, "nowhere", lambda: more(store, "+50", "nowhere"))
    refused(store, ConfigError, "has 256 positions", lambda: more(store, "+50", "drugs", sequence_length=300))


def test_tables_that_are_in_use_on_the_disk_cannot_grow(store: Store) -> None:
    base = store.load_base()
    module = store.load("law", base, row_cache=100_000)
    assert isinstance(module, Peer)
    for action in (lambda: module.grown(base, 10), lambda: module.with_rows(base, [torch.arange(5)], module.config)):
        with pytest.raises(ConfigError, match=r"tables are on the disk, .* load it without row_cache"):
            action()
    # An engine that reads them goes on with its version while the store gets the next one.
    with Engine(store, experts_on="disk") as engine:
        wanted = engine.logits(IDS, "law")
        more(store, "+50", "drugs")
        assert torch.equal(engine.logits(IDS, "law"), wanted)


def test_one_growth_of_a_module_at_a_time(store: Store) -> None:
    with locked(store.path / "work" / "law-grow.lock", wait=False, keep=False):
        for action in (
            lambda: more(store, "+50"),
            lambda: more(store, "+50", "drugs"),
            lambda: take_back(store, "law"),
        ):
            with pytest.raises(StoreError, match="'law' is being changed by another process; wait for it"):
                action()
    more(store, "+50")


def test_a_module_that_changed_meanwhile_is_not_replaced(home: Path, store: Store) -> None:
    def learned() -> None:
        settings = LearnConfig(kind="peer", **POOL, **TRAINED)
        stored = store.module("law")
        store.commit(
            "law", store.load("law", store.load_base()), {"settings": settings.to_json()}, evidence_beside(stored)
        )

    with at_step(3, learned), pytest.raises(StoreError, match=r"version 1 of .law. is not the current one any more"):
        more(store, "+50", "drugs")
    assert store.module("law").version == 2


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_table_is_named(store: Store, damage: str) -> None:
    more(store, "+50")
    path = store.module("law").folder / "module.safetensors"
    if damage == "flipped":
        flip(path)
    else:
        path.write_bytes(path.read_bytes()[:2000])
    for action in (lambda: more(store, "+50"), lambda: more(store, None, "drugs"), lambda: take_back(store, "law")):
        refused(store, IntegrityError, r"law/2/module\.safetensors", action)


def test_a_manifest_that_does_not_say_how_it_has_grown_is_refused(store: Store) -> None:
    more(store, "+50", "drugs")
    stored = store.module("law")
    said = stored.manifest.training
    for growth in ([], [{**said["growth"][0], "experts": [100, 140]}], [{}]):
        edit(stored.folder / "module.json", training={**said, "growth": growth})
        for action in (lambda: more(store, "+50"), lambda: take_back(store, "law")):
            refused(
                store, IntegrityError, r"does not say how its pools have grown|growth\.0\.\w+: Field required", action
            )
    edit(stored.folder / "module.json", training=said, config={**stored.manifest.config, "steps": [10, 5]})
    refused(store, IntegrityError, "may not fall", lambda: more(store, "+50"))


# The command line


def test_the_command_line(home: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--sequence-length", "16", "--batch-size", "4", "--precision", "float32", "--router-samples", "16"]

    def call(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    status, out, _ = call("grow", store.path, "law", "--experts", "+50")
    assert (status, out) == (0, "law version 2: 100 -> 150 experts, 50 of them not trained: it answers as before\n")
    status, out, _ = call("grow", store.path, "law", "--data", home / "drugs.jsonl", *settings)
    assert status == 0
    assert out.startswith("law version 3: 100 -> 150 experts; held-out loss ")
    status, out, _ = call(
        "grow", store.path, "law", "--experts", "+50", "--data", home / "code.jsonl", *settings, "--json"
    )
    assert json.loads(out)["experts"] == 200
    status, out, _ = call("grow", store.path, "law", "--undo")
    assert (status, out) == (0, "law version 5: 200 -> 150 experts\n")
    assert store.module("law").manifest.files == store.module("law", 3).manifest.files
    status, out, _ = call("prune", store.path, "--module", "law", "--data", home / "law.jsonl", "--keep", "0.5")
    assert status == 0
    assert "layer 1 sub-keys: " in out
    assert " of 15, each with 10 experts" in out
    status, out, _ = call("usage", store.path, "--module", "law", "--data", f"law={home / 'law.jsonl'}")
    assert status == 0
    assert "layer 1 product keys" in out
    for arguments, words in (
        (["--undo", "--data", home / "law.jsonl"], "--undo trains nothing, so that --data is of no effect"),
        (["--undo", "--epochs", "3"], "--epochs is of no effect"),
        (["--experts", "+50", "--epochs", "3"], "--experts without --data trains nothing"),
        (["--experts", "-50"], "experts is '-50'"),
        (["--experts", "50"], "--experts 50: so many are appended to those that there are; write --experts +50"),
        ([], "nothing to do"),
    ):
        status, out, err = call("grow", store.path, "law", *arguments)
        assert (status, out) == (1, "")
        assert words in err
        assert err.count("\n") == 1


def test_public_names() -> None:
    assert growlm.grow is grow
    assert growlm.take_back is take_back
    assert growlm.GrowConfig is GrowConfig


def test_evidence_of_other_states_is_not_joined(home: Path, store: Store) -> None:
    """Of a module that was copied from a store whose router reads elsewhere."""
    edit(store.module("law").folder / "module.json", routing_layer=3)
    with pytest.raises(IntegrityError, match=r"of its states after layer 3, .* learn 'law' here, with --update"):
        more(store, "+50", "drugs")
    # What reads no text keeps the evidence, and what it is of.
    grow(store, "law", 10)
    assert store.module("law").manifest.routing_layer == 3
    prune_module(store, "law", [home / "law.jsonl"], keep=0.9)
    assert (store.module("law").version, store.module("law").manifest.routing_layer) == (3, 3)
