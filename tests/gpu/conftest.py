"""Tests on a GPU: what is computed there against the processor's float32, and how far apart the two are.

The one measure: the largest difference between two tensors, divided by the largest magnitude in the processor's. What
was compared is listed at the end of the run.

Without a GPU, `GROWLM_TEST_DEVICE=pretended` runs them on one that is pretended (`elsewhere.py`): hardly a number
differs then, but tensors that are in the wrong place show, and mistakes in the tests themselves.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = os.environ.get("GROWLM_TEST_DEVICE", "cuda")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

Near = Callable[..., None]
# By what was compared and its dtype: the largest share of what is allowed, the difference, where it was, comparisons.
_worst: dict[str, tuple[float, float, str, int]] = {}
_told: list[str] = []
_started = time.monotonic()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        reason = "no CUDA device here; docs/guides/gpu.md says how to run these tests on a machine with one"
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason))


@pytest.fixture(scope="session", autouse=True)
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    os.environ.setdefault("PYTORCH_KERNEL_CACHE_PATH", str(tmp_path_factory.mktemp("kernels")))
    # Products in float32 are what they are compared with: no TF32, which keeps 10 bits of 23.
    torch.set_float32_matmul_precision("highest")
    if DEVICE == "pretended":
        from elsewhere import pretended

        with pretended():
            yield "cuda"
    else:
        yield DEVICE


@pytest.fixture(autouse=True)
def _alive(device: str) -> Iterator[None]:
    """Ends the run where a kernel has failed: every later test of the process would only repeat its error."""
    yield
    if DEVICE == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"a kernel has failed, and CUDA can compute no more in this process: {error}", returncode=1)


@pytest.fixture(scope="session")
def near() -> Near:
    """`near("subject: part", found, wanted)`: that two tensors are as close as their dtype allows. `times` multiplies
    what is allowed, for what sums up the errors of many layers or steps."""

    def near(what: str, found: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32, *, times: float = 1) -> None:
        found, wanted = (x.detach().to_dense() if x.is_sparse else x.detach() for x in (found, wanted))
        assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
        found, wanted = found.double().cpu(), wanted.double().cpu()
        finite = wanted.isfinite()
        assert torch.equal(found.isfinite(), finite), f"{what}: infinite or no number where it must not be"
        largest, apart = (float(x[finite].abs().amax()) if finite.any() else 0.0 for x in (wanted, found - wanted))
        difference, allowed = apart / (largest or 1.0), TOLERANCE[dtype] * times
        subject, _, part = what.partition(": ")
        key, share = f"{subject}, {str(dtype).removeprefix('torch.')}", difference / allowed
        before = _worst.get(key, (-1.0, 0.0, "", 0))
        _worst[key] = (*(max(before[:3], (share, difference, part))), before[3] + 1)
        assert difference <= allowed, f"{what} in {dtype}: differs by {difference:.2e}, allowed is {allowed:.2e}"

    return near


@pytest.fixture(scope="session")
def tell() -> Callable[[str], None]:
    """Adds a line to what is told at the end: what is measured, and not asked for."""
    return _told.append


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A `with` block in which the verbs that choose a device themselves find no GPU."""

    @contextmanager
    def block() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            yield

    return block


# What was compared is gathered from all processes of a run (`pytest -n`).


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["compared"] = (list(_worst.items()), _told)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    worst, told = getattr(node, "workeroutput", {}).get("compared", ([], []))
    for key, (share, difference, part, number) in worst:
        before = _worst.get(key, (-1.0, 0.0, "", 0))
        _worst[key] = (*max(before[:3], (share, difference, part)), before[3] + number)
    _told.extend(told)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _worst and not _told:
        return
    terminalreporter.section("largest differences from the processor's float32, relative to its largest magnitude")
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
    terminalreporter.write_line(f"{where}, torch {torch.__version__}, {time.monotonic() - _started:.0f} seconds")
    for key, (share, difference, part, number) in sorted(_worst.items()):
        beyond = "" if share <= 1 else "  <- BEYOND"
        terminalreporter.write_line(
            f"{key:<48} {difference:7.1e}, {share:7.2%} of what is allowed; {number} ({part}){beyond}"
        )
    for line in sorted(_told):
        terminalreporter.write_line(line)
