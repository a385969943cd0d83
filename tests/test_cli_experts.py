"""The command line on experts: several modules in one answer, usage, pruning of models and modules, dropped layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from growlm import cli, router
from growlm.store import Store
from stores import add_experts, add_module, domain_ids, save_lively_base
from tiny import TEXT, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of experts, a store for it with two modules of experts and one of blocks, and a text."""
    home = tmp_path_factory.mktemp("made")
    store = Store.create(home / "store", save_lively_base(home / "base", "growlm"))
    base = store.load_base()
    add_experts(store, base, "letters", 1, num_experts=6, num_attention_experts=5)
    add_experts(store, base, "digits", 2, num_experts=4)
    add_module(store, base, "signs", 3)
    texts = domain_ids(store.load_tokenizer(), "general")
    router.write_general(store, base, [(texts[:30], texts[30:])])
    (home / "text.txt").write_text("\n".join(TEXT * 4))
    return home


@pytest.fixture
def home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs a command line in this process: exit status, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture
def answer(run):
    def call(*arguments: str) -> dict[str, Any]:
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


def test_modules_that_are_named_write_together(home, answer, run):
    options = ("--max-new-tokens", "6")
    both = answer("generate", "store", "abc", "--module", "letters", "--module", "digits", *options)
    assert (both["module"], both["modules"]) == ("digits+letters", ["digits", "letters"])
    assert sorted(both["loaded"]) == ["digits", "letters"]
    again = answer("generate", "store", "abc", "--module", "digits", "--module", "letters", *options)
    assert again["text"] == both["text"]
    alone = answer("generate", "store", "abc", "--module", "letters", *options)
    assert (alone["module"], alone["modules"]) == ("letters", ["letters"])
    nothing = answer("generate", "store", "abc", "--module", "base", *options)
    assert (nothing["module"], nothing["modules"]) == (None, [])
    assert nothing["resident_bytes"] < alone["resident_bytes"] < both["resident_bytes"]
    code, out, err = run("generate", "store", "abc", "--module", "letters", "--module", "digits", *options)
    assert (code, out) == (0, both["text"] + "\n")
    assert err.startswith("[digits+letters; ")


