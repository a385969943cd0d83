"""A text that is recalled grows, and documents are taken out of it, with nothing of them left."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from disk import all_files, write_jsonl
from growlm import LearnConfig, Store, learn
from growlm.cli import main
from growlm.errors import ConfigError, NotBetterError, StoreError, UnknownModuleError
from growlm.modules import ModuleSet
from growlm.router import SAMPLES, read_samples
from growlm.surgery.export import export
from growlm.training import text_growth
from growlm.training.config import GrowConfig
from growlm.training.text_growth import add_text, withdraw
from stores import store_with_texts
from tiny import random_ids

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = {"sequence_length": 32, "router_samples": 8}
GROW = GrowConfig(**SHORT)
SECRET = "Qyxgate 4 owz"  # stands in one document alone


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A store with `law`, which recalls, and `both`, which has layers too; files to append beside it."""
    home = tmp_path_factory.mktemp("growth")
    store = store_with_texts(home, "llama")
    write_jsonl(home / "more.jsonl", [f"The landlord of house {n} asks {n * 3 % 50} pounds." for n in range(80)])
    write_jsonl(home / "secret.jsonl", [SECRET])
    write_jsonl(home / "other.jsonl", ["".join(chr(33 + (n * k) % 90) for k in range(40)) for n in range(1, 80)])
    sources = [home / "secret.jsonl", home / "law.jsonl"]
    recall = LearnConfig(kind="recall", precision="float32", keep_samples="1MB", **SHORT)
    learn(store, "law", sources, recall, progress=False)
    trained = {"epochs": 1, "batch_size": 2, "learning_rate": 1e-3, "precision": "float32"}
    learn(store, "both", sources, LearnConfig(kind="lora+recall", **trained, **SHORT), progress=False)
    return home


@pytest.fixture
def home(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "home")


@pytest.fixture
def store(home) -> Store:
    return Store.open(home / "store")


@pytest.fixture
def run_cli(capsys) -> Callable[..., Any]:
    """Runs a command; what it printed."""

    def run(*arguments: object, status: int = 0) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        printed = capsys.readouterr()
        assert int(caught.value.code or 0) == status, printed.err
        return printed

    return run


def sources_of(store: Store, name: str) -> list[str]:
    module = store.load(name, store.load_base())
    assert module.memory is not None
    assert module.memory.text is not None
    return list(module.memory.text.sources())


def weights(store: Store, name: str, version: int) -> dict[str, torch.Tensor]:
    return dict(store.load(name, store.load_base(), version=version).state_dict())


def holds(content: dict[str, bytes], store: Store, text: str) -> list[str]:
    """Files with a text's letters, or its tokens as they are written."""
    ids = torch.tensor(store.load_tokenizer().encode(text))
    wanted = [text.encode(), *(ids.to(dtype).numpy().tobytes() for dtype in (torch.uint16, torch.int32))]
    return [name for name, data in content.items() if any(w in data for w in wanted)]


@pytest.mark.parametrize("name", ["law", "both"])
def test_a_text_grows_and_all_else_keeps_its_bits(home, store, name):
    before, others = all_files(home / "store" / "modules"), sources_of(store, name)
    result = add_text(store, name, [home / "more.jsonl"], GROW, progress=False)
    assert (result.version, result.documents_before, result.documents) == (2, 81, 161)
    assert result.tokens > result.tokens_before
    assert result.loss_before > result.loss_after
    assert result.gain > result.error > 0
    after = all_files(home / "store" / "modules")
    assert {k: v for k, v in after.items() if k in before} == before
    assert sources_of(store, name) == [*others, *(f"{home}/more.jsonl:{n}" for n in range(1, 81))]
    one, other = (weights(store, name, version) for version in (1, 2))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    # The router has seen what is new: its evidence is that of both.
    old, new = (store.module(name, v).folder / "router-vectors.safetensors" for v in (1, 2))
    assert new.stat().st_size > old.stat().st_size
    said = store.module(name).manifest.training
    assert said["recall"]["documents"] == 161
    assert said["text_growth"][0]["added"]["documents"] == 80
    assert store.verify() == []
    text = "The landlord of house 7 asks"
    ids = torch.tensor([store.load_tokenizer().encode(text)])
    base = store.load_base()
    losses = [float(-ModuleSet(base, [store.load(name, base, version=v)]).logits(ids[:, :-1]).log_softmax(-1)[0]
                    .gather(1, ids[0, 1:, None]).mean()) for v in (1, 2)]  # fmt: skip
    assert losses[1] < losses[0] - 0.5


