from __future__ import annotations

import gc
import itertools
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Tiny models run fastest on one thread. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing in the suite may reach a hub; set before transformers and datasets are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import torch

# Without a GPU, Triton's kernels run under its interpreter, if this is set before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests run beside one another: how long one takes says nothing about it.
settings.register_profile("suite", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

pytest.register_assert_rewrite("interruptions")


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """What a fixture or a test draws depends on nothing that ran before: which tests those are is chance where several
    processes share them."""
    import torch

    random.seed(0)
    torch.manual_seed(0)


pytest_pyfunc_call = pytest_fixture_setup


def _may_leave_open(item: pytest.Item | None) -> bool:
    return item is not None and any("ignore::ResourceWarning" in m.args for m in item.iter_markers("filterwarnings"))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What tests left open that may is closed while they are there to be blamed: the collector comes at any time, and
    other tests may not."""
    if _may_leave_open(item) and not _may_leave_open(nextitem):
        gc.collect()


@pytest.fixture(scope="session")
def _homes(tmp_path_factory) -> Iterator[Path]:
    """Folders numbered here: pytest lists all that there are to number one more, which thousands of tests would wait
    for."""
    folder = tmp_path_factory.mktemp("homes")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _own_home(_homes, monkeypatch):
    """No test reads or writes the user's folders."""
    home = next(_homes)
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))


@pytest.fixture(autouse=True)
def _no_lines_of_progress(monkeypatch):
    """What a test hears does not depend on how busy the machine is; `test_progress.py` listens."""
    from growlm import progress

    monkeypatch.setattr(progress, "_LOG_SECONDS", 86_400.0)
    monkeypatch.setattr(progress, "_FIRST_SECONDS", 86_400.0)


@pytest.fixture
def one_thread():
    """For files whose models are so small that more threads only cost time, whatever OMP_NUM_THREADS says."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def home(made, tmp_path) -> Path:
    """A copy, to change at will, of the folder that a file's fixture `made` fills once."""
    return shutil.copytree(made, tmp_path / "home")


@pytest.fixture
def store(home):
    """The store of `home`, opened."""
    from growlm.store import Store

    return Store.open(home / "store")


@pytest.fixture(scope="module")
def made(request, tmp_path_factory) -> Path:
    """A store of what a module of tests says in SHAPES; many have one of their own instead."""
    from stores import make_store

    home = tmp_path_factory.mktemp("made")
    make_store(home, "llama", request.module.SHAPES)
    return home / "store"


@pytest.fixture(scope="module")
def served(made) -> Iterator[object]:
    """A server of the store that a module of tests has made."""
    from servers import serving

    with serving(made) as server:
        yield server
