"""Encoding: text -> token ids. What a text spells like a special token is letters.

No text can so end itself, or forge a turn. A tokenizer is passed in; it keeps between calls how it treats special
tokens, so that one thread at a time may ask it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

from growlm.data.cutting import cut_text

LONG, _PIECE = 1 << 16, 1 << 14  # characters of a text that is cut, and of a piece
_LOCK = threading.Lock()


def start_tokens(tokenizer: Any) -> list[int]:
    """The start token, if the tokenizer by itself begins a text with one, as some bases expect; else nothing.

    Prompts begin with it, and so does every text that a module, the router or an evaluation is shown.
    """
    start = tokenizer.bos_token_id
    if start is None:
        return []
    with _LOCK:
        return [start] if tokenizer("")["input_ids"][:1] == [start] else []


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, without `start_tokens`; special tokens that are spelled out are ordinary characters."""
    return _encoded(tokenizer, texts, split_special_tokens=True)["input_ids"] if texts else []


def encode_pieces(tokenizer: Any, text: str) -> Iterator[list[int]]:
    """Token ids of a text in parts, as `encode_texts` has them but for the places where a long one is cut, so that who
    reads them may stop, and others may ask the tokenizer in between."""
    for piece in cut_text(text, _PIECE) if len(text) > LONG else [text]:
        yield from encode_texts(tokenizer, [piece])


def encode_marked(tokenizer: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Token ids of texts in which special tokens are themselves, and which characters (start, end) each stands for."""
    found = _encoded(tokenizer, texts, split_special_tokens=False, return_offsets_mapping=True)
    return found["input_ids"], found["offset_mapping"]


def _encoded(tokenizer: Any, texts: Sequence[str], **how: Any) -> Any:
    with _LOCK:
        return tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a text may well be longer than the model's context
            **how,
        )
