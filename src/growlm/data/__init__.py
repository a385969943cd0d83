"""Data: files -> documents or conversations -> packed token batches, with a mask of what is learned.

Reads text, source code, records (JSON, CSV, Parquet, ...), pages and Hugging Face datasets into documents in a stable
order, holds some of them out, and packs token ids into rows. A tokenizer is passed in; nothing here knows of models,
modules, devices or training.
"""

from growlm.data.conversations import FORMATS, Turn, asked
from growlm.data.encoding import LONG, encode_marked, encode_pieces, encode_texts, start_tokens
from growlm.data.extracting import require_reader
from growlm.data.packing import LOSSES, PackedTokens, Passage, batches, masks_of, pack, passages, schedule, whole
from growlm.data.reading import SUFFIXES, Document, Source, TextData, look_at, read
from growlm.data.showing import Sample, Shown, marked, show, split_told, summary
from growlm.data.splitting import split
from growlm.data.template import NO_TOOLS, Template, Tools, has_template

__all__ = [
    "FORMATS", "LONG", "LOSSES", "NO_TOOLS", "SUFFIXES", "Document", "PackedTokens", "Passage", "Sample", "Shown",
    "Source", "Template", "TextData", "Tools", "Turn", "asked", "batches", "encode_marked", "encode_pieces",
    "encode_texts", "has_template", "look_at", "marked", "masks_of", "pack", "passages", "read", "require_reader",
    "schedule", "show", "split", "split_told", "start_tokens", "summary", "whole",
]  # fmt: skip
