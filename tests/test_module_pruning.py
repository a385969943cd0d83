"""Pruning of a store's module of experts: what goes, what stays, and that nothing else of the store changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from disk import all_files, edit
from growlm import router
from growlm.base import Base
from growlm.engine import Engine
from growlm.errors import ConfigError, DataError, IntegrityError, StoreError, UnknownModuleError
from growlm.evaluation.forgetting import forgetting
from growlm.layers.experts import AttentionExperts, SparseFeedForward
from growlm.layers.insertion import NewExperts
from growlm.modules import ModuleSet, attached
from growlm.modules.experts import Experts, ExpertsConfig
from growlm.store import Store
from growlm.surgery.module_pruning import choose_module_experts, prune_module
from growlm.usage.usage import Usage, count_usage, open_modules, places_of
from stores import add_experts, add_module, commit_experts, domain_ids, save_lively_base
from tiny import TEXT, make_model, make_tokenizer, perturb, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ["llama", "growlm"]
IDS = random_ids(2, 11)


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("made")
    store = Store.create(home / "store", save_lively_base(home / "base", request.param))
    base = store.load_base()
    add_experts(store, base, "letters", 1, num_experts=6, num_attention_experts=5, vocabulary="head")
    add_experts(store, base, "digits", 2, num_experts=4, first_layer=1, vocabulary="none")
    add_module(store, base, "signs", 3)
    texts = domain_ids(store.load_tokenizer(), "general")
    router.write_general(store, base, [(texts[:30], texts[30:])])
    (home / "text.txt").write_text("\n".join(TEXT * 4))
    return home


@pytest.fixture
def text(home: Path) -> list[Path]:
    return [home / "text.txt"]


def load(store: Store, name: str, base: Base, version: int | None = None) -> Experts:
    module = store.load(name, base, version=version)
    assert isinstance(module, Experts)
    return module


def rows_of(part: torch.nn.Module) -> torch.Tensor:
    """What a part's router compares tokens with, a row an expert."""
    return part.embeddings if isinstance(part, NewExperts) else part.router.embeddings


def parts(module: Experts) -> dict[str, torch.nn.Module]:
    found = {}
    for i, layer in enumerate(module.layers, start=module.config.first_layer):
        found[f"layer {i} feed-forward"] = layer.feed_forward
        if layer.attention is not None:
            found[f"layer {i} attention"] = layer.attention
    return found


# What goes and what stays


