"""Whole models trained on several devices, each with the whole model or a part: they are what one device makes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from growlm.cli.launching import GONE
from growlm.disk.tensors import read_tensors
from growlm.errors import StoreError
from growlm.training.checkpoint_parts import write_parts
from servers import wait_for
from test_parallel import children, environment, ranks, told
from test_server_jobs import text_of

OPTIONS = ["--separator", "\\n\\n", "--sequence-length", "64", "--batch-size", "4", "--precision", "float32", "--json"]
PARTS = "--shard-model"


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "signs.txt").write_text(text_of("signs"))
    return tmp_path / "signs.txt"


def command(text: Path, verb: str, out: str, *options: str) -> list[str]:
    """Finetuning is of a model of the name `base`."""
    source = [str(text.parent / "base")] if verb == "finetune" else []
    out = str(text.parent / out)
    return [sys.executable, "-m", "growlm", verb, *source, out, "--data", str(text), *OPTIONS, *options]


def trained(text: Path, verb: str, out: str, *options: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What training says of itself, and the tensors of the model."""
    run = subprocess.run(command(text, verb, out, *options), capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), read_tensors(text.parent / out / "model.safetensors")


def test_a_whole_model_is_trained_on_two_devices_as_on_one(text):
    for verb, made in (("pretrain", ["--preset", "tiny"]), ("finetune", [])):
        options = ["--tokens", "2000", *made]
        one, alone = trained(text, verb, "base" if verb == "pretrain" else "finetuned", *options)
        two, together = trained(text, verb, f"{verb}-2", *options, "--devices", "2")
        assert two["loss_after"] == pytest.approx(one["loss_after"], abs=1e-3)
        for key, tensor in alone.items():
            torch.testing.assert_close(together[key], tensor, rtol=1e-2, atol=2e-3)
    assert sorted(path.name for path in text.parent.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize(
    "options",
    [
        ["--preset", "peer-tiny"],
        ["--preset", "molm-tiny", "--activation-checkpointing"],
    ],
    ids=["peer", "moduleformer"],
)
def test_a_model_in_parts_is_trained_to_the_bits_of_a_whole_one_on_each_device(text, options):
    options = ["--tokens", "1000", "--devices", "2", "--clip", "0", *options]
    whole, parts = (trained(text, "pretrain", name, *options, *more) for name, more in (("w", []), ("p", [PARTS])))
    assert whole[0]["loss_after"] == parts[0]["loss_after"]
    assert whole[0]["pools"] == parts[0]["pools"]
    assert whole[1].keys() == parts[1].keys()
    for key, tensor in whole[1].items():
        assert torch.equal(tensor, parts[1][key]), key


def test_the_best_step_of_a_model_in_parts_is_kept_and_gradients_are_clipped_together(text):
    trained(text, "pretrain", "base", "--preset", "tiny", "--tokens", "2000")
    options = ["--tokens", "4000", "--devices", "2", "--clip", "0.05", "--admit-anyway"]
    options += ["--gradient-accumulation-steps", "2"]
    whole, parts = (trained(text, "finetune", name, *options, *more) for name, more in (("w", []), ("p", [PARTS])))
    assert whole[0]["best_step"] == parts[0]["best_step"] < parts[0]["steps"]
    for key, tensor in whole[1].items():
        torch.testing.assert_close(parts[1][key], tensor, rtol=1e-4, atol=1e-5)


DIES = """
import os, runpy, sys
import torch.distributed.checkpoint as dcp
from growlm.training import parallel, sharding
where, kind = {
    "gradients": (sharding, "_reduce_scatter"), "norm": (parallel.Ranks, "total"), "checkpoint": (dcp, "save"),
}[sys.argv.pop(1)]
real, times = getattr(where, kind), [0]
def dies(*given, **named):
    times[0] += 1
    if times[0] == 2:
        os.kill(os.getpid(), 9)
    return real(*given, **named)
if os.environ["RANK"] == "1":
    setattr(where, kind, dies)
runpy.run_module("growlm", run_name="__main__")
"""


@pytest.mark.parametrize("where", ["gradients", "norm", "checkpoint"])
def test_a_rank_that_dies_where_parts_are_exchanged_leaves_one_line(text, where):
    options = ["--preset", "peer-tiny", "--tokens", "2000", PARTS, "--checkpoint-seconds", "0"]
    asked = command(text, "pretrain", "out", *options)[3:]
    (status, _, said), (killed, *_) = told(ranks([[sys.executable, "-c", DIES, where, *asked]] * 2))
    assert (status, killed) == (GONE, -signal.SIGKILL)
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("growlm: another rank has ended or cannot be reached")


def test_what_a_run_of_parts_goes_on_from_is_what_the_first_rank_had(text):
    """Statistics of a batch are each rank's own."""
    options = ["--preset", "peer-tiny", "--tokens", "1500", "--devices", "2", PARTS]
    _, whole = trained(text, "pretrain", "whole", *options)
    begun = [*command(text, "pretrain", "out", *options, "--checkpoint-seconds", "0")]
    with subprocess.Popen(begun, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        wait_for(lambda: list(text.parent.glob(".out-*/checkpoint.json")), 60)
        os.killpg(run.pid, signal.SIGTERM)
        _, said = run.communicate(timeout=60)
    assert re.search(r"growlm: stopped after step \d+ of \d+", said), said
    _, resumed = trained(text, "pretrain", "out", *options)
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())


class Alone:
    """What `Ranks` is to who writes parts by himself."""

    rank, first = 0, True

    def of_all(self, value: object) -> list[object]:
        return [value]


@pytest.mark.parametrize(
    ("cause", "error"),
    [
        (OSError(28, "No space left on device"), StoreError),
        (RuntimeError("unexpected pos 704 vs 598"), StoreError),  # as torch's writer has it
        (KeyboardInterrupt(), KeyboardInterrupt),
        (PermissionError("not yours"), PermissionError),
    ],
)
def test_what_goes_wrong_while_parts_are_written_is_told_and_leaves_nothing(tmp_path, monkeypatch, cause, error):
    def save(tensors: object, *, checkpoint_id: Path) -> None:
        checkpoint_id.mkdir()
        (checkpoint_id / "__0_0.distcp").write_bytes(b"half")
        raise dcp.CheckpointException("write", {0: (cause, traceback.extract_stack())})

    monkeypatch.setattr(dcp, "save", save)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=100))
    with pytest.raises(error, match=None if error is not StoreError else r"no room to write 400 bytes \(100 free"):
        write_parts(tmp_path / "step-1", {"a": torch.zeros(100)}, Alone())  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_model_in_parts_goes_on_from_the_parts_of_its_checkpoint(text):
    options = ["--preset", "tiny", "--tokens", "12k", "--devices", "2", PARTS, "--checkpoint-seconds", "0.2"]
    _, whole = trained(text, "pretrain", "whole", *options)
    with subprocess.Popen(command(text, "pretrain", "out", *options), stderr=subprocess.PIPE, text=True) as run:
        wait_for(lambda: list(text.parent.glob(".out-*/checkpoint.json")), 60)
        (second,) = (p for p in children(run.pid) if b"RANK=1" in environment(p))
        os.kill(second, signal.SIGKILL)
        _, said = run.communicate(timeout=60)
    assert said.strip().splitlines()[-1].startswith("growlm: device 1: it was ended by signal 9")
    assert "Traceback" not in said
    (work,) = text.parent.glob(".out-*")
    kept = work / json.loads((work / "checkpoint.json").read_bytes())["file"]
    weights = [path.stat().st_size for path in kept.glob("__*.distcp")]
    assert len(weights) == 2
    assert max(weights) < 0.8 * sum(weights)  # each wrote its own part

    shutil.copytree(work, text.parent / "aside")
    part = kept / "__1_0.distcp"
    part.write_bytes(part.read_bytes()[:-1] + b"\xff")
    run_again = subprocess.run(command(text, "pretrain", "out", *options), capture_output=True, text=True, timeout=200)
    assert run_again.returncode == 1
    assert f"{kept}: this part of a stopped run is damaged; restore it, or use --restart" in run_again.stderr
    assert "Traceback" not in run_again.stderr
    shutil.rmtree(work)
    (text.parent / "aside").rename(work)

    _, resumed = trained(text, "pretrain", "out", *options)
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())


def test_parts_of_a_model_need_several_devices(text):
    run = subprocess.run(
        command(text, "pretrain", "out", "--preset", "tiny", PARTS), capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last == "growlm: --shard-model is for several devices, and there is one; give --devices 2 or more as well"
    assert sorted(path.name for path in text.parent.iterdir()) == ["signs.txt"]
