"""The tests on a GPU, where there is none: they are found, their files can be read, and each says why it is skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_without_a_gpu_every_test_is_found_and_skipped_with_the_reason():
    environment = {k: v for k, v in os.environ.items() if k != "GROWLM_TEST_DEVICE"} | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-vv", "-rs", "-p", "no:cacheprovider", "tests/gpu"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    outcomes = [line for line in run.stdout.splitlines() if line.startswith("tests/gpu/test_gpu_")]
    assert all(" SKIPPED" in line for line in outcomes)
    assert {line.partition("::")[0] for line in outcomes} == {
        str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_gpu_*.py")
    }
    assert len(outcomes) > 300
    assert "no CUDA device here; docs/guides/gpu.md says" in run.stdout
