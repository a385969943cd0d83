"""Requirements and doctor: what is not of a tested release is told once, and what will not work has exit status 1."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from growlm import base, cli, doctor
from growlm.requirements import all_requirements, range_of, remarks
from growlm.store import Store
from stores import make_store

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GROWLM = [
    "torch>=2.11",
    "transformers<5.25,>=5.17",
    "safetensors>=0.6",
    'torch<2.14; extra == "tested"',
    'peft>=0.18; extra == "bench"',
    'growlm[bench]; extra == "dev"',
]
NEWER = (
    "transformers 5.25.0 is newer than those that growlm is tested with (>=5.17,<5.25); it is tried all the same, and "
    'if something fails: pip install "transformers>=5.17,<5.25"'
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs, as far as metadata goes, packages of the releases that are given, growlm with `GROWLM` among them."""

    def install(requires: list[str] = GROWLM, **releases: str) -> None:
        found = {"growlm": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.24.0", "safetensors": "0.8.0", **releases}
        for name, release in found.items():
            folder = tmp_path / "site" / f"{name}-{release}.dist-info"
            folder.mkdir(parents=True)
            lines = [f"Requires-Dist: {line}" for line in requires] if name == "growlm" else []
            head = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {release}"]
            (folder / "METADATA").write_text("\n".join([*head, *lines]) + "\n")
        monkeypatch.syspath_prepend(tmp_path / "site")

    return install


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("made")
    make_store(home)
    return home


@pytest.fixture
def run(capsys):
    """Runs a command line in this process: exit status, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(arguments))
        return int(caught.value.code or 0), *capsys.readouterr()

    return call


def state_of(name: str, *extras: str) -> str:
    return next(one.state for one in all_requirements(*extras) if one.name == name)


# The range


@pytest.mark.parametrize(
    ("release", "state"),
    [
        ("5.16.9", "older"),
        ("5.17.0.dev0", "older"),
        ("5.17.0", "fine"),
        ("5.23.0rc1", "fine"),
        ("5.24.0", "fine"),
        ("5.24.9", "fine"),
        ("5.25.0.dev0", "newer"),
        ("5.25.0", "newer"),
        ("6.0", "newer"),
        ("made-at-home", "fine"),
    ],
)
def test_a_release_is_compared_with_the_range(installed, release, state):
    installed(transformers=release)
    assert state_of("transformers") == state
    assert range_of("transformers") == ">=5.17,<5.25"


@pytest.mark.parametrize(
    ("release", "state"), [("2.10.2", "older"), ("2.11.0", "fine"), ("2.13.1+cu130", "fine"), ("2.14.0", "newer")]
)
def test_how_far_up_torch_is_tested_bounds_no_installation(installed, release, state):
    installed(torch=release)
    assert state_of("torch") == state
    assert range_of("torch") == ">=2.11,<2.14"
    assert [r for r in PROJECT["dependencies"] if r.startswith("torch")] == ["torch>=2.11"]


def test_extras_are_listed_where_they_are_asked_for(installed):
    installed(peft="0.17.0")
    assert [one.name for one in all_requirements()] == ["torch", "transformers", "safetensors"]
    assert state_of("peft", "bench") == "older"


def test_a_package_of_which_nothing_is_there_is_missing(installed):
    installed([*GROWLM, "no-such-package>=1"])
    assert state_of("no-such-package") == "missing"


def test_a_package_without_metadata_is_there(installed):
    installed([*GROWLM, "tiny>=1"])  # a file of the tests
    assert state_of("tiny") == "fine"


def test_constraints_are_of_the_range_and_name_no_place():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), lines
    pinned = {name.lower().replace("-", "_"): Version(version) for name, version in (x.split("==") for x in lines)}
    for line in [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]:
        asked = Requirement(line)
        if asked.name not in ("growlm", "triton"):  # of which a torch for GPUs brings its own
            assert pinned[asked.name.lower().replace("-", "_")] in asked.specifier, line


# The command line


def test_a_newer_release_is_one_warning_and_is_tried(installed, store, run):
    before = run("status", str(store.path), "--json")
    installed(transformers="5.25.0")
    after = run("status", str(store.path), "--json")
    assert (before[2], after[:2]) == ("", before[:2])
    assert after[2].count("\n") == 1
    assert after[2].startswith(
        "growlm: transformers 5.25.0 is newer than those that growlm is tested with (>=5.17,<5.25)"
    )


def test_an_older_release_is_one_line_with_the_cure(installed, store, run):
    installed(torch="2.10.0")
    code, _, err = run("status", str(store.path))
    assert code == 0
    assert (
        err == 'growlm: torch 2.10.0 is older than growlm works with (>=2.11,<2.14): pip install "torch>=2.11,<2.14"\n'
    )


def test_a_missing_package_ends_a_command_in_one_line(installed, store, run):
    installed([*GROWLM, "no-such-package>=1"])
    wanted = (1, "", 'growlm: no-such-package is not installed: pip install "no-such-package>=1"\n')
    assert run("status", str(store.path)) == wanted


def test_the_library_says_nothing(installed, store, capsys):
    installed(transformers="5.25.0", torch="2.14.0")
    Store.open(store.path).load_base()
    assert capsys.readouterr() == ("", "")
    assert len(remarks()) == 2


# Doctor


def test_doctor_in_json(installed, run):
    installed(peft="0.21.2")
    code, out, err = run("doctor", "--json")
    found = json.loads(out)
    assert (code, err, found["ok"], found["problems"]) == (0, "", True, [])
    assert found["versions"]["transformers"] == {"installed": "5.24.0", "range": ">=5.17,<5.25", "state": "fine"}
    assert {"python", "growlm", "torch", "peft"} <= set(found["versions"])
    assert found["processor"]["cores"] >= 1
    assert found["processor"]["threads"] == 1
    assert found["precision"]["cpu"] in ("float32", "bfloat16")
    assert ["cpu", *(device["device"] for device in found["devices"])] == list(found["precision"])
    assert found["memory"]["free_bytes"] > 0
    assert found["disk"]["free_bytes"] > 0


def test_doctor_for_people(installed, run):
    installed([*GROWLM, 'no-such-package>=1; extra == "eval"'], transformers="5.25.0")
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    lines = {name: text for name, _, text in (line.partition(" ") for line in out.splitlines())}
    assert lines["transformers"].split("  ")[-2:] == [">=5.17,<5.25", "newer than tested"]
    assert lines["torch"].split() == ["2.13.0+cpu", ">=2.11,<2.14"]
    assert lines["no-such-package"].split() == ["not", "installed", ">=1"]
    assert {"python", "growlm", "processor", "precision", "memory", "disk"} < set(lines)
    assert [line for line in out.splitlines() if ": " in line] == [f"warning: {NEWER}"]


def test_doctor_ends_with_1_where_something_will_not_work(installed, run):
    installed([*GROWLM, "no-such-package>=1"], transformers="5.16.0", peft="0.17.0")
    code, out, _ = run("doctor")
    assert code == 1
    told = [line for line in out.splitlines() if ": " in line]
    assert told[0].startswith("problem: transformers 5.16.0 is older")
    assert told[1].startswith("problem: no-such-package is not installed")
    assert told[2].startswith("warning: peft 0.17.0 is older")  # growlm can do without
    assert len(told) == 3


def test_doctor_without_a_torch_that_works(installed, monkeypatch):
    installed()
    monkeypatch.setitem(sys.modules, "torch", None)
    found = doctor.examine()
    assert not found["ok"]
    assert "torch cannot be imported" in found["problems"][0]
    assert found["versions"]["transformers"]["installed"] == "5.24.0"
    assert found["memory"]["free_bytes"] is None


def test_doctor_tries_a_tiny_model(installed, monkeypatch):
    installed()

    def broken(self, *_):
        raise TypeError("forward() got an unexpected keyword argument 'cache'")

    monkeypatch.setattr(base.Base, "logits", broken)
    found = doctor.examine()
    assert not found["ok"]
    assert "a tiny model does not run (TypeError: forward() got" in found["problems"][0]


def test_doctor_of_a_gpu_that_torch_was_not_built_for(installed, monkeypatch, tmp_path):
    installed()
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = doctor.examine()
    assert found["ok"]
    assert "driver for NVIDIA GPUs" in found["warnings"][0]


def test_doctor_of_gpus(installed, monkeypatch, run):
    installed()
    pretended = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "mem_get_info": lambda device: (10**9 * (device.index + 1), 80 * 10**9),
        "get_device_name": lambda device: f"GPU {device.index}",
        "device": nullcontext,
        "is_bf16_supported": lambda including_emulation: True,
    }
    for name, function in pretended.items():
        monkeypatch.setattr(f"torch.cuda.{name}", function)
    code, out, _ = run("doctor")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert "cuda:0 GPU 0, 1.0 GB of 80.0 GB free" in lines
    assert "cuda:1 GPU 1, 2.0 GB of 80.0 GB free" in lines
    precision = next(line for line in lines if line.startswith("precision"))
    assert precision.endswith("on cpu, bfloat16 on cuda:0, bfloat16 on cuda:1")


# tools/versions.py


@pytest.fixture(scope="module")
def versions():
    spec = importlib.util.spec_from_file_location("versions", ROOT / "tools" / "versions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_newest_of_everything_is_asked_for_without_upper_ends(versions):
    asked = [versions.unbounded(line) for line in (*versions.requirements(), *versions.requirements("dev"))]
    assert {"torch>=2.11", "transformers>=5.17"} < set(asked)
    assert any(line.startswith("peft>=") for line in asked)
    assert not any("<" in line or "growlm" in line for line in asked)
    assert versions.unbounded("transformers<5.25,>=5.17") == "transformers>=5.17"


def test_what_differs_is_shown(versions, capsys):
    versions.compare({"torch": "2", "einops": "1", "six": "1"}, {"torch": "2", "einops": "1", "six": "2"}, ("a", "b"))
    head, six, torch = capsys.readouterr().out.splitlines()
    assert head.split() == ["a", "b"]
    assert six.split() == ["six", "1", "2", "differs"]
    assert torch.split() == ["torch", "2", "2"]
