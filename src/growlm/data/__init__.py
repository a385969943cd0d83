"""Data: files -> documents -> packed token batches.

Reads text, source code, JSONL, Parquet and Hugging Face datasets into documents in a stable order, holds some
of them out, and packs token ids into windows. A tokenizer is passed in; nothing here knows of models,
modules, devices or training.
"""

from growlm.data.packing import PackedTokens, Passage, batches, pack, passages, schedule, start_tokens
from growlm.data.reading import SUFFIXES, Document, Source, TextData, read
from growlm.data.splitting import split

__all__ = [
    "SUFFIXES", "Document", "PackedTokens", "Passage", "Source", "TextData", "batches", "pack", "passages", "read",
    "schedule", "split", "start_tokens",
]  # fmt: skip
