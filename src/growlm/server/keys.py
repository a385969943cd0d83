"""Keys: who may ask, and for which modules."""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path

from growlm.errors import ConfigError
from growlm.store import Store


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        id: tells one key from another, and tells nobody the key; empty where none is asked for.
        patterns: that the names of modules which there are for this caller match; None for all modules.
        admin: whether it may do all that can be done.
    """

    id: str = ""
    patterns: tuple[str, ...] | None = None
    admin: bool = False

    @property
    def limited(self) -> bool:
        return self.patterns is not None

    def sees(self, name: str) -> bool:
        return self.patterns is None or any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def among(self, store: Store) -> frozenset[str] | None:
        """The modules that the router chooses among; None for all."""
        return None if self.patterns is None else frozenset(filter(self.sees, store.modules))

    def salted(self, salt: str) -> str:
        """What a salt becomes, so that nothing that is kept of one limited caller's texts serves another's."""
        return f"{self.id}\0{salt}" if self.limited else salt and f"\0{salt}"


CALLER = "growlm.caller"  # of a request's scope
_EVERYBODY = Caller()
_asking: ContextVar[Caller] = ContextVar("asking", default=_EVERYBODY)


def asks(caller: Caller) -> None:
    """From here on, what is done is for this one."""
    _asking.set(caller)


def caller() -> Caller:
    """Who asks."""
    return _asking.get()


class Keys:
    """Those that are let in; none at all lets everybody in. Kept as digests, and compared in constant time."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """
        Args:
            keys: each with the modules that it is for behind it, as patterns like `law_*`; none for all.
        """
        self._callers: dict[bytes, Caller] = {}
        for line in keys:
            key, *patterns = line.split()
            digest = sha256(key.encode())
            self._callers[digest.digest()] = Caller(digest.hexdigest()[:12], tuple(patterns) or None)

    @classmethod
    def read(cls, path: Path | None, *, admin: bool = False) -> Keys:
        """A file with a key a line; what begins with # is a remark.

        Raises:
            ConfigError: the file cannot be read, has no key, or one that cannot be what it says.
        """
        if path is None:
            return cls()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
            raise ConfigError(f"{path}: {reason}; give a file with a key a line") from None
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        known = Counter(line.split()[0] for line in keys)
        for number, line in enumerate(lines, 1):
            told = None
            if line.lstrip().startswith("#") or not (words := line.split()):
                continue
            if not words[0].isascii():
                told = "a key has signs that no header can carry; take letters and digits"
            elif known[words[0]] > 1:
                told = "this key stands in another line too; write it once, with all its modules"
            elif admin and words[1:]:
                told = "an admin key is for all modules; leave out what stands behind it"
            if told is not None:
                raise ConfigError(f"{path}:{number}: {told}")
        if not keys:
            raise ConfigError(f"{path}: has no key; write one a line, or leave the option out to let everybody in")
        return cls(keys)

    def patterns(self) -> set[str]:
        """Of modules that some keys are for."""
        return {pattern for one in self._callers.values() for pattern in one.patterns or ()}

    def __bool__(self) -> bool:
        return bool(self._callers)

    def caller(self, key: str | None) -> Caller | None:
        """Who has this key; None for nobody."""
        if not self._callers:
            return _EVERYBODY
        digest = sha256((key or "").encode()).digest()
        # All of them are looked at, whichever it is.
        found = [one for own, one in self._callers.items() if hmac.compare_digest(digest, own)]
        return found[0] if found else None
