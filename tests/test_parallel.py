"""Training on several devices: two processes make the module that one makes, and none of them is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from growlm.disk.tensors import read_tensors
from growlm.store import Store
from growlm.training.checkpoints import saved_step
from servers import wait_for
from stores import make_store
from test_server_jobs import text_of

LEARN = [
    "--separator", "\\n\\n", "--sequence-length", "64", "--tokens", "2000", "--batch-size", "4", "--samples", "0",
    "--precision", "float32", "--learning-rate", "0.003",
]  # fmt: skip


@pytest.fixture
def store(tmp_path) -> Path:
    make_store(tmp_path, "llama", {"letters": {"kind": "lora", "r": 4}})
    (tmp_path / "signs.txt").write_text(text_of("signs"))
    return tmp_path / "store"


def command(store: Path, name: str, *options: str) -> list[str]:
    data = str(store.parent / "signs.txt")
    return [sys.executable, "-m", "growlm", "learn", str(store), name, "--data", data, *LEARN, *options]


def learned(store: Path, name: str, *options: str) -> dict[str, torch.Tensor]:
    """The tensors of a module that is learned by the command line."""
    run = subprocess.run(command(store, name, *options), capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("learned from") == 1
    return tensors_of(store, name)


def tensors_of(store: Path, name: str) -> dict[str, torch.Tensor]:
    return read_tensors(store / "modules" / name / "1" / "module.safetensors")


def ranks(commands: list[list[str]]) -> list[subprocess.Popen[str]]:
    """Processes that are told that they are ranks of one run, as torchrun tells them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    known = {"WORLD_SIZE": len(commands), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    environments = [{**known, "RANK": rank, "LOCAL_RANK": rank} for rank in range(len(commands))]
    return [
        subprocess.Popen(
            one,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **{key: str(value) for key, value in told.items()}},
        )
        for one, told in zip(commands, environments, strict=True)
    ]


def told(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """How each has ended, and what it has printed and said."""
    found = [process.communicate(timeout=120) for process in processes]
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, found, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        ["--kind", "lora", "--r", "4"],
        ["--kind", "blocks", "--vocabulary", "both"],
        ["--kind", "peer", "--num-experts", "64", "--query-norm", "layer"],
    ],
    ids=lambda options: options[1],
)
def test_two_devices_learn_what_one_does_and_the_same_bits_each_time(store, options):
    alone = learned(store, "alone", *options)
    together, again = (learned(store, name, *options, "--devices", "2") for name in ("together", "again"))
    assert alone.keys() == together.keys()
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key].float(), tensor.float(), rtol=1e-3, atol=2e-4)
        assert torch.equal(together[key], again[key]), key
    opened = Store.open(store)
    assert opened.verify() == []
    opened.check_base()  # it has its bytes
    assert not list(opened.work.glob("*"))  # no rank has left anything


@pytest.mark.parametrize(
    "options",
    [
        ["--kind", "lora+recall", "--r", "4", "--use-dora"],
        ["--kind", "blocks", "--vocabulary", "both", "--epochs", "2"],
        ["--kind", "peer", "--num-experts", "64"],
        ["--kind", "experts", "--learning-rate", "auto"],
    ],
    ids=lambda options: options[1],
)
def test_a_base_in_parts_learns_the_same_bits_as_a_whole_one_on_each_device(store, options):
    options = [*options, "--devices", "2", "--samples", "1"]
    whole, parts = learned(store, "whole", *options), learned(store, "parts", *options, "--shard-base")
    assert whole.keys() == parts.keys()
    for key, tensor in whole.items():
        assert torch.equal(parts[key], tensor), key
    opened = Store.open(store)
    assert opened.verify() == []
    one, other = (opened.modules[name].manifest.training for name in ("whole", "parts"))
    for key in ("loss_before", "loss_after", "validation", "learning_rate", "probe"):
        assert one[key] == other[key], key


@pytest.mark.parametrize("parts", [[], ["--shard-base", "--activation-checkpointing"]], ids=["whole", "in parts"])
def test_a_device_that_dies_ends_the_run_with_one_line_and_the_same_command_goes_on(store, parts):
    options = ["--kind", "lora", "--r", "4", "--devices", "2", "--epochs", "40", "--tokens", "100k"]
    options += ["--checkpoint-seconds", "0.2", *parts]
    whole = learned(store, "whole", *options)
    with subprocess.Popen(command(store, "signs", *options), stderr=subprocess.PIPE, text=True) as run:
        work = Store.open(store).work
        wait_for(lambda: list(work.glob("signs-*/checkpoint.json")), 60)
        (second,) = (p for p in children(run.pid) if b"RANK=1" in environment(p))
        os.kill(second, signal.SIGKILL)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGKILL
    last = said.strip().splitlines()[-1]
    ended = "growlm: device 1: it was ended by signal 9"
    assert last == f"{ended}; the same command goes on from the last checkpoint, if there is one"
    assert "Traceback" not in said
    kept = {name.partition(".")[2] for name in read_tensors(max(work.glob("signs-*/step-*.safetensors")))}
    assert kept - {""} == whole.keys()  # optimiser state of the module alone
    resumed = learned(store, "signs", *options)
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())


