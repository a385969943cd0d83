"""Benchmarks on a published base, on one that was made in a moment: domains in sequence, tasks before and after."""

from __future__ import annotations

import json
import math
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from stores import domain_text, make_store
from tiny import save_base

sys.path.insert(0, str(Path(__file__).parents[1]))
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]
DOMAINS = ["letters", "digits"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("made")
    save_base(home / "base", "llama")
    for domain in [*DOMAINS, "general"]:
        folder = home / "data" / domain
        folder.mkdir(parents=True)
        for split, first in (("train", 0), ("valid", 500), ("test", 600)):
            texts = [domain_text(domain, first + i, words=40) for i in range(60)]
            (folder / f"{split}.txt").write_text("\n\n".join(texts))
    return home


def call(monkeypatch, capsys, name: str, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    import_module(f"benchmarks.quality.{name}").main()
    return capsys.readouterr().out


@pytest.mark.parametrize("lora", [(), ("--lora", "20k")])
def test_one_model_learns_in_sequence_and_goes_on_where_it_was(made, monkeypatch, capsys, tmp_path, lora):
    def run() -> str:
        return call(
            monkeypatch, capsys, "sequence", "--data", made / "data", "--base", made / "base", "--out", tmp_path,
            "--domains", *DOMAINS, "--general", "general", "--rate", "3e-3", *lora,
            "--text", "8k", "--tokens", "3k", "--test-tokens", 400, "--general-tokens", 300, "--keep",
        )  # fmt: skip

    printed = run()
    result = next(path for path in tmp_path.glob("*.json") if path.name != "settings.json")
    found = json.loads(result.read_text())
    before, first, second = found["losses"]
    assert first[0] < before[0] - 0.1
    assert second[1] < first[1] - 0.05
    assert found["matrix"]["average_forgetting"] == pytest.approx(second[0] - first[0])
    assert len(found["general"]) == 3
    assert "| digits | " in printed
    assert (next((tmp_path / "models").iterdir()) / "model.safetensors").exists()
    # Goes on: the second stage is made again, from the first one's weights, and comes out the same.
    (stage,) = tmp_path.glob("results/*-1-digits.json")
    stage.unlink()
    run()
    assert json.loads(result.read_text())["losses"] == found["losses"]


def test_a_source_is_cut_into_domains_and_what_a_choice_is_worth_is_told(monkeypatch, capsys, tmp_path):
    save_base(tmp_path / "base", "llama")
    for source in DOMAINS:
        folder = tmp_path / "data" / source
        folder.mkdir(parents=True)
        texts = [domain_text(source, 900 + i, words=300) for i in range(3)]
        (folder / "train.txt").write_text("\n\n".join(texts))
    printed = call(
        monkeypatch, capsys, "many_domains", "--data", tmp_path / "data", "--base", tmp_path / "base", "--out",
        tmp_path / "out", "--sources", *DOMAINS, "--domains", 2, 6, "--shown", 6, "--asked", 2,
    )  # fmt: skip
    assert "| 6 | no words |" in printed
    found = json.loads((tmp_path / "out" / "many_domains.json").read_text())["counts"]
    assert [found[n]["domains"] for n in ("2", "6")] == [2, 6]
    for told in found.values():
        assert told["asked"] == 2 * told["domains"]
        for way in told["ways"].values():
            longest = way["right"]["64"]
            assert 0 <= longest["domain"] <= longest["source"] <= 1
            assert longest["none"] <= 1 - longest["source"]
        assert told["oracle_gain"] > 0
    assert found["2"]["ways"]["gaussian"]["right"]["64"]["source"] == 1


def test_parts_are_told_by_what_their_documents_say():
    part_of = import_module("benchmarks.quality.many_domains").part_of
    assert part_of("law_dc_code", "§ 28:7-301. Liability", 4, False) == "title 28"
    assert part_of("law_dc_code", "§ 4-204.13. Office", 4, True) == "title 4, 2 hundred"
    assert part_of("law_dc_code", "Repealed.", 4, False) is None
    assert part_of("code_mbxp", "def f(x):\n    return x", 0, False) == "python"
    assert part_of("code_mbxp", "def f(x)\n    x\nend", 0, False) == "ruby"
    assert part_of("shakespeare", "ROMEO:\nAy me", 0, False) == "ROMEO"
    assert part_of("german_novels", "Kapitel", 7, False) == "document 7"


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_tasks_are_asked_of_every_way_and_what_was_learned_is_refused(monkeypatch, capsys, tmp_path):
    store = make_store(tmp_path, modules={"letters": {"strength": 0.02, "steps": 30}, "digits": {"kind": "recall"}})
    data = tmp_path / "tasks"
    options = [[domain_text(domain, 600 + i, words=3) for domain in DOMAINS] for i in range(8)]
    questions = [{"question": domain_text("letters", 900 + i), "choices": options[i], "answer": 0} for i in range(8)]
    write_rows(data / "arc_easy" / "test.jsonl", questions)
    blanks = [{"question": f"The name _ is {i}.", "choices": ["Ada", "Bo"], "answer": i % 2} for i in range(8)]
    write_rows(data / "winogrande" / "valid.jsonl", blanks)
    write_rows(data / "lambada" / "test.jsonl", [{"text": domain_text("letters", 700 + i)} for i in range(8)])

    def run(module: str, *more: object) -> dict[str, list[str]]:
        printed = call(
            monkeypatch, capsys, "tasks", "--data", data, "--out", tmp_path / "out", "--tasks", "arc_easy",
            "winogrande", "lambada", "--items", 8, "--ways", f"base={store.path}:base",
            f"{module}={store.path}:{module}", f"plain={tmp_path / 'base'}", *more,
        )  # fmt: skip
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "|" in line]
        return {row[0]: row[1:] for row in lines}

    found = run("letters")
    assert list(found) == ["task", "---", "arc_easy, %", "winogrande, %", "lambada, %", "lambada, nats"]
    base, letters, plain = found["lambada, nats"]
    assert float(letters.split()[0]) < float(base) - 0.1
    assert plain == f"{base} (+0.00; +0.00 to +0.00)"
    write_rows(data / "lambada" / "test.jsonl", [{"text": domain_text("digits", i, words=12)} for i in range(8)])
    told = r"local_lambada: 8 of 8 rows stand in the text that 'digits' has learned, .* --allow-contaminated$"
    with pytest.raises(SystemExit, match=told):
        run("auto")
    remembered, routed, _ = run("auto", "--allow-contaminated")["lambada, nats"]
    assert remembered != base  # of the rows that are there now
    assert float(routed.split()[0]) < float(remembered) - 0.5
    with pytest.raises(SystemExit, match=told):
        run("auto")  # what was allowed before is not told without it


def test_a_second_look_tells_what_is_right_and_what_is_lost():
    bench = import_module("benchmarks.quality.second_look")
    prompts = import_module("benchmarks.lib.prompts").Prompts
    yes, no = {"doubt": 3.0, "gain": 0.5}, {"doubt": 9.0, "gain": -0.25}
    rows = {
        ("question", "a", "a"): [{"wanted": "a", "chosen": "a", **yes}, {"wanted": "a", "chosen": "b", **no}],
        ("question", "b", "b"): [{"wanted": "b", "chosen": "b", **no}],
        ("other", "news", None): [
            {"wanted": None, "chosen": "a", **no},
            {"wanted": None, "chosen": None, "doubt": None, "gain": None},
        ],
        ("question", "left out", "c"): [{"wanted": None, "chosen": "a", **no}],
    }
    found = [(prompts(*of, []), each) for of, each in rows.items()]
    told = {nats: bench.told(found, lambda row, nats=nats: bench.stays(nats, row)) for nats in (-1.0, 5.0, math.inf)}
    for nats in (-1.0, 5.0):  # nobody is asked, or only who is sure already
        assert told[nats]["question"] == {"right": 0.75}
        assert told[nats]["other"] == {"right": 0.5, "lost": 0.125}
        assert told[nats]["question of what was not learned"] == {"right": 0.0, "lost": 0.25}
    assert told[math.inf]["question"] == {"right": 0.25}
    assert told[math.inf]["other"] == {"right": 1.0, "lost": 0.0}
    assert told[math.inf]["question of what was not learned"] == {"right": 1.0, "lost": 0.0}


def test_what_is_gained_in_answering_is_told_by_how_questions_are_read():
    bench = import_module("benchmarks.quality.reading_and_answering")
    losses = -torch.tensor([0.5, 0.25, 0.125]).log()
    assert bench.among(losses[1:2], 0) == pytest.approx(-math.log(0.25))  # one answer: as it is
    assert bench.among(losses, 2) == pytest.approx(-math.log(0.125 / 0.875))
    rows = [{"read": read, "answered": gain} for read, gain in ((0.5, 3.0), (0.25, 1.0), (0.0, -1.0), (-2.0, -1.0))]
    told = bench.told(rows)
    assert told["better"]["questions"] == 2
    assert told["better"]["answered"] == pytest.approx(2.0)
    assert told["no better"] == {"questions": 2, "answered": pytest.approx(-1.0), "interval": [-1.0, -1.0]}
    assert told["spearman"] == pytest.approx(3 / math.sqrt(10))  # ranks 4, 3, 2, 1 and 4, 3, 1.5, 1.5
    assert bench.told(rows[:1]) == {"better": {"questions": 1}, "no better": {"questions": 0}}
