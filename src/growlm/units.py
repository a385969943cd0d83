"""Units: sizes and counts as people write them, and back."""

from __future__ import annotations

import math
import re

from growlm.errors import ConfigError, setting

_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZES |= {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_size(size: int | str, name: str | None = None) -> int:
    """Bytes of a size such as 2GB, 2G, 512MiB or 1000000.

    Args:
        name: of the setting, for messages.

    Raises:
        ConfigError: not a size.
    """
    return _parse(size, _SIZES, "size", "2GB or 512MiB", name)


def parse_count(count: int | str, name: str | None = None) -> int:
    """A count such as 4M, 250k or 1000.

    Args:
        name: of the setting, for messages.

    Raises:
        ConfigError: not a count.
    """
    return _parse(count, _COUNTS, "count", "4M or 250k", name)


def _parse(value: int | str, units: dict[str, int], what: str, example: str, name: str | None) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    unit = match[2].upper() if match else None
    number = math.inf if match is None or unit not in units else float(match[1]) * units[unit]
    if not number < 2**63:
        told = f"{value!r} is not" if name is None else f"{setting(name)} is {value!r}, not"
        raise ConfigError(f"{told} a {what}; write it like {example}")
    return int(number)


def counted(number: int, what: str) -> str:
    """So many of what has a regular plural: 1 module, 2 modules."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def format_size(num_bytes: float) -> str:
    """Bytes for people: 1.4 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def format_count(count: float) -> str:
    """A count for people: 8.2 M."""
    for unit in ("", " k", " M", " B"):
        if abs(count) < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f} T"


def format_seconds(seconds: float) -> str:
    """A time for people: 12 s, 3 min 20 s, 1 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