BUSY = """
import atexit, runpy, sys, time
def last():  # of all that Python calls before it shuts down
    sys.setswitchinterval(60)  # the group's thread, which lets go of tensors now, does not get Python's lock before
    group.allgather([tensors[1:]], tensors[:1])
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
atexit.register(last)
import torch
import torch.distributed as dist
from growlm.training import parallel
end = dist.destroy_process_group
def destroyed():
    global group, tensors
    group = dist.group.WORLD  # as the mesh of a base in parts holds it
    tensors = [torch.ones(4) for _ in range(3)]
    end()
parallel.dist.destroy_process_group = destroyed
runpy.run_module("growlm", run_name="__main__")
"""


def test_a_rank_whose_group_is_still_at_work_ends_as_it_should(store):
    """Threads of a group that outlives the run abort a process of which Python shuts down."""
    asked = command(store, "signs", "--kind", "lora", "--r", "4")[3:]
    first, second = told(ranks([[sys.executable, "-c", BUSY, *asked]] * 2))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "learned from" in first[1]
    assert second[1] == ""
    wrong = command(store, "bad name", "--kind", "lora", "--r", "4")[3:]
    assert [status for status, _, _ in told(ranks([[sys.executable, "-c", BUSY, *wrong]] * 2))] == [1, 1]


def state(process: int) -> str:
    """Of a process, as /proc tells it: T is stopped."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_run_that_is_paused_goes_on_and_needs_no_stdout(store):
    """Ctrl-Z pauses all of its processes."""
    options = ["--kind", "lora", "--r", "4", "--devices", "2", "--tokens", "20k", "--epochs", "4"]
    options += ["--checkpoint-seconds", "0"]
    line = ["sh", "-c", 'exec "$@" >&-', "sh", *command(store, "signs", *options)]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as run:
        wait_for(lambda: list(Store.open(store).work.glob("signs-*/checkpoint.json")))
        run.send_signal(signal.SIGTSTP)
        paused = [run.pid, *children(run.pid)]
        try:
            wait_for(lambda: all(state(one) == "T" for one in paused))
        finally:
            run.send_signal(signal.SIGCONT)
        _, said = run.communicate(timeout=120)
    assert run.returncode == 0, said
    assert len(paused) == 3
    assert "signs" in Store.open(store).modules


def test_whoever_stays_behind_the_first_ends_once_somebody_asks(store):
    options = ["--kind", "lora", "--r", "4", "--devices", "2", "--epochs", "100", "--tokens", "300k"]
    line = command(store, "signs", *options, "--checkpoint-seconds", "0.2")
    with subprocess.Popen(
        line, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,  # though the tests ignore it
    ) as run:  # fmt: skip
        wait_for(lambda: list(Store.open(store).work.glob("signs-*/checkpoint.json")), 60)
        second, first = sorted(children(run.pid), key=lambda one: b"RANK=0" in environment(one))
        os.kill(second, signal.SIGSTOP)  # as one that waits for what never comes
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{first}").exists())  # its end was seen
        began = time.monotonic()
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
        assert time.monotonic() - began < 9  # not after the seconds in which it might end by itself
    assert run.returncode == 128 + signal.SIGKILL
    assert said.strip().splitlines()[-1].startswith("growlm: device 0: it was ended by signal 9")
    assert not Path(f"/proc/{second}").exists()


ONE_REPORTS = """
import os, runpy
from growlm.evaluation import learning, page
def refuse(*_):
    raise AssertionError("another rank than the first has to do with the report")
if os.environ["RANK"] != "0":
    learning.write_learning_report = page.check_folder = refuse
