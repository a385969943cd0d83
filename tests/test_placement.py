"""Placement: which device and dtype are chosen, what is said where there is none such, and that nobody else asks."""

from __future__ import annotations

import platform
import re
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import growlm
from disk import all_files, write_jsonl
from growlm import Engine, LearnConfig, Store, cli, learn
from growlm.base import placement
from growlm.base.placement import Placement, find_device, out_of_memory
from growlm.errors import ConfigError
from growlm.training.config import RouterConfig, TrainConfig
from growlm.training.loop import train
from stores import ALPHABETS, domain_text, make_store

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("made")
    make_store(home)
    for domain in ALPHABETS:
        write_jsonl(home / f"{domain}.jsonl", [domain_text(domain, 500 + i) for i in range(12)])
    return home


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine look like another: its GPUs, what torch was built with, its processor."""

    def has(
        *, gpus: int = 0, built: bool = True, bfloat16: bool = False, mps: bool = False, flags: bool = False,
        processor: str = "x86_64",
    ) -> None:  # fmt: skip
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16)
        monkeypatch.setattr(torch.version, "cuda", "13.0" if built else None)
        monkeypatch.setattr(torch.backends.mps, "is_built", lambda: mps)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda: flags)
        monkeypatch.setattr(platform, "machine", lambda: processor)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return has


# The device


def test_auto_is_a_gpu_of_cuda_or_the_processor(machine):
    machine(gpus=1)
    assert find_device() == find_device("auto") == find_device(None) == torch.device("cuda")
    machine(gpus=0, mps=True)  # which is taken where it is asked for
    assert find_device() == torch.device("cpu")
    assert find_device("mps") == torch.device("mps")


def test_a_device_is_taken_as_it_is_named(machine):
    machine(gpus=2)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert find_device(name) == torch.device(name)
    assert find_device(torch.device("meta")) == torch.device("meta")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CUDA", "meta", "cuda:1 "])
def test_an_unknown_device_is_refused(name, machine):
    machine(gpus=2)
    with pytest.raises(ConfigError, match=re.escape(f"device {name!r} is not one of auto, cpu, cuda, cuda:N, mps")):
        find_device(name)


def test_what_lacks_is_named(machine, monkeypatch):
    machine(built=False)
    with pytest.raises(ConfigError, match=r"^device cuda:1: torch \S+ is built without CUDA; install .*, or use cpu$"):
        find_device("cuda:1")
    machine(gpus=0)
    with pytest.raises(ConfigError, match=r"^device cuda: torch \S+ is built for CUDA 13.0 and sees no GPU; check "):
        find_device("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(ConfigError, match=r"sees no GPU \(CUDA_VISIBLE_DEVICES is '7'\); check "):
        find_device("cuda")
    machine(gpus=1)
    with pytest.raises(ConfigError, match=r"^device cuda:1: not among the GPUs here, cuda:0 alone; "):
        find_device("cuda:1")
    machine(gpus=4)
    with pytest.raises(ConfigError, match=r"^device cuda:4: not among the GPUs here, cuda:0 to cuda:3; "):
        find_device("cuda:4")
    machine()
    with pytest.raises(ConfigError, match=r"^device mps: torch .* is built without MPS"):
        find_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    with pytest.raises(ConfigError, match=r"^device mps: there is no GPU that Metal can use"):
        find_device("mps")


# The dtype


@pytest.mark.parametrize(
    ("device", "has", "dtype"),
    [
        ("cuda", {"bfloat16": True}, torch.bfloat16),
        ("cuda:1", {"bfloat16": False, "flags": True}, torch.float32),
        ("mps", {"mps": True, "flags": True}, torch.float32),
        ("cpu", {"flags": True}, torch.bfloat16),
        ("cpu", {"flags": False, "bfloat16": True}, torch.float32),
        ("auto", {"bfloat16": True}, torch.bfloat16),
    ],
)
def test_auto_is_what_the_device_is_made_for(device, has, dtype, machine):
    machine(gpus=2, **has)
    assert Placement.of(device).dtype == dtype
    for name in ("float32", "bfloat16"):  # whatever it is made for
        assert Placement.of(device, name).dtype == getattr(torch, name)


def test_emulated_bfloat16_does_not_count_and_the_named_gpu_is_asked(machine, monkeypatch):
    machine(gpus=2)
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(asked.append(device)))
    assert Placement.of("cuda:1").dtype == torch.float32
    assert asked == [torch.device("cuda:1")]


def test_all_gpus_are_named(machine):
    machine(gpus=2, mps=True)
    assert [str(device) for device in placement.gpus()] == ["cuda:0", "cuda:1", "mps"]
    machine()
    assert placement.gpus() == []


def test_instructions_are_those_that_torch_finds(machine):
    machine(flags=True)
    assert placement.instructions()[-2:] == ["AVX-512 BF16", "AMX"]
    machine(flags=False)
    assert not {"AVX-512 BF16", "AMX"} & set(placement.instructions())


@pytest.fixture
def stopwatch(monkeypatch):
    """Makes products of matrices take times of our choice, in turn float32 and bfloat16; counts the looks at it."""
    looks = []

    def shows(float32: float, bfloat16: float) -> list[float]:
        times = (0.0, float32, 0.0, bfloat16)

        def look() -> float:
            looks.append(times[len(looks) % 4])
            return looks[-1]

        looks.clear()
        placement._bfloat16_speed.cache_clear()
        monkeypatch.setattr(time, "perf_counter", look)
        return looks

    yield shows
    placement._bfloat16_speed.cache_clear()


@pytest.mark.parametrize(
    ("float32", "bfloat16", "dtype"),
    [(4.0, 1.0, torch.bfloat16), (1.0, 4.0, torch.float32), (1.2, 1.0, torch.float32)],
)
def test_where_flags_do_not_tell_it_is_measured_once(float32, bfloat16, dtype, machine, stopwatch):
    machine(processor="aarch64")
    torch.set_num_threads(3)
    looks = stopwatch(float32, bfloat16)
    assert Placement.of("cpu").dtype == dtype
    many = len(looks)
    assert many > 0
    assert Placement.of("cpu").dtype == dtype
    assert len(looks) == many
    assert torch.get_num_threads() == 3  # the fixture one_thread sets it back


@pytest.mark.parametrize(
    "has", [{"processor": "x86_64"}, {"processor": "AMD64"}, {"processor": "arm64", "flags": True}]
)
def test_where_flags_tell_nothing_is_measured(has, machine, stopwatch):
    machine(**has)
    looks = stopwatch(4.0, 1.0)
    assert Placement.of("cpu").dtype == (torch.bfloat16 if has.get("flags") else torch.float32)
    assert not looks


def test_measuring_draws_no_random_numbers(machine):
    machine(processor="riscv64")
    placement._bfloat16_speed.cache_clear()
    before = torch.get_rng_state()
    assert Placement.of("cpu").dtype in (torch.float32, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_placement_says_where_it_is_and_that_it_is_alone():
    found = Placement.of("cpu", "bfloat16")
    assert found.record() == {"device": "cpu", "dtype": "bfloat16"}
    assert (found.rank, found.world) == (0, 1)
    with found.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with Placement.of("cpu", "float32").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_no_other_file_asks_which_devices_there_are():
    root = Path(growlm.__file__).parent
    asks = re.compile(
        r"(cuda|mps)\.is_available\(|is_bf16_supported|device_count|backends\.(mps|cuda)|_is_a(vx|mx)|\"cuda\" if"
    )
    found = {str(p.relative_to(root)) for p in root.rglob("*.py") if asks.search(p.read_text(encoding="utf-8"))}
    assert found == {"base/placement.py"}


# In the verbs

COMMANDS = {
    "pretrain": ("pretrain", "new-base", "--data", "letters.jsonl"),
    "new": ("new", "brain", "--base", "base", "--general", "general.jsonl"),
    "learn": ("learn", "store", "law", "--data", "letters.jsonl"),
    "update": ("learn", "store", "letters", "--update", "--data", "letters.jsonl"),
    "grow": ("grow", "store", "letters", "--experts", "+256"),
    "grow on text": ("grow", "store", "letters", "--experts", "+256", "--data", "letters.jsonl"),
    "take back": ("grow", "store", "letters", "--undo"),
    "finetune": ("finetune", "base", "better", "--data", "letters.jsonl"),
    "prune a module": ("prune", "store", "--module", "letters", "--keep", "0.5", "--data", "letters.jsonl"),
    "prune a model": ("prune", "base", "small", "--keep", "0.5", "--data", "letters.jsonl"),
    "usage of a store": ("usage", "store", "--module", "letters", "--data", "letters=letters.jsonl"),
    "usage of a model": ("usage", "base", "--data", "letters=letters.jsonl"),
    "router": ("router", "store", "--kind", "transformer"),
    "eval": ("eval", "store", "--data", "letters=letters.jsonl", "--report", "report"),
    "route": ("route", "store", "abc"),
    "generate": ("generate", "store", "abc"),
    "chat": ("chat", "store"),
    "demo": ("demo", "--out", "demo-out", "--fast"),
}


@pytest.fixture
def run(home, monkeypatch, capsys):
    """Runs a command line in the folder of the store: exit status, stdout, stderr."""
    monkeypatch.chdir(home)

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_device_that_is_not_there_is_one_line_and_leaves_nothing(command, run, home, machine):
    machine(built=False)
    before = all_files(home)
    folders = {path for path in home.rglob("*") if path.is_dir()}
    status, out, err = run(*command, "--device", "cuda")
    assert (status, out) == (1, "")
    assert re.fullmatch(r"growlm: device cuda: torch \S+ is built without CUDA; install .*\n", err)
    assert all_files(home) == before
    assert {path for path in home.rglob("*") if path.is_dir()} == folders


def test_verbs_run_where_they_are_told(run, home, machine):
    machine(gpus=1)  # that is not there: what takes auto for an answer fails
    settings = ["--num-layers", "1", "--sequence-length", "16", "--batch-size", "4", "--max-rows", "50"]
    settings.append("--admit-anyway")
    for command in (
        ("new", "brain", "--base", "base", "--general", "general.jsonl"),
        ("learn", "brain", "letters", "--data", "letters.jsonl", *settings),
        ("route", "brain", "abc"),
        ("generate", "brain", "abc", "--max-new-tokens", "2"),
        ("eval", "brain", "--data", "letters=letters.jsonl"),
        ("finetune", "base", "better", "--data", "letters.jsonl", "--sequence-length", "16", "--batch-size", "4"),
    ):
        status, _, err = run(*command, "--device", "cpu")
        assert status == 0, err
    said = Store.open(home / "brain").module("letters").manifest.training
    assert (said["device"], said["dtype"]) == ("cpu", "float32")


def test_a_device_without_effect_is_refused(run):
    for command, hint in (
        (("new", "brain", "--base", "base"), "--device is where --general is read"),
        (("router", "store"), "so that --device is of no effect"),
        (("prune", "base", "small", "--keep", "0.5", "--drop-layers", "top"), "leave out --device"),
    ):
        status, _, err = run(*command, "--device", "cpu")
        assert status == 1
        assert hint in err


def test_a_run_is_the_same_however_its_device_is_named(home, store, machine):
    """What is recorded does not name the device that was asked for, which another machine may not have."""
    machine()
    settings = {"num_layers": 1, "sequence_length": 16, "batch_size": 4, "max_rows": 50, "admit_anyway": True}
    records = []
    for name, device in (("one", "auto"), ("other", "cpu")):
        copy = store.beside(home / name)
        learn(copy, "law", [home / "letters.jsonl"], LearnConfig(device=device, **settings), progress=False)
        records.append(copy.module("law").manifest.training)
    assert records[0]["run"] == records[1]["run"]
    assert records[0]["settings"] == records[1]["settings"]
    assert "device" not in records[0]["settings"]
    assert RouterConfig(**RouterConfig(device="cuda").to_json()) == RouterConfig()


def test_an_engine_is_where_it_is_told(store, machine):
    machine(gpus=1)
    with Engine(store, device="cpu") as engine:
        assert engine.base.device == torch.device("cpu")
    machine(gpus=0)
    for device in (None, "auto", torch.device("cpu")):
        with Engine(store, device=device) as engine:
            assert engine.base.device == torch.device("cpu")
    with pytest.raises(ConfigError, match="sees no GPU"):
        Engine(store, device="cuda")
    with pytest.raises(ConfigError, match="sees no GPU"):
        store.load_base(device="cuda:0")


def test_a_checkpoint_has_the_draws_of_a_gpu_only_where_that_trains(tmp_path, monkeypatch):
    """Whoever uses a GPU in the same process for something else."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: pytest.fail("asked the GPU"))
    weight = nn.Parameter(torch.ones(2, 2))
    train(
        {"weight": weight}, lambda step: [weight.square().sum()], 2, lambda step: 1, TrainConfig(), 0.01,
        folder=tmp_path, resume_hint="",
    )  # fmt: skip
    assert (tmp_path / "step-2.safetensors").is_file()


