"""Tokenizer: a base's own, read by transformers and tried once, and the file to blame where that fails."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growlm.base.settings import foreign, read_object
from growlm.errors import BaseModelError

_VOCABULARY = "tokenizer.json"  # which the Rust library reads, and says of what it dislikes in it


def read_tokenizer(folder: Path, files: Sequence[str], settings: Sequence[str]) -> Any:
    """The fast tokenizer of a folder.

    Args:
        files: by which names it may be kept there.
        settings: of these, JSON objects that go with it.

    Raises:
        BaseModelError: it cannot be read, or not used.
    """
    present = [name for name in (*files, *settings) if (folder / name).is_file()]
    for name in settings:
        if name in present:
            read_object(folder / name)
    try:
        return _tried(folder)
    except BaseModelError as error:
        reason = str(error).removeprefix(f"{folder}: ")
        raise BaseModelError(
            f"{_blamed(folder, present)}: the tokenizer cannot be read ({reason}); get the checkpoint again"
        ) from None


def _tried(folder: Path) -> Any:
    """Some settings are only looked at when a text is read."""
    from transformers import AutoTokenizer

    with foreign(folder):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = [*tokenizer("a b")["input_ids"], *tokenizer.encode("a", add_special_tokens=False), len(tokenizer)]
        ids += [tokenizer.eos_token_id or 0, tokenizer.bos_token_id or 0]
        if wrong := [i for i in ids if not isinstance(i, int)]:
            raise TypeError(f"{wrong[0]!r} is no token id")
        tokenizer.decode([0], skip_special_tokens=True)
        template = tokenizer.chat_template
        if template is not None and not isinstance(template, str | dict):
            raise TypeError(f"its chat_template is of type {type(template).__name__}")
        return tokenizer


def _blamed(folder: Path, present: Sequence[str]) -> Path:
    """The file without which the others can be read; the folder where there is none."""
    from tokenizers import Tokenizer

    if _VOCABULARY in present:
        try:
            with foreign(folder):
                Tokenizer.from_file(str(folder / _VOCABULARY))
        except BaseModelError:
            return folder / _VOCABULARY
    for left_out in [name for name in present if name != _VOCABULARY]:
        with tempfile.TemporaryDirectory() as other:
            for name in (*present, "config.json"):
                if name != left_out:
                    (Path(other) / name).symlink_to((folder / name).resolve())
            try:
                _tried(Path(other))
            except BaseModelError:
                continue
            return folder / left_out
    return folder / _VOCABULARY if _VOCABULARY in present else folder
