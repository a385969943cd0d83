"""Tensor files: tensors are read back exactly or refused, whether they are copied or mapped."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from growlm.disk.files import sha256_file
from growlm.disk.tensors import map_tensors, outline, read_tensors, write_tensors
from growlm.errors import IntegrityError, StoreError

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (2, 3, 5)]

many = settings(max_examples=200, deadline=None)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return (torch.randn(shape, generator=generator) * 50).to(dtype)


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    def content(t: torch.Tensor) -> tuple:
        return t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).tolist()

    return {k: content(v) for k, v in left.items()} == {k: content(v) for k, v in right.items()}


@pytest.fixture(scope="module", params=["read", "mapped", "some mapped"])
def reader(request):
    """Both readers, the second with all tensors on the disk or one."""
    if request.param == "read":
        return read_tensors
    chosen = (lambda name: True) if request.param == "mapped" else (lambda name: name == "weight")
    return lambda path, **options: map_tensors(path, chosen, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_read_tensors_equals_safetensors(tmp_path, dtype):
    tensors = {f"t{i}": random_tensor(dtype, shape) for i, shape in enumerate(SHAPES)}
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
    found = read_tensors(tmp_path / "t.safetensors")
    assert same_bits(found, load_file(tmp_path / "t.safetensors"))
    assert same_bits(found, tensors)


def test_every_reader_equals_safetensors_for_all_dtypes_in_one_file(reader, tmp_path):
    tensors = {f"{dtype}{shape}": random_tensor(dtype, shape) for dtype in DTYPES for shape in SHAPES}
    save_file(tensors, tmp_path / "t.safetensors")
    assert same_bits(reader(tmp_path / "t.safetensors"), load_file(tmp_path / "t.safetensors"))


def test_write_tensors_is_read_back_by_both_readers(tmp_path):
    path = tmp_path / "t.safetensors"
    tensors = {
        "strided": torch.arange(12.0).reshape(3, 4).T,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.arange(5).bfloat16(),
    }
    digest = write_tensors(path, tensors)
    assert digest == sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert same_bits(read_tensors(path, sha256=digest), {k: v.detach() for k, v in tensors.items()})
    assert same_bits(load_file(path), read_tensors(path))


def test_tensors_share_one_buffer(tmp_path):
    save_file({"a": torch.ones(4), "b": torch.zeros(3, dtype=torch.int16)}, tmp_path / "t.safetensors")
    found = read_tensors(tmp_path / "t.safetensors")
    assert len({t.untyped_storage().data_ptr() for t in found.values()}) == 1


def test_a_file_that_two_threads_read(tmp_path):
    tensors = {"big": torch.randint(0, 256, (17_000_003,), dtype=torch.uint8), "small": torch.arange(3)}
    path = tmp_path / "t.safetensors"
    digest = write_tensors(path, tensors)
    assert same_bits(read_tensors(path, sha256=digest), tensors)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(IntegrityError, match="malformed"):
        read_tensors(path)


SAMPLE = {"weight": torch.arange(12.0).reshape(3, 4), "ids": torch.arange(5), "half": torch.ones(3).bfloat16()}


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("sample") / "t.safetensors"
    save_file(SAMPLE, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def scratch_file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "t.safetensors"


@many
@given(share=st.floats(0, 1, exclude_max=True))
@example(0.0)
def test_a_truncated_file_is_refused(reader, sample, scratch_file, share):
    scratch_file.write_bytes(sample[: int(share * len(sample))])
    with pytest.raises(IntegrityError, match=r"t\.safetensors"):
        reader(scratch_file)


@many
@given(share=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_flipped_byte_is_refused_by_its_hash(reader, sample, scratch_file, share, mask):
    changed = bytearray(sample)
    changed[int(share * len(sample))] ^= mask
    scratch_file.write_bytes(changed)
    with pytest.raises(IntegrityError, match=r"t\.safetensors"):
        reader(scratch_file, sha256=hashlib.sha256(sample).hexdigest())


@many
@given(share=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_flipped_byte_of_unknown_hash_never_crashes(reader, sample, scratch_file, share, mask):
    header_size = 8 + int.from_bytes(sample[:8], "little")
    changed = bytearray(sample)
    changed[int(share * header_size)] ^= mask
    scratch_file.write_bytes(changed)
    try:
        found = reader(scratch_file)
    except IntegrityError:
        return
    assert all(isinstance(t, torch.Tensor) for t in found.values())


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the format's own writer does
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


numbers = st.integers(-8, 40) | st.sampled_from([2**31, 2**63, -(2**70), 10**30]) | st.floats(allow_nan=False)
leaves = st.none() | st.booleans() | numbers | st.text(max_size=4) | st.sampled_from(["F32", "I16", "U8", "F8_E4M3"])
entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64", "BF16", "I16", "U8", "BOOL", "f32", ""]) | leaves,
        "shape": st.lists(numbers, max_size=3) | leaves,
        "data_offsets": st.lists(numbers, min_size=1, max_size=3) | leaves,
    }
)
anything = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


@pytest.mark.slow
@many
@given(header=st.dictionaries(st.text(max_size=3), entry | anything, max_size=3) | anything)
@example(header=b"[" * 100_000)
@example(header=b"\xff\xfe")
@example(header={"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}})
@example(header={"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}})
def test_no_header_crashes(reader, scratch_file, header):
    write_raw(scratch_file, header, bytes(24))
    try:
        found = reader(scratch_file)
    except IntegrityError:
        return
    assert all(isinstance(t, torch.Tensor) and t.nbytes <= 24 for t in found.values())


@pytest.mark.parametrize(
    ("dtype", "shape", "offsets"),
    [
        ("F32", [2], [0, 1_000_000]),
        ("F32", [6], [0, 1_000_000]),
        ("F32", [1], [-4, 24]),
        ("F32", [0], [28, 28]),
        ("F32", [2], [24, 32]),
        ("F32", [2], [20, 28]),
        ("F32", [1], [-4, 0]),
        ("F32", [1], [8, 4]),
        ("F32", [3], [0, 8]),
        ("F32", [2, 2], [0, 8]),
        ("F64", [1], [0, 4]),
        ("F99", [2], [0, 8]),
        ("F32", [2], [0]),
        ("F32", [2], [0, 4, 8]),
        ("F32", [-1], [0, 8]),
    ],
)
def test_a_header_that_contradicts_its_file_is_refused(reader, tmp_path, dtype, shape, offsets):
    header = {"good": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}
    path = write_raw(tmp_path / "t.safetensors", header, bytes(24))
    assert set(reader(path)) == {"good"}
    header["bad"] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    with pytest.raises(IntegrityError, match="malformed"):
        reader(write_raw(path, header, bytes(24)))


@pytest.mark.parametrize("size", [0, 2**63, 2**64 - 1, 10**9])
def test_a_header_size_beyond_the_file_is_refused_before_it_is_believed(reader, tmp_path, size):
    path = tmp_path / "t.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + b"{}" + bytes(100))
    with pytest.raises(IntegrityError, match="not a safetensors file"):
        reader(path)


def test_a_missing_file_and_a_folder_are_refused(reader, tmp_path):
    with pytest.raises(IntegrityError, match="missing"):
        reader(tmp_path / "t.safetensors")
    with pytest.raises(StoreError, match=str(tmp_path)):
        reader(tmp_path)


def test_a_pickle_is_refused_and_not_run(reader, tmp_path):
    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(Canary(), tmp_path / "t.safetensors")
    with pytest.raises(IntegrityError):
        reader(tmp_path / "t.safetensors")
    assert not (tmp_path / "ran").exists()


def test_an_outline_has_names_shapes_and_dtypes(tmp_path):
    save_file(SAMPLE, tmp_path / "t.safetensors")
    found = outline(tmp_path / "t.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in SAMPLE.items()}
    assert all(t.is_meta for t in found.values())
    os.truncate(tmp_path / "t.safetensors", (tmp_path / "t.safetensors").stat().st_size - 1)
    with pytest.raises(IntegrityError, match="outside"):
        outline(tmp_path / "t.safetensors")


def test_what_is_mapped_is_not_copied_and_what_is_not_is(tmp_path):
    write_tensors(tmp_path / "t.safetensors", SAMPLE)
    found = map_tensors(tmp_path / "t.safetensors", lambda name: name == "weight")
    size = (tmp_path / "t.safetensors").stat().st_size
    assert size - 100 < found["weight"].untyped_storage().nbytes() <= size
    assert found["ids"].untyped_storage().nbytes() == 5 * 8