runpy.run_module("growlm", run_name="__main__")
"""


def test_the_first_alone_writes_the_report(store, tmp_path):
    asked = command(store, "signs", "--kind", "lora", "--r", "4", "--report", str(tmp_path / "report"))[3:]
    found = told(ranks([[sys.executable, "-c", ONE_REPORTS, *asked]] * 2))
    assert [status for status, *_ in found] == [0, 0], found
    assert (tmp_path / "report" / "losses.jsonl").read_text()


def test_ranks_end_with_whoever_has_begun_them(store):
    options = ["--kind", "lora", "--devices", "2", "--epochs", "100", "--tokens", "300k", "--checkpoint-seconds", "0.2"]
    with subprocess.Popen(command(store, "signs", *options), stderr=subprocess.PIPE, text=True) as run:
        work = Store.open(store).work
        wait_for(lambda: list(work.glob("signs-*/checkpoint.json")), 60)
        begun = children(run.pid)
        run.kill()
    assert len(begun) == 2
    wait_for(lambda: not any(Path(f"/proc/{rank}").exists() for rank in begun), 60)
    assert list(work.glob("signs-*/step-*.safetensors"))


def children(process: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def environment(process: int) -> bytes:
    return Path(f"/proc/{process}/environ").read_bytes()


def test_a_run_of_two_that_is_interrupted_goes_on_where_it_was(store):
    options = ["--kind", "lora", "--r", "4", "--devices", "2", "--epochs", "100", "--tokens", "300k"]
    options += ["--checkpoint-seconds", "0.2"]
    with subprocess.Popen(
        command(store, "signs", *options), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,  # though the tests ignore it
    ) as run:  # fmt: skip
        work = Store.open(store).work
        wait_for(lambda: list(work.glob("signs-*/checkpoint.json")), 60)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "starting" not in said.partition("training")[2]  # who has begun the ranks says nothing beside them
    assert re.search(r"growlm: stopped after step \d+ of \d+; run the same command again", said.splitlines()[-1])
    assert list(work.glob("signs-*/step-*.safetensors"))
    (kept,) = work.glob("signs-*/")
    other = subprocess.run(command(store, "signs", "--kind", "lora"), capture_output=True, text=True, timeout=120)
    assert re.search(
        rf"begins anew: another run of this name, .* step \d+, .*; {kept} .* to that one alone", other.stderr
    )
    assert saved_step(kept)


def test_torchrun_starts_the_ranks_as_well(store):
    found = told(ranks([command(store, "signs", "--kind", "lora")] * 2))
    assert [status for status, *_ in found] == [0, 0]
    assert [out.count("learned from") for _, out, _ in found] == [1, 0]  # the first tells it
    assert list(Store.open(store).modules) == ["letters", "signs"]


def test_a_base_in_parts_is_not_rounded_for_a_kind_that_is_not_trained(store):
    options = ["--data", str(store.parent / "signs.txt"), "--separator", "\\n\\n", "--samples", "0", "--json"]
    options += ["--kind", "recall", "--precision", "bfloat16", "--sequence-length", "64", "--devices", "2"]
    found = []
    for name, more in (("whole", []), ("parts", ["--shard-base"])):
        line = [sys.executable, "-m", "growlm", "learn", str(store), name, *options, *more]
        run = subprocess.run(line, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        found.append(json.loads(run.stdout))
    assert [found[0][key] for key in ("loss_before", "loss_after")] == [
        found[1][key] for key in ("loss_before", "loss_after")
    ]


def test_parts_of_a_base_need_several_devices(store):
    run = subprocess.run(
        command(store, "signs", "--kind", "lora", "--shard-base"), capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1
    lines = [line for line in run.stderr.splitlines() if line.startswith("growlm: ")]
    assert lines == ["growlm: --shard-base is for several devices, and there is one; give --devices 2 or more as well"]


def test_rows_that_cannot_be_shared_are_refused_with_both_numbers(store):
    run = subprocess.run(
        command(store, "signs", "--batch-size", "3", "--devices", "2"), capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1
    lines = [line for line in run.stderr.splitlines() if line.startswith("growlm: ")]
    assert lines == ["growlm: --batch-size is 3, for 2 devices; give a multiple of 2"]


def test_ranks_that_do_not_agree_say_in_what(store):
    (store.parent / "other.txt").write_text(text_of("digits"))
    here = command(store, "signs", "--kind", "lora")
    there = [
        *here[: here.index("--data") + 1],
        str(store.parent / "other.txt"),
        *LEARN,
        "--kind",
        "lora",
        "--seed",
        "1",
    ]
    for status, _, said in told(ranks([here, there])):
        assert status == 1
        lines = [line for line in said.splitlines() if "growlm: " in line]
        assert len(lines) == 1
        assert "has not what rank 0" in lines[0]
        assert re.search(r"text: \w+ there, \w+ here; settings: \w+ there, \w+ here", lines[0])
    assert list(Store.open(store).modules) == ["letters"]


SHARED = """
import sys
import time
from pathlib import Path
from growlm.errors import GrowlmError
from growlm.training.parallel import joined
with joined() as ranks:
    try:
        ranks.require_shared(Path(sys.argv[1 + ranks.rank]))
    except GrowlmError as error:
        print(error)
"""


def test_hosts_that_do_not_see_each_others_files_are_told_so(tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder in (mine, other):
        folder.mkdir()
    for places, there in (((mine, other), True), ((mine, mine), False)):
        found = told(ranks([[sys.executable, "-c", SHARED, *map(str, places)]] * 2))
        for status, out, _ in found:
            assert status == 0
            assert ("rank 1 on" in out and "does not see the files of rank 0" in out) is there
    assert not list(mine.iterdir())
