"""Releases of what growlm stands on: which are tested, and whether others work. Knows pip, pyproject.toml and pytest's
marker `versions`; nothing of growlm itself.

    python tools/versions.py lock                 write constraints.txt: the newest releases that pyproject.toml allows
    python tools/versions.py test [RELEASE ...]   the tests marked `versions` under other releases of transformers:
                                                  those given, else the oldest and the newest allowed
    python tools/versions.py newest [--all]       the same tests, or all, under the newest release of everything

`test` runs on the Python of an environment that has growlm (`make setup`), and installs beside it only what differs.
The other two install all from nothing; torch is the release that constraints.txt names, or --torch RELEASE, because it
is large and which build is right depends on the machine. `test` and `newest` keep their environments in .versions/, to
look into what failed there. PIP_ARGS in the environment: options for the installation of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import venv
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
KEPT = ROOT / ".versions"
GUIDE = "docs/guides/transformers.md"
SHOWN = ("torch", "transformers", "tokenizers", "huggingface_hub", "safetensors", "datasets", "peft")
_HEAD = """\
# The releases that growlm is tested with, and that `make setup` installs. Written by `make lock` on {date}, with
# Python {python}: a fresh environment, torch first, then the newest of all else that pyproject.toml allows.
"""


class Environment:
    """A virtual environment, made anew; with `beside`, on top of the packages of the running one, and used again."""

    def __init__(self, folder: Path, *, beside: bool = False) -> None:
        venv.create(folder, with_pip=not beside, clear=not beside, symlinks=True)
        self._folder, self._python = folder, folder / "bin" / "python"
        if beside:  # pip comes from there too
            line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
            (Path(self._output("-c", "import site; print(site.getsitepackages()[-1])")) / "beside.pth").write_text(line)

    def install(self, *what: str) -> None:
        """Quiet, unless it fails: then all that pip said, because --quiet would hide which packages are in conflict."""
        # Most of what is installed is never imported: to compile it all would take longer than the tests.
        command = [self._python, "-m", "pip", "install", "--no-compile", *what]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(f"{done.stdout}\nversions: pip could not install {' '.join(what)}; its reasons stand above")

    def install_torch(self, release: str) -> None:
        self.install(*shlex.split(os.environ.get("PIP_ARGS", "")), f"torch=={release}")

    def install_growlm_unbounded(self) -> None:
        """As one that takes any newer release: else its command line would warn, and tests of what it prints fail."""
        self.install("--no-deps", "--editable", ".")
        for file in self._folder.glob("lib/*/site-packages/growlm-*/METADATA"):
            file.write_text(unbounded(file.read_text("utf-8")), encoding="utf-8")

    def versions(self) -> dict[str, str]:
        """Of every package but growlm and pip, without a build's suffix such as +cpu; and but Triton, of which a torch
        for GPUs brings its own."""
        found = json.loads(self._output("-m", "pip", "list", "--format=json"))
        kept = [p for p in found if p["name"] not in ("growlm", "pip", "triton")]
        return {p["name"]: p["version"].partition("+")[0] for p in sorted(kept, key=lambda p: p["name"].lower())}

    def passes(self, *, everything: bool = False) -> bool:
        """Whether the tests marked `versions` do, or all; pytest's lines go to the terminal."""
        marked = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.versions" in p.read_text("utf-8")]
        which = [] if everything else ["-m", "versions", *marked]  # to read the other files takes as long as the tests
        beside = ["-n", "logical", "--maxprocesses", "8", "--dist", "worksteal"]  # as `make test`
        command = [self._python, "-m", "pytest", "-p", "no:cacheprovider", *beside, "--tb=short", "-rfE", *which]
        status = subprocess.run(command, cwd=ROOT).returncode
        if status not in (0, 1):  # not tests that failed, of which pytest has told
            print(f"\npytest ended with exit status {status}", flush=True)
        return status == 0

    def _output(self, *arguments: str) -> str:
        return subprocess.run([self._python, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def tested() -> dict[str, str]:
    """What constraints.txt names."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def requirements(extra: str | None = None) -> list[str]:
    """What pyproject.toml asks for, with an extra and those that it names in turn."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = []
    for line in project["optional-dependencies"][extra] if extra else project["dependencies"]:
        own = re.match(r"growlm\[(.+)\]", line)
        found += [r for name in own[1].split(",") for r in requirements(name.strip())] if own else [line]
    return found


def unbounded(text: str) -> str:
    """Requirements without their upper ends."""
    return re.sub(r",<=?[\d.]+|<=?[\d.]+,?", "", text)


def lock(torch: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        env = Environment(Path(folder))
        env.install_torch(torch)
        env.install("--editable", ".[dev,documents]")
        found = env.versions()
    before = tested() if CONSTRAINTS.exists() else {}
    head = _HEAD.format(date=date.today(), python=".".join(map(str, sys.version_info[:2])))
    CONSTRAINTS.write_text(head + "".join(f"{name}=={version}\n" for name, version in found.items()), encoding="utf-8")
    compare(before, found, ("before", "now"))
    return 0


def test(releases: list[str]) -> int:
    allowed = next(r for r in requirements() if r.startswith("transformers"))
    oldest = re.search(r">=([\d.]+)", allowed)
    assert oldest is not None
    wanted = {r: f"transformers=={r}" for r in releases or [oldest[1]]}
    if not releases:
        wanted["newest"] = allowed
    passed: dict[str, bool] = {}
    for name, requirement in wanted.items():
        start = time.monotonic()
        env = Environment(KEPT / f"transformers-{name}", beside=True)
        env.install("--upgrade", requirement)
        found = env.versions()
        print("==", ", ".join(f"{n} {found[n]}" for n in ("transformers", "tokenizers", "torch")), flush=True)
        passed[found["transformers"]] = env.passes()
        print(f"== {time.monotonic() - start:.0f} s", flush=True)
    for release, good in passed.items():
        print(f"transformers {release}: {'passed' if good else f'FAILED; see {GUIDE}'}")
    return 0 if all(passed.values()) else 1


def newest(torch: str, everything: bool) -> int:
    env = Environment(KEPT / "newest")
    env.install_torch(torch)
    env.install(f"torch=={torch}", *map(unbounded, [*requirements(), *requirements("dev")]))
    env.install_growlm_unbounded()
    good = env.passes(everything=everything)
    print()
    compare(tested(), env.versions(), ("tested", "newest"))
    which = "all tests" if everything else "the tests marked versions"
    print(f"\n{which}: {'passed' if good else f'FAILED, as listed above; see {GUIDE}'}")
    return 0 if good else 1


def compare(old: dict[str, str], new: dict[str, str], titles: tuple[str, str]) -> None:
    """The packages that matter most, and whatever differs."""
    names = [name for name in sorted({*old, *new}, key=str.lower) if name in SHOWN or old.get(name) != new.get(name)]
    width = max(map(len, names))
    print(f"{'':{width}}  {titles[0]:>14}  {titles[1]:>14}")
    for name in names:
        mark = "" if old.get(name) == new.get(name) else "  differs"
        print(f"{name:{width}}  {old.get(name, '-'):>14}  {new.get(name, '-'):>14}{mark}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("lock", "test", "newest"):
        verb = verbs.add_parser(name)
        if name == "test":
            verb.add_argument("releases", nargs="*", metavar="RELEASE")
        else:
            verb.add_argument("--torch", metavar="RELEASE", help="By default the one in constraints.txt.")
        if name == "newest":
            verb.add_argument("--all", action="store_true", help="Run the whole suite.")
    asked = parser.parse_args()
    if asked.verb == "test":
        return test(asked.releases)
    torch = asked.torch or tested()["torch"]
    return lock(torch) if asked.verb == "lock" else newest(torch, asked.all)


if __name__ == "__main__":
    sys.exit(main())