def test_text_that_does_not_help_is_not_added(home, store):
    before = all_files(home / "store" / "modules")
    with pytest.raises(NotBetterError, match="law: no better than version 1 on held-out text of what is new"):
        add_text(store, "law", [home / "other.jsonl"], GROW, progress=False)
    assert all_files(home / "store" / "modules") == before
    result = add_text(store, "law", [home / "other.jsonl"], GrowConfig(**SHORT, admit_anyway=True), progress=False)
    assert result.documents == 81 + 79


def test_a_short_text_is_added_without_being_compared(home, store):
    note = home / "note.txt"
    note.write_text("The pump of cellar 5 drips at night.")
    result = add_text(store, "law", [note], GROW, progress=False)
    assert (result.documents, result.loss_before, result.gain) == (82, None, None)
    assert sources_of(store, "law")[-1] == str(note)
    assert store.module("law").manifest.training["text_growth"][0]["added"]["comparison"] is None


@pytest.mark.parametrize("name", ["law", "both"])
def test_of_what_is_withdrawn_nothing_is_left(made, store, name):
    version = store.path / "modules" / name
    assert len(holds(all_files(version / "1"), store, SECRET)) == (2 if name == "law" else 1)
    result = withdraw(store, name, [f"{made}/secret.jsonl"])
    assert (result.version, result.documents_before, result.documents, result.still_in) == (2, 81, 80, (1,))
    new = all_files(version / "2")
    assert holds(new, store, SECRET) == []
    assert not [file for file, content in new.items() if b"secret" in content]
    assert sources_of(store, name) == [f"{made}/law.jsonl:{n}" for n in range(1, 81)]
    assert store.verify() == []
    one, other = (weights(store, name, v) for v in (1, 2))
    assert all(torch.equal(one[key], other[key]) for key in one)
    if name == "law":  # a router may be trained on what is left
        samples = read_samples(store.module("law"))
        assert samples
        kept = (version / "2" / SAMPLES).stat().st_size
        assert kept <= (version / "1" / SAMPLES).stat().st_size + 64
    store.remove(name, 1)
    assert holds(all_files(version), store, SECRET) == []


def test_it_is_told_which_versions_still_hold_it(home, store):
    add_text(store, "law", [home / "more.jsonl"], GROW, progress=False)
    result = withdraw(store, "law", ["*more.jsonl"])
    assert (result.version, result.documents, result.still_in) == (3, 81, (2,))


def test_exact_names_come_before_patterns(made, home, store):
    for file in ("notes[1].txt", "notes1.txt", "a?b.txt", "aXb.txt"):
        (home / file).write_text(f"Of {file} there is one.")
        add_text(store, "law", [home / file], GROW, progress=False)
    withdraw(store, "law", [str(home / "notes[1].txt"), str(home / "a?b.txt")])
    left = [Path(source).name for source in sources_of(store, "law")]
    assert left[-2:] == ["notes1.txt", "aXb.txt"]
    withdraw(store, "law", [str(made / "law.jsonl:3"), "*/notes?.txt"])
    left = [Path(source).name for source in sources_of(store, "law")]
    assert "notes1.txt" not in left
    assert "law.jsonl:3" not in left
    assert {"law.jsonl:30", "law.jsonl:33"} <= set(left)


