"""Cutting a text into pieces where a reader would: at a paragraph, a line or a space."""

from __future__ import annotations

from collections.abc import Iterator

from growlm.errors import ConfigError


def cut_text(text: str, chars: int) -> Iterator[str]:
    """Pieces of about `chars` (half to 1.5 times) that join to `text`, cut at a paragraph, line or space."""
    start = 0
    while len(text) - start > 1.5 * chars:
        end = start + chars
        for mark in ("\n\n", "\n", " "):
            found = text.rfind(mark, start + chars // 2, end)
            if found >= 0:
                end = found + len(mark)
                break
        yield text[start:end]
        start = end
    yield text[start:]


def require(name: str, value: float, minimum: float, maximum: float = float("inf")) -> None:
    if not minimum <= value <= maximum:
        wanted = f"at least {minimum}" if maximum == float("inf") else f"{minimum} to {maximum}"
        raise ConfigError(f"{name} is {value}, expected {wanted}")
