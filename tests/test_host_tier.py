"""Host tier: what was brought once is not read again, in so many bytes, and comes as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from growlm.disk.tensors import read_tensors, write_tensors
from growlm.engine import host_tier
from growlm.engine.host_tier import HostTier

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(host_tier, "copied_beside", lambda buffer, pieces, device: (buffer.clone(), None))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)


def file_of(folder: Path, seed: int, rows: int = 4) -> Path:
    """Tensors of several dtypes and sizes, of which one has no numbers."""
    random = torch.Generator().manual_seed(seed)
    tensors = {
        "a": torch.randn(rows, 3, generator=random),
        "b": torch.randn(5, generator=random).bfloat16(),
        "c": torch.randint(0, 9, (2, 2), generator=random),
        "empty": torch.empty(0, 3),
    }
    path = folder / f"{seed}-{rows}.safetensors"
    write_tensors(path, tensors)
    return path


def bring(tier: HostTier, digest: str, read: Read) -> dict[str, Tensor]:
    return tier.bring(digest, read, lambda name: None)[0]


class Read:
    def __init__(self, path: Path) -> None:
        self.path, self.times = path, 0

    def __call__(self) -> dict[str, Tensor]:
        self.times += 1
        return read_tensors(self.path)


def test_what_is_brought_is_what_the_file_has_and_a_copy_each_time(tmp_path):
    tier, read = HostTier(CPU, 10_000), Read(file_of(tmp_path, 0))
    wanted = read_tensors(read.path)
    for _ in range(3):
        found = bring(tier, "0", read)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
        found["a"].zero_()  # nobody else has it
    assert read.times == 1
    assert 0 < tier.num_bytes <= 10_000


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(0, 3))
def test_the_last_ones_that_fit_are_kept(tmp_path_factory, asked, room):
    folder = tmp_path_factory.mktemp("files")
    reads = [Read(file_of(folder, seed)) for seed in range(6)]
    size = HostTier(CPU, 1 << 20)
    bring(size, "x", reads[0])
    tier, kept = HostTier(CPU, room * size.num_bytes), []
    reads[0].times = 0
    for number in asked:
        before = reads[number].times
        found = bring(tier, str(number), reads[number])
        assert torch.equal(found["a"], read_tensors(reads[number].path)["a"])
        assert reads[number].times == before + (number not in kept)
        kept = ([k for k in kept if k != number] + [number])[-room:] if room else []
        assert tier.num_bytes == len(kept) * size.num_bytes


def test_what_is_larger_than_the_tier_goes_through_and_drives_nothing_out(tmp_path):
    small, large = Read(file_of(tmp_path, 0)), Read(file_of(tmp_path, 1, rows=4000))
    tier = HostTier(CPU, 1000)
    bring(tier, "small", small)
    assert len(bring(tier, "large", large)["a"]) == 4000
    bring(tier, "small", small)
    assert (small.times, large.times) == (1, 1)


def test_a_system_that_gives_no_page_locked_memory_costs_speed_alone(tmp_path, monkeypatch):
    def refused(_: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refused)
    tier, read = HostTier(CPU, 10_000), Read(file_of(tmp_path, 0))
    assert torch.equal(bring(tier, "0", read)["a"], read_tensors(read.path)["a"])
    assert tier.num_bytes == 0


@pytest.mark.parametrize("ids", [1, 2, 3])
def test_every_tensor_begins_where_kernels_of_a_gpu_want_it(tmp_path, ids):
    """Ids of an odd number of rows come first in a file, and what follows begins in the middle of 16 bytes."""
    wanted = {"weight": torch.randn(3, 8).bfloat16(), "ids": torch.arange(ids), "on": torch.tensor(True)}
    write_tensors(tmp_path / "file.safetensors", wanted | {"none": torch.empty(0, 2)})
    read = Read(tmp_path / "file.safetensors")
    for tier in (HostTier(CPU, 10_000), HostTier(CPU, 0)):
        found = bring(tier, "0", read)
        assert found.keys() == wanted.keys() | {"none"}
        for name, tensor in wanted.items():
            assert found[name].data_ptr() % 16 == 0
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
