"""Recall: a domain's text on the disk, and where in it a context occurs."""

from __future__ import annotations

FILE = "text-{:03}.safetensors"  # a part of the text that a module carries, beside its weights


def is_text(file: str) -> bool:
    """Whether a module's file is such a part."""
    return file.startswith("text-") and file.endswith(".safetensors")
