"""Requirements: the releases of other packages that growlm is made for and tested with, and those that are installed.

The ranges are those of `pyproject.toml`, read from what was kept of it when growlm was installed: there is no second
copy. Knows packages by their metadata alone and imports none, so that asking is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Literal

from packaging import requirements, version
from packaging.specifiers import SpecifierSet

from growlm.errors import ConfigError

State = Literal["fine", "newer", "older", "missing"]
_TESTED = "tested"  # the extra that says how far up a package is tested that an installation bounds from below only


@dataclass(frozen=True)
class Requirement:
    """A package, the releases of it that growlm takes, and the one that is installed.

    Attributes:
        range: such as ">=5.17,<5.25"; an upper end is the last release that was tested.
        extra: the extra of growlm that it belongs to, None if growlm cannot do without it.
        installed: None if it is not there, "unknown" if it is and does not tell.
    """

    name: str
    range: str
    extra: str | None
    installed: str | None
    state: State

    @property
    def fails(self) -> bool:
        """Whether growlm cannot be expected to work."""
        return self.extra is None and self.state in ("older", "missing")

    def remark(self) -> str | None:
        """What is wrong and what to do about it, in a line; None where nothing is."""
        hint = f'pip install "{self.name}{self.range}"'
        if self.state == "newer":
            return (
                f"{self.name} {self.installed} is newer than those that growlm is tested with ({self.range}); it is "
                f"tried all the same, and if something fails: {hint}"
            )
        if self.state == "older":
            return f"{self.name} {self.installed} is older than growlm works with ({self.range}): {hint}"
        if self.state == "missing" and self.extra is None:
            return f"{self.name} is not installed: {hint}"
        return None


def all_requirements(*extras: str) -> list[Requirement]:
    """What growlm always needs, then what these extras need; [] where growlm is run without having been installed."""
    try:
        lines = metadata.requires("growlm") or []
    except metadata.PackageNotFoundError:
        return []
    asked = [requirements.Requirement(line) for line in lines]
    ranges: dict[str, SpecifierSet] = {}
    homes: dict[str, str | None] = {}
    for extra in ("", *extras, _TESTED):
        for one in asked:
            if one.name == "growlm" or not (one.marker.evaluate({"extra": extra}) if one.marker else extra == ""):
                continue
            ranges[one.name] = ranges.get(one.name, SpecifierSet()) & one.specifier
            homes.setdefault(one.name, extra or None)
    return [_look(name, ranges[name], extra) for name, extra in homes.items()]


def remarks() -> list[str]:
    """A line for each package that growlm cannot do without and whose release is not one that it is made for.

    Raises:
        ConfigError: one is not installed.
    """
    found = all_requirements()
    for one in found:
        if one.state == "missing":
            raise ConfigError(str(one.remark()))
    return [line for one in found if (line := one.remark())]


def require_extra(extra: str, *modules: str) -> None:
    """
    Args:
        modules: of the packages that the extra brings, as they are imported.

    Raises:
        ConfigError: one is not installed.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ConfigError(f'{" and ".join(missing)} not installed: pip install "growlm[{extra}]"')


def range_of(name: str) -> str:
    """The releases of a package that growlm is tested with, e.g. ">=5.17,<5.25"."""
    return next((one.range for one in all_requirements() if one.name == name), "of its pyproject.toml")


def _look(name: str, allowed: SpecifierSet, extra: str | None) -> Requirement:
    state: State = "fine"
    installed: str | None = "unknown"
    try:
        installed = metadata.version(name)
        release = version.parse(installed)
        outside = [s.operator for s in allowed if not s.contains(release, prereleases=True)]
        if outside:
            state = "older" if any(operator.startswith(">") for operator in outside) else "newer"
    except version.InvalidVersion:
        pass
    except metadata.PackageNotFoundError:
        if find_spec(name) is None:  # else another packager's, without metadata
            installed, state = None, "missing"
    # The lower end first, as people write it.
    return Requirement(name, ",".join(sorted(map(str, allowed), reverse=True)), extra, installed, state)
