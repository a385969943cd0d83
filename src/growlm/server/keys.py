"""Keys: who may ask."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from growlm.errors import ConfigError


class Keys:
    """Those that are let in; none at all lets everybody in. Kept as digests, and compared in constant time."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, path: Path | None) -> Keys:
        """A file with a key a line; what begins with # is a remark.

        Raises:
            ConfigError: the file cannot be read, or has no key.
        """
        if path is None:
            return cls()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
            raise ConfigError(f"{path}: {reason}; give a file with a key a line") from None
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise ConfigError(f"{path}: has no key; write one a line, or leave the option out to let everybody in")
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def lets_in(self, key: str | None) -> bool:
        if not self._digests:
            return True
        digest = sha256((key or "").encode()).digest()
        # Of all of them, whichever it is.
        return sum(hmac.compare_digest(digest, own) for own in self._digests) > 0
