"""The experiment of many domains: it runs on anyone's data, goes on after a kill, and its numbers are what they say."""

from __future__ import annotations

import json
import math
import sys
from importlib import import_module
from pathlib import Path

import pytest

from disk import all_files
from stores import domain_text, save_lively_base

sys.path.insert(0, str(Path(__file__).parents[1]))
ten_domains = import_module("benchmarks.quality.ten_domains")
domains = import_module("benchmarks.lib.domains")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft's
]
METHODS = ["blocks-top", "finetune-sequence", "lora-oracle"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("made")
    save_lively_base(home / "base")
    for domain in ("letters", "digits", "general"):
        (home / "data" / domain).mkdir(parents=True)
        for number, split in enumerate(("train", "valid", "test")):
            texts = [domain_text(domain, 1000 * number + i, words=40) for i in range(30)]
            (home / "data" / domain / f"{split}.txt").write_text("\n\n".join(texts))
    return home


@pytest.fixture
def run(home, monkeypatch, capsys):
    monkeypatch.setattr(domains, "LENGTH", 64)
    monkeypatch.setattr(domains, "RATES", (1e-3,))

    def call(*extra: str) -> str:
        arguments = f"--data {home}/data --out {home}/out --base {home}/base --general general --domains letters digits"
        monkeypatch.setattr(sys, "argv", ["ten_domains.py", *arguments.split(), "--tokens", "2048", *extra])
        ten_domains.main()
        return capsys.readouterr().out

    return call


def results(home: Path) -> dict[str, dict]:
    return {m: json.loads((home / "out" / "results" / f"{m}.json").read_text()) for m in METHODS}


def numbers(result: dict) -> dict:
    return {k: v for k, v in result.items() if k not in ("seconds", "wall", "evaluation")}


@pytest.mark.slow
def test_methods_are_compared_and_a_run_that_was_killed_goes_on(run, home):
    table = run("--methods", *METHODS)
    found = results(home)
    assert all(m in table for m in METHODS)
    for method in METHODS:
        assert set(found[method]["final"]) == {"letters", "digits"}
        assert all(math.isfinite(x) for x in found[method]["final"].values())
    matrix = found["finetune-sequence"]["matrix"]
    assert [len(matrix["before"]), *map(len, matrix["after"])] == [2, 2, 2]
    assert matrix["after"][-1] == pytest.approx([math.exp(x) for x in found["finetune-sequence"]["final"].values()])
    assert found["blocks-top"]["evaluation"]["forgetting"] == 0.0
    resident = found["blocks-top"]["resident"]
    assert max(resident) < 1.02 * min(resident)  # all that grows is a row of the router
    assert found["lora-oracle"]["parameters"] < 2 * found["blocks-top"]["parameters"]
    # As a kill leaves it: the last stage of each method is not there, nor is the method's own result.
    for file in (home / "out" / "results").glob("*-1-digits.json"):
        file.unlink()
    for method in METHODS:
        (home / "out" / "results" / f"{method}.json").unlink()
    before = all_files(home / "out" / "stores")
    lines = [line for line in table.splitlines() if line.startswith("|") and "seconds" not in line]
    assert [x for x in run("--methods", *METHODS).splitlines() if x in lines] == lines
    again = results(home)
    for method in METHODS:
        assert numbers(again[method]) == numbers(found[method])
    # A module that was learned before the kill keeps the time that it took.
    assert again["blocks-top"]["seconds"] == found["blocks-top"]["seconds"] > 0
    weights = [k for k in before if k.endswith("module.safetensors")]
    assert all(all_files(home / "out" / "stores")[k] == before[k] for k in weights)


def test_a_folder_without_text_is_named(run, home):
    (home / "data" / "digits" / "test.txt").unlink()
    with pytest.raises(SystemExit, match=r"data/digits: holds no test\.txt"):
        run("--methods", "blocks-top")


@pytest.mark.parametrize("split", ["train", "test"])
def test_two_domains_of_the_same_text_are_named(run, home, split):
    data = home / "data"
    (data / "letters" / f"{split}.txt").write_bytes((data / "digits" / f"{split}.txt").read_bytes())
    with pytest.raises(SystemExit, match=rf"data: \w+ and \w+ have the same {split} text; give each its own"):
        run("--methods", "blocks-top")


def test_results_of_other_settings_are_not_mixed(run, home):
    run("--methods", "finetune-oracle")
    with pytest.raises(SystemExit, match="holds results with another seed"):
        run("--methods", "finetune-oracle", "--seed", "5")
