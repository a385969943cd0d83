"""GGUF file: the header of a model's single file, as llama.cpp writes it. What it says, and where its tensors lie.

Checks that everything it names is in the file before anyone else reads it. Knows no architecture and no tokenizer.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from growlm.errors import BaseModelError, shortened

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by type
_STRING, _LIST = 8, 9
_ALIGNMENT = 32  # of the tensors, where the file says nothing else
_MOST_DIMENSIONS = 4

_T = TypeVar("_T")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and how."""

    kind: str  # F32, Q4_K, ...
    shape: tuple[int, ...]  # as torch orders it: rows first
    offset: int  # from the beginning of the file
    bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """What the header of a file says.

    Attributes:
        values: by key, as `general.architecture`.
        tensors: by name.
    """

    path: Path
    values: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def get(self, key: str, kind: type[_T], default: _T) -> _T:
        """What stands under a key, the default where nothing does.

        Raises:
            BaseModelError: something of another type.
        """
        found = self.values.get(key, default)
        if kind is float and type(found) is int:
            found = float(found)
        if type(found) is not kind and found is not default:
            raise BaseModelError(f"{self.path}: {key} is {shortened(found)}, expected {_NAMED[kind]}")
        return found

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 on; it must be there where there is no default.

        Raises:
            BaseModelError: it is not there, or something else is.
        """
        found = self.values.get(key, default)
        if type(found) is not int or not 0 < found < 2**31:
            told = "is missing" if found is None else f"is {shortened(found)}, expected a whole number above 0"
            raise BaseModelError(f"{self.path}: {key} {told}; get the file again")
        return found

    def texts(self, key: str) -> list[str]:
        """A list of texts, empty where there is none.

        Raises:
            BaseModelError: something else.
        """
        return self._list(key, (str,), "texts")

    def numbers(self, key: str) -> list[float]:
        """A list of numbers, empty where there is none.

        Raises:
            BaseModelError: something else.
        """
        return self._list(key, (int, float), "numbers")

    def _list(self, key: str, kinds: tuple[type, ...], named: str) -> list[Any]:
        found = self.get(key, list, [])
        if found and type(found[0]) not in kinds:  # all are of one type
            raise BaseModelError(f"{self.path}: {key} is {shortened(found)}, expected a list of {named}")
        return found


_NAMED: dict[type, str] = {str: "a text", int: "a whole number", float: "a number", bool: "yes or no", list: "a list"}


def is_gguf(path: str | Path) -> bool:
    """Whether a path is that of a GGUF file: by what it begins with, and where it cannot be read by its name."""
    path = Path(path).expanduser()
    if path.suffix.lower() == ".gguf":
        return not path.is_dir()
    try:
        with open(path, "rb") as f:
            return f.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def read_gguf(path: Path) -> GGUFFile:
    """The header of a file.

    Raises:
        BaseModelError: it is not there, no GGUF file, of a version that is not known, malformed, or cut short.
    """
    try:
        with open(path, "rb") as f:
            begin = f.read(len(MAGIC))
            if begin != MAGIC:
                raise BaseModelError(f"{path}: not a GGUF file (it begins with {begin!r}); get the file again")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Header(path, content).read()
    except OSError as error:
        raise BaseModelError(f"{path}: cannot be read ({error.strerror or error}); give a GGUF file") from None


class _Header:
    """Reads a header from its beginning to its end."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._at = path, content, len(MAGIC)
        self._kinds: dict[int, tuple[str, int, int]] = {}

    def read(self) -> GGUFFile:
        from gguf import GGML_QUANT_SIZES

        self._kinds = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
        version = self._scalar("I")
        if version not in _VERSIONS:
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            told = "written for machines of the other byte order" if big else f"of version {version}"
            raise BaseModelError(f"{self._path}: a GGUF file {told}, expected version 2 or 3; convert the model anew")
        num_tensors, num_values = self._scalar("Q"), self._scalar("Q")
        values = self._named(num_values, "key", self._value)
        found = self._named(num_tensors, "tensor", self._tensor)
        alignment = values.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self._malformed(f"general.alignment is {shortened(alignment)}")
        start = -(-self._at // alignment) * alignment
        tensors = {}
        for name, (kind, shape, offset, size) in found.items():
            if start + offset + size > len(self._content):
                self._cut(f"the tensor {shortened(name)} ends at byte {start + offset + size:,}")
            tensors[name] = StoredTensor(kind, shape, start + offset, size)
        return GGUFFile(self._path, values, tensors)

    def _named(self, count: int, what: str, read: Callable[[], _T]) -> dict[str, _T]:
        """`count` things, a name before each."""
        found: dict[str, _T] = {}
        for _ in range(count):
            name = self._string()
            if name in found:
                self._malformed(f"the {what} {shortened(name)} stands there twice")
            found[name] = read()
        return found

    def _value(self) -> Any:
        kind = self._scalar("I")
        if kind != _LIST:
            return self._single(kind)
        inner, count = self._scalar("I"), self._scalar("Q")
        if inner in _SCALARS:
            form = _SCALARS[inner]
            width = struct.calcsize("<" + form)
            if count * width > len(self._content):
                self._cut(f"a list has {count:,} entries")
            return list(struct.unpack(f"<{count}{form}", self._take(count * width)))
        if inner != _STRING:
            self._malformed(f"a list of type {inner}")
        return [self._string() for _ in range(count)]

    def _single(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind not in _SCALARS:
            self._malformed(f"a value of type {kind}")
        return self._scalar(_SCALARS[kind])

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Kind, shape, offset among the tensors, and bytes."""
        dimensions = self._scalar("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            self._malformed(f"a tensor of {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions))[::-1]
        number, offset = self._scalar("I"), self._scalar("Q")
        if number not in self._kinds:
            self._malformed(f"a tensor of type {number}, which is not known")
        kind, values, size = self._kinds[number]
        if shape[-1] % values:
            self._malformed(f"a tensor of type {kind} with rows of {shape[-1]} values")
        return kind, shape, offset, math.prod(shape) // values * size

    def _string(self) -> str:
        content = self._take(self._scalar("Q"))
        try:
            return content.decode()
        except UnicodeDecodeError:
            self._malformed(f"the text {shortened(content)} is not UTF-8")

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))
        return value

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._content):
            self._cut("it ends within its header")
        taken = self._content[self._at : end]
        self._at = end
        return taken

    def _cut(self, reason: str) -> NoReturn:
        size = os.path.getsize(self._path)
        raise BaseModelError(f"{self._path}: cut short ({reason}, the file has {size:,} bytes); get the file again")

    def _malformed(self, reason: str) -> NoReturn:
        raise BaseModelError(f"{self._path}: not a readable GGUF file ({reason}); get the file again")