# Out of memory


def test_a_full_gpu_is_one_line(run, monkeypatch):
    told = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is "
        "free.\nSee documentation for Memory Management"
    )

    def full(*_, **__):
        raise torch.OutOfMemoryError(told)

    monkeypatch.setattr(Engine, "stream", full)
    status, _, err = run("generate", "store", "abc")
    assert status == 1
    assert re.fullmatch(
        r"growlm: out of memory on the GPU \(asked for 2.00 GiB more, 1.20 GiB of 79.11 GiB free\); .*\n", err
    )
    assert "--device cpu" in err


def test_errors_that_say_that_memory_is_full():
    metal = "MPS backend out of memory (MPS allocated: 5.40 GB). Tried to allocate 256.00 MB on private pool."
    assert (out_of_memory(RuntimeError(metal)) or "").startswith(
        "out of memory on the GPU (asked for 256.00 MB more); "
    )
    blas = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert (out_of_memory(RuntimeError(blas)) or "").startswith("out of memory on the GPU; ")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**61, dtype=torch.uint8)
    line = out_of_memory(caught.value) or ""
    assert line.startswith("out of memory on the processor (asked for 2305843009213693952 bytes more); ")
    assert "--device" not in line
    assert out_of_memory(RuntimeError("shapes cannot be multiplied")) is None


def test_other_errors_keep_their_trace(home, monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(Engine, "route", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main(["route", str(home / "store"), "abc"])