def test_layers_may_lose_all_of_their_text(home, store):
    result = withdraw(store, "both", ["*"])
    assert (result.tokens, result.documents) == (0, 0)
    assert (store.module("both", 1).kind, store.module("both").kind) == ("lora+recall", "lora")
    assert not list(store.module("both").folder.glob("text-*"))
    base = store.load_base()
    old, new = (store.load("both", base, version=v) for v in (1, 2))
    old.memory.close()
    ids = random_ids(2, 12)
    assert torch.equal(ModuleSet(base, [old]).logits(ids), ModuleSet(base, [new]).logits(ids))
    with pytest.raises(ConfigError, match="law: that is all of its text; growlm remove takes the module away"):
        withdraw(store, "law", ["*"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, h: withdraw(s, "law", ["lew.jsonl"]), ConfigError, "law: no document is of 'lew.jsonl'; they are"),
        (lambda s, h: withdraw(s, "lew", ["*"]), UnknownModuleError, "did you mean law"),
        (lambda s, h: withdraw(s, "plain", ["*"]), ConfigError, "is of kind lora and recalls no text"),
        (lambda s, h: add_text(s, "plain", [h / "more.jsonl"]), ConfigError, "is of kind lora and recalls no text"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(home, store, call: Any, error, message):
    withdraw(store, "both", ["*"])
    (store.path / "modules" / "both").rename(store.path / "modules" / "plain")
    for version in (1, 2):
        path = store.path / "modules" / "plain" / str(version) / "module.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "name": "plain"}))
    before = all_files(store.path / "modules")
    with pytest.raises(error, match=message) as caught:
        call(store, home)
    assert "\n" not in str(caught.value)
    assert all_files(store.path / "modules") == before


def test_one_process_at_a_time(home, store):
    with text_growth.alone(store, "law"), pytest.raises(StoreError, match="is being changed by another process"):
        withdraw(store, "law", ["*secret*"])


def test_a_kill_while_it_is_saved_leaves_the_version_before(home, store, monkeypatch):
    before = all_files(store.path / "modules")

    def killed(*args: Any, **options: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("growlm.store.store.write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        withdraw(store, "law", ["*secret*"])
    monkeypatch.undo()
    assert all_files(store.path / "modules") == before
    assert withdraw(store, "law", ["*secret*"]).version == 2


def test_status_and_export_know_who_holds_text(home, store, tmp_path):
    told = {m["name"]: m for m in store.status()["modules"]}
    assert told["law"]["text_bytes"] > 6 * 81
    assert all(m["holds_text"] for m in told.values())
    with pytest.raises(ConfigError, match="both: holds text of its domain"):
        export(store, tmp_path / "out", "both", no_text=True)
    export(store, tmp_path / "adapter", "both", form="peft")
    assert holds(all_files(tmp_path / "adapter"), store, SECRET) == []
    withdraw(store, "both", ["*"])
    export(store, tmp_path / "out", "both", no_text=True)
    assert not {m["name"]: m for m in store.status()["modules"]}["both"]["holds_text"]


def test_the_command_line(made, home, store, run_cli):
    added = run_cli("grow", store.path, "law", "--data", home / "more.jsonl", "--sequence-length", "32")
    assert "law version 2: " in added.out
    assert "81 -> 161 documents; held-out loss" in added.out
    wrong = run_cli("grow", store.path, "law", "--data", home / "more.jsonl", "--epochs", "3", status=1)
    assert "--epochs is of no effect" in wrong.err
    assert "which grows by --data alone" in run_cli("grow", store.path, "law", "--undo", status=1).err
    gone = run_cli("withdraw", store.path, "law", made / "secret.jsonl")
    assert "law version 3: 161 -> 160 documents" in gone.out
    assert [line for line in gone.err.splitlines() if "still holds" in line] == [
        f"version {v} still holds some of it: growlm remove {store.path} law --version {v}" for v in (1, 2)
    ]
    answer = run_cli(
        "generate", store.path, "The tenant of room 12 pays", "--module", "law", "--sources", "--max-new-tokens", "8"
    )
    assert re.search(rf": law, {re.escape(str(made))}/law.jsonl:\d+, character \d+ \(\d+%\)", answer.err)
    told = json.loads(
        run_cli(
            "generate", store.path, "The tenant of room 12", "--module", "law", "--sources", "--json",
            "--max-new-tokens", "4",
        ).out
    )  # fmt: skip
    assert told["sources"][0]["module"] == "law"
    assert f"{store.module('law').text_bytes / 1000:.1f} kB of text on the disk" in run_cli("status", store.path).out