def test_a_conversation_with_several(home, run, monkeypatch):
    lines = iter(["/module letters digits", "abc", "/module letters signs", "/module", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    code, _, err = run("chat", "store", "--max-new-tokens", "3")
    assert code == 0
    assert "[digits+letters]" in err.splitlines()
    assert sum("signs is of kind blocks" in line for line in err.splitlines()) == 1


def test_a_module_is_pruned_in_its_store(home, answer, run):
    found = answer("prune", "store", "--module", "letters", "--data", "text.txt", "--keep", "0.7")
    assert (found["module"], found["version"], found["path"]) == ("letters", 2, "store")
    assert found["parameters"] <= 0.7 * found["parameters_before"]
    listed = {m["name"]: m for m in answer("status", "store")["modules"]}
    assert (listed["letters"]["version"], listed["letters"]["parameters"]) == (2, found["parameters"])
    assert listed["digits"]["version"] == 1
    assert run("verify", "store")[0] == 0
    usage = answer("usage", "store", "--module", "letters", "--data", "text=text.txt")
    new = [p["new"] for p in usage["places"] if p["new"]]
    assert new == [len(p["kept"]) for p in found["experts"]]
    code, out, _ = run(
        "prune", "store", "--module", "letters", "--data", "text.txt", "--keep", "0.95", "--tokens", "50"
    )
    assert code == 0
    assert out.startswith("store: letters version 3: ")
    assert answer("generate", "store", "abc", "--module", "letters", "--max-new-tokens", "3")["module"] == "letters"
    answer("remove", "store", "letters", "--version", "3", "--yes")
    answer("remove", "store", "letters", "--version", "2", "--yes")
    assert Store.open("store").module("letters").version == 1


def test_a_module_is_pruned_into_a_store_of_its_own(home, answer):
    found = answer("prune", "store", "small", "--module", "letters", "--data", "text.txt", "--keep", "0.7")
    assert (found["path"], found["version"]) == ("small", 1)
    assert [m["name"] for m in answer("status", "small")["modules"]] == ["letters"]
    assert answer("generate", "small", "abc cab", "--max-new-tokens", "3")["module"] == "letters"
    assert Store.open("store").module("letters").version == 1


def test_a_model_is_pruned(home, answer, run):
    found = answer("prune", "base", "small", "--data", "text.txt", "--keep", "0.9", "--normalise", "sum")
    assert AutoModelForCausalLM.from_pretrained("small").num_parameters() == found["parameters"]
    code, out, _ = run("prune", "base", "smaller", "--data", "text.txt", "--keep", "0.9")
    assert code == 0
    assert "of 4 experts" in out


def test_text_under_another_key_is_counted_and_pruned_on(home, answer):
    lines = Path("text.txt").read_text().split("\n")
    Path("body.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines if line.strip()))
    key = ("--text-key", "body")
    found = answer("usage", "base", "--data", "text=body.jsonl", *key)
    parts = answer("usage", "base", "--data", "text=text.txt", "--separator", "\n")
    assert found["tokens"] == parts["tokens"]
    assert answer("prune", "base", "small", "--data", "body.jsonl", "--keep", "0.9", *key)["kept"] <= 0.9


@pytest.mark.parametrize(("order", "kept"), [("top", [0, 1]), ("uniform", [0, 3])])
def test_layers_are_dropped(home, answer, run, order, kept):
    found = answer("prune", "base", "shallow", "--drop-layers", order, "--keep", "0.5")
    assert found["layers"] == {"kept": kept, "of": 4}
    model = AutoModelForCausalLM.from_pretrained("shallow")
    assert model.config.num_hidden_layers == 2
    assert model.num_parameters() == found["parameters"] < found["parameters_before"]
    assert model(random_ids(1, 5)).logits.isfinite().all()
    code, out, _ = run("prune", "base", "again", "--drop-layers", order, "--keep", "0.5")
    assert code == 0
    assert f"layers {kept[0]}, {kept[1]} of 4" in out
    assert answer("new", "grown", "--base", "shallow")  # a base like any other


TEXT_AND_SHARE = ("--data", "text.txt", "--keep", "0.7")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("prune", "store", *TEXT_AND_SHARE), "module of kind experts or peer with --module: digits, letters"),
        (("prune", "store", "--module", "letters", "--keep", "0.5"), "--data is missing"),
        (("prune", "store", "--module", "signs", *TEXT_AND_SHARE), "is of kind blocks; only modules of kind experts"),
        (("prune", "store", "--module", "nobody", *TEXT_AND_SHARE), "no module 'nobody'"),
        (("prune", "store", "base", "--module", "letters", *TEXT_AND_SHARE), "base: exists already"),
        (("prune", "store", "--drop-layers", "top", "--keep", "0.5"), "--drop-layers is for a model's folder"),
        (("prune", "base", "out", "--module", "letters", *TEXT_AND_SHARE), "base: is no store; --module letters"),
        (("prune", "base", *TEXT_AND_SHARE), "say where the smaller model goes: growlm prune base OUT"),
        (("prune", "base", "out", "--keep", "0.5"), "--data is missing"),
        (("prune", "base", "out", *TEXT_AND_SHARE, "--drop-layers", "top"), "leave out --data, or --drop-layers"),
        (("prune", "base", "out", "--drop-layers", "top", "--keep", "0.5", "--normalise", "max"), "leave out --norm"),
        (("prune", "base", "out", "--drop-layers", "top", "--keep", "0.5", "--tokens", "9"), "leave out --tokens"),
        (("prune", "base", "out", "--drop-layers", "bottom", "--keep", "0.5"), "'bottom' is not one of top, uniform"),
        (("prune", "base", "out", "--drop-layers", "top", "--keep", "0.05"), "which leaves none"),
        (("prune", "base", "out", "--drop-layers", "top", "--keep", "1.5"), "it is a share of the layers"),
        (("generate", "store", "abc", "--module", "letters", "--module", "signs"), "signs is of kind blocks"),
        (("generate", "store", "abc", "--module", "letters", "--module", "auto"), "auto cannot be active together"),
        (("generate", "store", "abc", "--module", "base", "--module", "letters"), "base cannot be active together"),
        (("generate", "store", "abc", "--module", "letters", "--module", "nobody"), "no module 'nobody'"),
        (("generate", "store", "abc", "--module", "letters", "--mix", "2"), "leave out --module letters"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(home, run, arguments, word):
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("growlm: ")
    assert word in err
    assert not (home / "out").exists()
