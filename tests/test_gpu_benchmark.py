"""The benchmark for a GPU, in shapes that show nothing: every stage runs, and one that fails leaves the others."""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from elsewhere import pretended

sys.path.insert(0, str(Path(__file__).parents[1]))
gpu = import_module("benchmarks.gpu")
bench, machine, load, peer, graphs = (
    import_module(f"benchmarks.stages.{name}") for name in ("bench", "machine", "load", "peer", "graphs")
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def run(monkeypatch, capsys, out: Path, *arguments: str) -> tuple[int, list[str]]:
    """Exit status and lines."""
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(out), "--tiny", *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    return ended.value.code, capsys.readouterr().out.splitlines()


def cases(out: Path, stage: str) -> dict[str, dict]:
    kept = json.loads((out / f"{stage}.json").read_text())
    assert kept["tiny"]
    return {row["case"]: row for row in kept["results"]}


def test_every_stage_runs_to_its_end(monkeypatch, capsys, tmp_path):
    summary = tmp_path / "all.json"
    status, lines = run(monkeypatch, capsys, tmp_path / "out", "--device", "cpu", "--json", str(summary))
    assert status == 0, lines
    told = [json.loads(line) for line in lines if line.startswith("{")]
    assert {line["stage"] for line in told} == gpu.STAGES.keys()
    found = {stage: cases(tmp_path / "out", stage) for stage in gpu.STAGES}
    for stage, rows in found.items():
        assert rows["end"]["problems"] == 0
        assert len(rows) == sum(line["stage"] == stage for line in told)
    for form in ("first epoch", "first epoch, kept", "cached"):
        assert found["learn"][f"tiny, blocks, {form}"]["against PEFT LoRA"] > 0
    # Without the base below, and with it.
    assert 0 < found["learn"]["tiny, blocks, cached"]["TFLOP"] < found["learn"]["tiny, blocks, first epoch"]["TFLOP"]
    assert found["load"]["from the disk, swap"]["loads"] == 3, "each of its turns, and no other, reads a module"
    asked = json.loads(summary.read_text())["asked"]
    assert {one["what"].split(":")[0].split(",")[0] for one in asked} == {
        "stickbreaking", "peer", "learn tiny", "load", "swap",
    }  # fmt: skip
    assert all(one["measured"] > 0 for one in asked)
    assert sum(line.startswith("| ") for line in lines) == 1 + len(asked)
    assert not any("missed" in line for line in lines if line.startswith("|"))


def test_nothing_mixes_tensors_of_the_gpu_and_the_processor(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench.Bench, "on_device", bench.Bench.wall)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "pretended")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(graphs, "_captured", lambda run: run)
    for stage in (machine, load):
        monkeypatch.setattr(stage, "host_buffer", lambda _, size: torch.empty(size, dtype=torch.uint8))
    with pretended():
        # Learning and answers are compared in tests/gpu.
        stages = "stickbreaking,peer,load,graphs"
        status, lines = run(monkeypatch, capsys, tmp_path, "--device", "cuda", "--stages", stages)
    assert status == 0, lines
    assert cases(tmp_path, "graphs")["2 texts, graph"]["ms"] > 0
    loads = cases(tmp_path, "load")
    assert loads["from the disk, swap"]["host GB"] == 0
    assert loads["kept in main memory, swap"]["host GB"] > 0
    assert loads["warm, load, kept"]["ms"] > 0


def test_a_stage_that_fails_leaves_the_others(monkeypatch, capsys, tmp_path):
    def fails(_: object) -> None:
        raise ValueError("no\nroom")

    monkeypatch.setattr(peer, "run", fails)
    status, lines = run(monkeypatch, capsys, tmp_path, "--device", "cpu", "--stages", "peer,stickbreaking")
    assert status == 1
    assert "failed: peer: stopped: ValueError: no room" in lines
    assert cases(tmp_path, "stickbreaking")["end"]["problems"] == 0
    assert not (tmp_path / "learn.json").exists()


def test_a_side_that_fails_leaves_the_other(capsys, tmp_path):
    made = bench.Bench(torch.device("cpu"), True, tmp_path)
    made.begin("peer", 10)
    taken = made.turns("both", {"fails": lambda: 1 / 0, "runs": lambda: None}, seconds=1)
    assert taken.keys() == {"runs"}
    assert made.problems == ["both, fails: ZeroDivisionError: division by zero"]


def test_a_stage_is_cut_off_and_keeps_what_it_has(monkeypatch, capsys, tmp_path):
    def sleeps(made) -> None:
        made.tell("first", {"ms": 1.0})
        made.turns("asleep", {"long": lambda: time.sleep(30)}, seconds=1)

    monkeypatch.setattr(peer, "run", sleeps)
    found = gpu._stage(bench.Bench(torch.device("cpu"), True, tmp_path), "peer", 0.2)
    assert len(found) == 1
    assert "are over" in found[0]
    assert cases(tmp_path, "peer")["first"]["ms"] == 1.0


def test_what_was_asked_is_missed_or_met():
    assert bench.Target("tokens/s", 3.0, True, 2.9).missed
    assert not bench.Target("tokens/s", 3.0, True, 3.0).missed
    assert bench.Target("seconds", 1.2, False, 1.3).missed
    assert not bench.Target("seconds", 1.2, False, 1.1).missed
    assert bench.Target("seconds", 1.2, False, None).missed
