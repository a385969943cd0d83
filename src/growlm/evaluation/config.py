"""Settings of `growlm eval`: the only home of their defaults. The command's flags derive from this class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from growlm.errors import ConfigError, setting
from growlm.units import parse_count


@dataclass(frozen=True)
class EvalConfig:
    """Settings of `growlm eval`.

    Attributes:
        sequence_length: longer documents are scored in pieces of so many tokens.
        max_documents: of each domain, the first so many; 0 for all.
        tokens: of each domain at most, e.g. 50k; by default all of its documents.
        route_tokens: how much of a document's beginning the router sees.
        router: kind of router, gaussian, product-key or transformer; by default the store's own.
        experts_on: where the tables of peer modules are: memory, or disk: only the rows that a text reads are read.
        row_cache: of each such module on the disk, memory for rows read last; 64MB by default.
        device: where to compute: cpu, cuda, cuda:N, mps, or auto: a CUDA GPU where there is one, else the processor.
        second_look: keep a chosen module only where it reads the end of what the router saw better than the base.
        matrix: replay the order of learning: what the router knew after each domain, and what that cost the others.
        text_key: key of the text in JSON, column in tables.
        separator: cuts text files into documents, e.g. a blank line; by default a file is one document.
        format: of records: text, or as of growlm learn messages, sharegpt, alpaca or prompt; auto tells by their keys.
            Of conversations the answers are scored, and what the user says is routed.
    """

    sequence_length: int = 512
    max_documents: int = 200
    tokens: int | str | None = None
    route_tokens: int = 256
    router: str | None = None
    experts_on: str = "memory"
    row_cache: str | None = None
    device: str = "auto"
    second_look: bool = False
    matrix: bool = True
    text_key: str = "text"
    separator: str | None = None
    format: str = "auto"

    def __post_init__(self) -> None:
        if self.tokens is not None:
            object.__setattr__(self, "tokens", parse_count(self.tokens, "tokens"))
            if int(self.tokens) < 2:
                raise ConfigError(f"{setting('tokens')} is {self.tokens}; it must be at least 2")
        for name, minimum in (("sequence_length", 2), ("max_documents", 0), ("route_tokens", 1)):
            if getattr(self, name) < minimum:
                raise ConfigError(f"{setting(name)} is {getattr(self, name)}; it must be at least {minimum}")

    @property
    def reading(self) -> dict[str, Any]:
        """How data is read: the settings of `growlm.data.read`."""
        return {"text_key": self.text_key, "separator": self.separator, "format": self.format}
