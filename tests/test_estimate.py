"""Estimates: what a run of `learn` will be, told before it is made; the store stays as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from disk import all_files, write_jsonl
from growlm import LearnConfig, Store, learn
from growlm.cli import main
from growlm.errors import GrowlmError, Interrupted, StoreError
from growlm.training import rehearsal, validation
from growlm.training.estimate import estimate
from growlm.training.module_training import ModuleTraining
from interruptions import at_step, interrupt
from stores import store_with_texts
from tiny import TEXT

pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes: Any) -> LearnConfig:
    short = {"sequence_length": 32, "batch_size": 2, "precision": "float32", "router_samples": 8, "max_rows": 50}
    return LearnConfig(**{**short, "admit_anyway": True, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("estimate")
    store_with_texts(home, "llama")
    return home


def law(store: Store) -> list[Path]:
    return [store.path.parent / "law.jsonl"]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 1},
        {"num_layers": 1, "epochs": 4},
        {"num_layers": 1, "epochs": 1, "keep_samples": "1kB", "batch_size": None},
        {"num_layers": 1, "learning_rate": 1e-3, "tokens": 640},
        {"num_layers": 1, "tokens": 64},
        {"kind": "peer", "num_experts": 256, "num_heads": 2, "top_k": 4},
        {"kind": "experts"},
    ],
    ids=["blocks", "trials", "one epoch", "given rate", "one step", "peer", "experts"],
)
def test_it_tells_what_the_run_that_follows_does(store, monkeypatch, changes):
    monkeypatch.setattr(validation, "_PATIENCE", 99)  # no run ends early
    settings = config(**changes)
    told = estimate(store, "law", law(store), settings, progress=False)
    result = learn(store, "law", law(store), settings, progress=False)
    assert told.samples == [{"prompt": s.prompt, "text": s.text, "base": s.base} for s in result.samples]
    stored = store.module("law")
    said = stored.manifest.training
    assert (told.steps, told.tokens_trained) == (said["steps"], said["tokens"])
    assert told.tokens_per_step == said["batch_size"] * 32
    assert told.documents == said["documents"]
    assert sum(r["rates"] for r in told.trials) == len(said["trials"])
    assert sum(r["rates"] * r["steps"] for r in told.trials) == sum(t["steps"] for t in said["trials"])
    assert told.bytes == stored.bytes
    beside = sum(p.stat().st_size for p in stored.folder.glob("router*.safetensors"))
    beside += sum(p.stat().st_size for p in stored.folder.glob("samples*.safetensors"))
    assert told.beside == pytest.approx(beside, rel=0.1, abs=700)  # headers of the files
    assert {
        "text",
        "base",
        "steps",
        "scores and admission",
        "passages for the router",
        "general text for the router",
    } <= told.seconds.keys()
    assert told.seconds["steps"] > 0
    assert (told.seconds["trials"] > 0) == bool(said["trials"])
    assert told.total_seconds == pytest.approx(sum(told.seconds.values()))
    assert told.memory > 50e6


def test_the_store_stays_as_it_is_byte_for_byte(store):
    """Of a store whose base no one has hashed, too."""
    (store.path / "cache" / "hashes.json").unlink()
    store.scratch.mkdir(exist_ok=True)  # where its steps are made: on the disk that the run would be on
    before = all_files(store.path)
    folders = sorted(p for p in store.path.rglob("*") if p.is_dir())
    estimate(store, "law", law(store), config(num_layers=1), progress=False)
    assert all_files(store.path) == before
    assert sorted(p for p in store.path.rglob("*") if p.is_dir()) == folders


def test_a_run_that_was_estimated_learns_the_same_bits(store):
    whole = store.beside(store.path.parent / "whole")
    learn(whole, "law", law(store), config(num_layers=1), progress=False)
    estimate(store, "law", law(store), config(num_layers=1), progress=False)
    learn(store, "law", law(store), config(num_layers=1), progress=False)
    weights = [s.module("law").manifest.files for s in (whole, store)]
    assert weights[0] == weights[1]


def test_time_is_told_by_real_steps(store, monkeypatch):
    """A run whose steps take longer is said to take longer, as many times as it has steps."""
    clock, losses = [0.0], ModuleTraining._losses

    def slow(training: ModuleTraining, step: int) -> Iterator[torch.Tensor]:
        clock[0] += 2.0
        return losses(training, step)

    monkeypatch.setattr(rehearsal, "monotonic", lambda: clock[0])
    monkeypatch.setattr(ModuleTraining, "_losses", slow)
    told = estimate(store, "law", law(store), config(num_layers=1, epochs=1), progress=False)
    assert told.seconds["steps"] == pytest.approx(2.0 * told.steps, rel=0.1)
    assert told.timed == 4
    # Where a step takes longer than all may, one will do.
    monkeypatch.setattr(
        ModuleTraining, "_losses", lambda t, step: clock.__setitem__(0, clock[0] + 98.0) or slow(t, step)
    )
    told = estimate(store, "law", law(store), config(num_layers=1, epochs=1), progress=False)
    assert told.seconds["steps"] == pytest.approx(100.0 * told.steps, rel=0.1)
    assert told.timed == 1


def test_features_that_are_kept_cost_once(store, monkeypatch):
    """Of four epochs the base below the fork is run in the first one only."""
    clock, features = [0.0], ModuleTraining._features

    def slow(training: ModuleTraining, rows: Any) -> torch.Tensor:
        clock[0] += 3.0 * len(rows)
        return features(training, rows)

    monkeypatch.setattr(rehearsal, "monotonic", lambda: clock[0])
    monkeypatch.setattr(ModuleTraining, "_features", slow)
    told = estimate(store, "law", law(store), config(num_layers=1, epochs=4), progress=False)
    assert told.seconds["steps"] == pytest.approx(3.0 * told.rows)
    uncached = config(num_layers=1, epochs=4, feature_cache=0)
    assert estimate(store, "law", law(store), uncached, progress=False).seconds["steps"] == pytest.approx(
        4 * 3.0 * told.rows, rel=0.05
    )


def test_an_update_is_estimated_and_a_taken_name_refused_as_learn_does(store):
    learn(store, "law", law(store), config(num_layers=1), progress=False)
    with pytest.raises(StoreError, match=r"exists \(version 1\); use --update"):
        estimate(store, "law", law(store), config(num_layers=1), progress=False)
    before = all_files(store.path)
    told = estimate(store, "law", law(store), config(num_layers=1), update=True, progress=False)
    assert all_files(store.path) == before
    assert "general text for the router" not in told.seconds


def test_a_stopped_run_is_seen(store):
    settings = config(num_layers=1)
    with at_step(3, interrupt), pytest.raises(Interrupted):
        learn(store, "law", law(store), settings, progress=False)
    told = estimate(store, "law", law(store), settings, progress=False)
    assert told.resumes == 4
    assert any("a stopped run goes on after step 4" in line for line in told.lines())


def test_of_a_run_whose_module_is_saved_no_steps_are_told(store):
    """It makes none: the same command only lets the router know."""
    settings = config(num_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("growlm.training.learn.router_after", _stopped)
        with pytest.raises(KeyboardInterrupt):
            learn(store, "law", law(store), settings, progress=False)
    before = all_files(store.path)
    with pytest.raises(StoreError, match=r"version 1 of 'law' is saved.*the same command without --dry-run ends it"):
        estimate(store, "law", law(store), settings, progress=False)
    other = write_jsonl(store.path.parent / "other.jsonl", [f"{n} {' '.join(TEXT)}" for n in range(40)])
    with pytest.raises(StoreError, match=r"exists \(version 1\); use --update"):  # other text is another run
        estimate(store, "law", [other], settings, progress=False)
    assert all_files(store.path) == before
    assert learn(store, "law", law(store), settings, progress=False).version == 1


def _stopped(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_the_disk_that_a_run_takes_is_what_it_took(store, monkeypatch):
    settings, taken = config(num_layers=1, epochs=4, checkpoint_seconds=0), []
    told = estimate(store, "law", law(store), settings, progress=False)
    losses = ModuleTraining._losses

    def counted(training: ModuleTraining, step: int) -> Iterator[torch.Tensor]:
        taken.append(sum(path.stat().st_size for path in training.work.iterdir()))
        return losses(training, step)

    monkeypatch.setattr(ModuleTraining, "_losses", counted)
    learn(store, "law", law(store), settings, progress=False)
    assert max(taken) <= told.scratch <= 2 * max(taken)


def test_memory_of_a_gpu_grows_with_the_step(store, monkeypatch):
    """As main memory does: where a step of all rows would take too long, the peak of a smaller one is scaled."""
    peaks, clock, loss_of = iter([1000, 1200, 1000, 1200]), [0.0], ModuleTraining._loss_of
    after = iter([5000, 900])  # what scores and samples take may be more
    monkeypatch.setattr("growlm.training.estimate.device_peak_bytes", lambda device: next(after))
    monkeypatch.setattr(rehearsal, "device_peak_bytes", lambda device: next(peaks))
    assert estimate(store, "law", law(store), config(num_layers=1), progress=False).device_memory == 5000

    def slow(training: ModuleTraining, *given: Any) -> torch.Tensor:
        clock[0] += 20.0
        return loss_of(training, *given)

    monkeypatch.setattr(rehearsal, "monotonic", lambda: clock[0])
    monkeypatch.setattr(ModuleTraining, "_loss_of", slow)
    told = estimate(store, "law", law(store), config(num_layers=1, batch_size=8), progress=False)
    assert told.device_memory == 1000 + 8 * 200


def test_ctrl_c_says_that_nothing_was_changed(store, capfd, monkeypatch):
    monkeypatch.setattr("growlm.training.estimate.side_by_side", _stopped)
    with pytest.raises(SystemExit) as stopped:
        main(["learn", str(store.path), "law", "--data", str(law(store)[0]), "--sequence-length", "32", "--dry-run"])
    assert stopped.value.code == 130
    assert capfd.readouterr().err.splitlines()[-1] == "growlm: interrupted; nothing was changed"


def test_bad_input_is_refused_in_the_words_of_learn(store, tmp_path, monkeypatch):
    def both(*arguments: Any) -> None:
        said = []
        for verb in (estimate, learn):
            with pytest.raises(GrowlmError) as caught:
                verb(*arguments, progress=False)
            said.append((type(caught.value), str(caught.value)))
        assert said[0] == said[1]

    both(store, "law", [tmp_path / "missing.txt"], config())
    both(store, "Law!", law(store), config())
    both(store, "law", [write_jsonl(tmp_path / "short.jsonl", ["a"])], config())
    both(store, "law", law(store), config(sequence_length=4096, tokens=5000))
    monkeypatch.setattr(ModuleTraining, "_loss_of", lambda self, *_: _nan(self))
    both(store, "law", law(store), config(num_layers=1))


def _nan(training: ModuleTraining) -> torch.Tensor:
    return next(training.module.parameters()).sum() * float("nan")


def test_the_command_tells_in_lines_and_in_json(store, capfd):
    source = write_jsonl(store.path.parent / "long.jsonl", [f"{n} {' '.join(TEXT)}" for n in range(40)])
    arguments = ["learn", str(store.path), "law", "--data", str(source), "--num-layers", "1", "--dry-run"]
    arguments += ["--sequence-length", "64", "--batch-size", "2", "--epochs", "1", "--max-rows", "50"]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    lines = capfd.readouterr().out.splitlines()
    with pytest.raises(SystemExit):
        main([*arguments, "--json"])
    told = json.loads(capfd.readouterr().out)
    assert [line.split(":")[0] for line in lines[3:]] == [
        "held-out text", "steps", "learning rates", "time", "memory", "disk",
        *["prompt", "  base"] * len(told["samples"]),
    ]  # fmt: skip
    assert len(told["samples"]) == 3
    assert all(f"{s['prompt']}{s['text']}"[:200] in source.read_text().replace("\\n", "\n") for s in told["samples"])
    steps = f"steps: {told['steps']:,} at the most, of 128 tokens; {told['tokens_trained']:,} tokens in all"
    assert f"{steps}, repeats included" in lines
    assert list(store.modules) == []
