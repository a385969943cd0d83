"""Memory of a training run, seen through the page faults that it is there to avoid."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import torch

from growlm.training.memory import kept_pages


def faults(rounds: int = 20) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(16 << 20)  # 64 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_freed_pages_are_kept_while_training_and_given_back_after():
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        return  # another C library: nothing to change
    usual = faults()
    with kept_pages():
        faults()  # the heap finds its size, unless an earlier test left it large
        assert faults() < usual / 10
        inside = resident()
    assert resident() < inside - (60 << 20)


def test_nested_and_after_an_error():
    for _ in range(2):
        try:
            with kept_pages(), kept_pages():
                raise ValueError
        except ValueError:
            pass
    assert float(torch.ones(1 << 22).sum()) == 1 << 22
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        return
    usual = faults()
    with kept_pages():
        with kept_pages():
            pass
        faults()
        assert faults() < usual / 10
