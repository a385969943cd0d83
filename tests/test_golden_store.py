"""A store that an earlier release wrote opens, answers as it did, and can be changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from disk import write_jsonl
from golden.make_store import text
from growlm import Engine, LearnConfig, learn

GOLDEN = Path(__file__).parent / "golden" / "store-1"
ANSWERS = json.loads((GOLDEN / "answers.json").read_text())
ROUTERS = ("gaussian", "product-key", "transformer")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path_factory.mktemp("golden") / "home"))


def test_every_file_is_what_its_manifest_says(store):
    assert store.verify() == []
    assert {name: (m.version, m.kind) for name, m in store.modules.items()} == {
        "drugs": (1, "blocks"),
        "law": (1, "blocks"),
        "signs": (1, "experts"),
        "tales": (2, "peer"),
    }
    assert "128 experts" in store.modules["tales"].about()


@pytest.mark.versions
@pytest.mark.parametrize("name", [name for name in ANSWERS if name not in ROUTERS])
def test_modules_answer_as_they_did(store, name):
    said, module = ANSWERS[name], name.rpartition(" by ")[2]
    with Engine(store, device="cpu") as engine:
        module = None if module == "base" else module
        logits = engine.logits(torch.tensor([said["prompt"]]), module)[0, -1, ::8]
        torch.testing.assert_close(logits, torch.tensor(said["logits"]), rtol=1e-4, atol=1e-4)
        assert engine.generate(said["prompt"], module=module, max_new_tokens=12).tokens == said["tokens"]


@pytest.mark.parametrize("kind", ROUTERS)
def test_routers_choose_as_they_did(store, kind):
    with Engine(store, router=kind, device="cpu") as engine:
        for domain, said in ANSWERS[kind].items():
            route = engine.route(text(domain, 1000))
            assert route.module == said["module"]
            assert route.scores == pytest.approx(said["scores"], abs=1e-3)


def test_it_learns_and_forgets_as_a_new_one_does(home, store):
    before = {p: p.read_bytes() for p in (store.path / "modules").rglob("*") if p.is_file()}
    data = write_jsonl(home / "new.jsonl", [f"{n} k{n % 7} jj{n % 5} k" for n in range(120)])
    settings = LearnConfig(
        tokens=640, sequence_length=32, batch_size=4, num_layers=1, precision="float32", admit_anyway=True
    )
    learn(store, "new", [data], settings)
    learn(store, "law", [data], settings, update=True)
    assert store.module("law").version == 2
    store.remove("law")
    store.remove("new")
    left = {p: p.read_bytes() for p in (store.path / "modules").rglob("*") if p.is_file()}
    assert left == {p: content for p, content in before.items() if p.parts[-3] != "law"}
    with Engine(store, device="cpu") as engine:
        assert engine.route(text("drugs", 1000)).module == "drugs"