def decide_by_token(router: torch.nn.Module) -> None:
    """Makes a router's features positive, and its rows so that no expert is preferred whatever the token."""
    router.project.weight.mul_(4)
    router.project.bias.fill_(40.0)
    router.embeddings.sub_(router.embeddings.mean(-1, keepdim=True))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_experts_that_are_never_used_go_without_a_trace(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    for part in model.modules():
        if isinstance(part, SparseFeedForward | AttentionExperts):
            decide_by_token(part.router)
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text(" ".join(TEXT * 4) + "".join(map(chr, range(33, 120))) * 20)
    store = Store.create(tmp_path / "store", tmp_path / "base")
    base = store.load_base()
    settings = {"num_experts": 5, "num_attention_experts": 4, "router_size": 8, "expert_size": 16, "vocabulary": "head"}
    module = Experts.create(base, ExpertsConfig(**settings), torch.arange(20, 300))
    module.enable_new_experts()
    perturb(module, 1, strength=0.3)
    for part in parts(module).values():
        if isinstance(part, SparseFeedForward):
            decide_by_token(part.router)
        else:
            part.embeddings.sub_(part.embeddings.mean(-1, keepdim=True))
        rows_of(part)[[0, 3]] = -30.0  # features are positive: it is never chosen, and its share is nothing
    commit_experts(store, base, "letters", module)
    usage = count_usage(ModuleSet(base, [module]), store.load_tokenizer(), {"a": [tmp_path / "text.txt"]})
    for place, counts in zip(usage.places, usage.counts["a"], strict=True):
        assert [e for e in range(place.new) if not counts[-place.new :][e]] == ([0, 3] if place.new else [])
    total = module.num_parameters()
    maps = [
        (p.up.weight, p.down.weight) if isinstance(p, SparseFeedForward) else (p.first.weight, p.second.weight)
        for p in parts(module).values()
    ]
    unused = sum(2 * t[0].numel() for m, p in zip(maps, parts(module).values(), strict=True) for t in (*m, rows_of(p)))
    result = prune_module(store, "letters", [tmp_path / "text.txt"], keep=(total - unused) / total + 1e-9)
    assert result["parameters"] == total - unused
    assert all(place["kept"] == [e for e in range(place["of"]) if e not in (0, 3)] for place in result["experts"])
    whole, pruned = load(store, "letters", base, 1), load(store, "letters", base, 2)
    wanted = ModuleSet(base, [whole]).logits(IDS)
    assert not torch.allclose(wanted, base.logits(IDS), atol=1e-2)
    torch.testing.assert_close(ModuleSet(base, [pruned]).logits(IDS), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalise", ["max", "sum"])
def test_the_least_used_of_its_own_experts_go(home: Path, store: Store, text: list[Path], normalise: str) -> None:
    base = store.load_base()
    whole = load(store, "letters", base)
    usage = count_usage(ModuleSet(base, [whole]), store.load_tokenizer(), {"a": text})
    result = prune_module(store, "letters", text, keep=0.75, normalise=normalise)
    pruned = load(store, "letters", base)
    assert (result["version"], result["parameters"]) == (2, pruned.num_parameters())
    assert 0.6 < result["kept"] == pruned.num_parameters() / whole.num_parameters() <= 0.75
    before, after = parts(whole), parts(pruned)
    kept = {place["place"]: place["kept"] for place in result["experts"]}
    assert kept.keys() == before.keys() == after.keys()
    scores: list[tuple[float, bool, bool]] = []
    for place, counts in zip(usage.places, usage.counts["a"], strict=True):
        if place.name not in kept:
            assert place.new == 0
            continue
        assert torch.equal(rows_of(after[place.name]), rows_of(before[place.name])[kept[place.name]])
        score = (counts / (counts.max() if normalise == "max" else counts.sum()))[-place.new :]
        beside = isinstance(before[place.name], SparseFeedForward)
        stays = sorted(range(place.new), key=lambda e, s=score: -s[e])[: 2 if beside else 1]
        scores += [(float(score[e]), e in kept[place.name], e in stays) for e in range(place.new)]
    gone = [s for s, keeps, _ in scores if not keeps]
    assert gone
    # What stayed is used at least as much as what went, wherever it was, but for the few that a layer needs.
    assert max(gone) <= min(s for s, keeps, needed in scores if keeps and not needed)
    # The same from its own rows and maps: outputs are those of a module that never had the others.
    for name, part in after.items():
        tensors = dict(before[name].named_parameters())
        for key, value in part.named_parameters():
            same = tensors[key][kept[name]] if len(tensors[key]) != len(value) else tensors[key]
            assert torch.equal(value, same), (name, key)


def test_the_order_that_is_asked_for(made: Path) -> None:
    base = Store.open(made / "store").load_base()
    module = Experts.create(base, ExpertsConfig(num_experts=5, num_attention_experts=0, vocabulary="none"))
    module.enable_new_experts()
    places = [place for place in places_of(ModuleSet(base, [module])) if place.new]
    counts = [torch.zeros(place.num_experts, dtype=torch.int64) for place in places]
    for number, (place, count) in enumerate(zip(places, counts, strict=True)):
        count[-place.new :] = torch.tensor([2, 80, 1, 100, 90] if number else [50, 48, 46, 44, 42])
    usage = Usage(places, {"a": counts}, {})
    left = {
        normalise: [
            len(choose_module_experts(module, usage, "a", keep=keep, normalise=normalise)[1][0])
            for keep in (0.6, 0.65, 0.7, 0.75, 0.8)
        ]
        for normalise in ("max", "sum")
    }
    # Where all are used alike, each has a small share of the choices.
    assert sum(left["max"]) > sum(left["sum"])
    assert all(a >= b for a, b in zip(left["max"], left["sum"], strict=True))


def test_counts_are_those_of_the_module_over_the_text(home: Path, store: Store, text: list[Path]) -> None:
    modules, tokenizer = open_modules(store.path, ["digits"])
    usage = count_usage(modules, tokenizer, {"a": text}, tokens=40)
    prune_module(store, "digits", text, keep=0.8, tokens=40)
    said = store.module("digits").manifest.training["pruned"]
    assert [(p["version"], p["keep"], p["tokens"]) for p in said] == [(1, 0.8, usage.tokens["a"])]
    assert [s["path"] for s in said[0]["sources"]] == [str(text[0])]
    assert said[0]["sources"][0]["sha256"]


def test_keeping_everything_changes_nothing(home: Path, store: Store, text: list[Path]) -> None:
    base = store.load_base()
    prune_module(store, "letters", text, keep=1.0)
    one, two = (load(store, "letters", base, version) for version in (1, 2))
    assert one.config == two.config
    assert torch.equal(ModuleSet(base, [one]).logits(IDS), ModuleSet(base, [two]).logits(IDS))


def test_text_decides(home: Path, store: Store) -> None:
    (home / "one.txt").write_text("abc cab bca " * 40)
    (home / "two.txt").write_text("0 1 2 3 4 " * 40)
    kept = [
        prune_module(store, "digits", [home / n], keep=0.6, out=home / n[:3])["experts"] for n in ("one.txt", "two.txt")
    ]
    assert kept[0] != kept[1]


# Nothing else changes


def test_the_rest_of_the_store_keeps_its_bytes(home: Path, store: Store, text: list[Path]) -> None:
    base = store.load_base()
    before = {folder: all_files(home / folder) for folder in ("store/modules", "base")}
    with Engine(store) as engine:
        wanted = {name: engine.logits(IDS, name) for name in ("digits", "signs", None)}
        routes = engine.route("abc cab")
    prune_module(store, "letters", text, keep=0.7)
    after = {folder: all_files(home / folder) for folder in before}
    assert after["base"] == before["base"]
    assert {k: after["store/modules"][k] for k in before["store/modules"]} == before["store/modules"]
    assert {k.split("/")[0:2] == ["letters", "2"] for k in after["store/modules"].keys() - before["store/modules"]} == {
        True
    }
    assert store.verify() == []
    with Engine(store) as engine:
        assert all(torch.equal(engine.logits(IDS, name), logits) for name, logits in wanted.items())
        assert engine.route("abc cab") == routes
        assert forgetting(engine) == (
            0.0,
            {"checked": ["base", "digits", "letters", "signs"], "changed": [], "not_comparable": []},
        )
        assert engine.modules.resident_bytes == sum(engine.store.module(n).bytes for n in engine.modules.resident)
    # The old version is there, and is current again once the new one goes.
    store.remove("letters", 2)
    assert torch.equal(
        ModuleSet(base, [load(store, "letters", base)]).logits(IDS),
        ModuleSet(base, [load(store, "letters", base, 1)]).logits(IDS),
    )


def test_a_new_store_holds_the_smaller_module_alone(home: Path, store: Store, text: list[Path]) -> None:
    before = all_files(home / "store" / "modules") | all_files(home / "store" / "router")
    result = prune_module(store, "letters", text, keep=0.7, out=home / "apart" / "small")
    assert all_files(home / "store" / "modules") | all_files(home / "store" / "router") == before
    made = Store.open(home / "apart" / "small")
    assert (list(made.modules), made.verify()) == (["letters"], [])
    assert made.base_folder.resolve() == (home / "base").resolve()
    assert made.module("letters").parameters == result["parameters"] < store.module("letters").parameters
    assert store.module("letters").version == 1
    with Engine(made) as engine:
        assert engine.generate("abc cab bac", max_new_tokens=3).module == "letters"
        assert engine.route("VW XYZ ZYX WV").module is None


# What was pruned is a module like any other


def test_layers_of_different_sizes_are_a_module_like_any_other(home: Path, store: Store, text: list[Path]) -> None:
    base = store.load_base()
    prune_module(store, "letters", text, keep=0.7)
    prune_module(store, "digits", text, keep=0.8)
    small = load(store, "letters", base)
    recorded = store.module("letters").manifest.config
    sizes = [len(rows_of(layer.feed_forward)) for layer in small.layers]
    assert recorded["num_experts"] == sizes
    assert recorded["num_attention_experts"] == [
        0 if layer.attention is None else len(rows_of(layer.attention)) for layer in small.layers
    ]
    assert len(set(sizes)) > 1
    assert ExpertsConfig.model_validate(json.loads(small.config.model_dump_json())) == small.config
    wanted = ModuleSet(base, [small]).logits(IDS)
    with attached(base.model, small):
        torch.testing.assert_close(base.model(IDS).logits, wanted)
        assert base.model.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape == (1, 14)
    both = ["digits", "letters"]
    with Engine(store) as engine:
        assert engine.generate("abc", module=both, max_new_tokens=4).modules == both
        assert torch.equal(engine.logits(IDS, "letters"), wanted)
    usage = count_usage(*open_modules(store.path, both), {"a": text})
    counted = {place["layer"]: place["new"] for place in usage.to_json()["places"] if place["part"] == "attention"}
    assert all(counted[i] >= n for i, n in enumerate(recorded["num_attention_experts"]) if n)
    again = prune_module(store, "letters", text, keep=0.95)
    assert (again["version"], len(store.module("letters").manifest.training["pruned"])) == (3, 2)
    assert again["parameters"] < small.num_parameters()


def test_usage_says_which_experts_are_new(home: Path, store: Store, text: list[Path]) -> None:
    usage = count_usage(*open_modules(store.path, ["letters"]), {"a": text})
    module = load(store, "letters", store.load_base())
    assert {p.name: p.new for p in usage.places if p.new} == {
        n: len(rows_of(part)) for n, part in parts(module).items()
    }
    for place in usage.places:
        joined = 0 < place.new < place.num_experts
        (line,) = (line for line in usage.lines() if place.name in line)
        assert (f"new from {place.num_experts - place.new} on" in line) == joined


# Bad input


def test_what_cannot_be_pruned(home: Path, store: Store, text: list[Path]) -> None:
    def refused(error: type[Exception], word: str, name: str | None = "letters", **changes: Any) -> None:
        with pytest.raises(error, match=word):
            prune_module(store, name, changes.pop("data", text), **{"keep": 0.5, **changes})

    refused(ConfigError, "name a module of kind experts or peer with --module: digits, letters", None)
    refused(ConfigError, "store: module 'signs' is of kind blocks; only modules of kind experts or peer", "signs")
    refused(UnknownModuleError, "no module 'nobody'", "nobody")
    refused(ConfigError, r"keep is 0\.01; .* 0\.\d\d of the parameters stay", keep=0.01)
    refused(ConfigError, "keep is 1.5", keep=1.5)
    refused(ConfigError, "normalise is 'mean'", normalise="mean")
    refused(StoreError, "exists already", out=home / "store")
    refused(DataError, "nowhere", data=["nowhere.txt"])
    base = store.load_base()
    if base.config.model_type == "growlm":
        new = Experts.create(base, ExpertsConfig(vocabulary="none", num_attention_experts=0, first_layer=3))
        commit_experts(store, base, "shut", new, domain="other")
        refused(ConfigError, "store: module 'shut': its experts are untrained", "shut")
    assert [m.version for m in store.modules.values()] == [1] * len(store.modules)


def test_the_least_share_that_is_named_can_be_reached(home: Path, store: Store, text: list[Path]) -> None:
    with pytest.raises(ConfigError) as refusal:
        prune_module(store, "letters", text, keep=0.01)
    least = float(str(refusal.value).split(" of the parameters")[0].split()[-1])
    result = prune_module(store, "letters", text, keep=least)
    base = store.load_base()
    for name, part in parts(load(store, "letters", base)).items():
        needed = 2 if isinstance(part, SparseFeedForward) else 1
        assert len(rows_of(part)) >= needed, name
    assert result["kept"] <= least


def test_a_module_that_changed_meanwhile_is_not_replaced(
    home: Path, store: Store, text: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = store.load_base()

    def slow(*arguments: Any, **options: Any) -> Any:
        add_experts(store, base, "letters", 7, num_experts=2)
        return count_usage(*arguments, **options)

    monkeypatch.setattr("growlm.surgery.module_pruning.count_usage", slow)
    with pytest.raises(StoreError, match=r"version 1 of .* is not the current one any more"):
        prune_module(store, "letters", text, keep=0.7)
    assert store.module("letters").version == 2


@pytest.mark.parametrize(
    ("numbers", "word"),
    [
        ([3], r"num_experts lists 1 layers; .* has [34] from layer 0 on"),
        ([0, 3, 3, 3], "num_experts"),
        ("many", "num_experts"),
    ],
)
def test_a_manifest_with_other_numbers_is_refused(home: Path, store: Store, numbers: Any, word: str) -> None:
    stored = store.module("letters")
    edit(stored.folder / "module.json", config={**stored.manifest.config, "num_experts": numbers})
    store = Store.open(store.path)
    with pytest.raises(IntegrityError, match=word):
        store.load("letters", store.load_base())
