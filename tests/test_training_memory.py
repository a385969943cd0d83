"""Memory of a training run, seen through the page faults that it is there to avoid. In processes of their own: what
earlier tests left free in the heap would hide them."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from growlm.training.memory import kept_pages

BEGIN = """
import resource
from pathlib import Path
import torch
from growlm.training.memory import kept_pages

def faults(rounds=20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(16 << 20)  # 64 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

usual = faults()
assert usual > 0
"""

glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library: nothing to change")


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@glibc
def test_freed_pages_are_kept_while_training_and_given_back_after():
    run("""
with kept_pages():
    faults()  # the heap finds its size
    assert faults() < usual / 10
    inside = resident()
assert resident() < inside - (60 << 20)
""")


@pytest.mark.slow
@glibc
def test_the_last_block_that_ends_sets_things_back():
    run("""
with kept_pages():
    with kept_pages():
        faults()
    assert faults() < usual / 10
assert faults() > usual / 30  # given back: at least one of twenty comes fresh again
""")


def test_nested_and_after_an_error():
    for _ in range(2):
        try:
            with kept_pages(), kept_pages():
                raise ValueError
        except ValueError:
            pass
    assert float(torch.ones(1 << 22).sum()) == 1 << 22
