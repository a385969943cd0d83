"""Training corpus: text to learn from, as rows to train on, passages to measure by, and what the router sees of it.

Knows files of text, token ids and a base; nothing of modules and how they are trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from growlm import data as text_data
from growlm import router
from growlm.base import Base
from growlm.disk.tensors import read_tensors
from growlm.errors import ConfigError, DataError, StoreError
from growlm.modules import ModuleSet
from growlm.modules.scoring import paired_losses
from growlm.progress import phase
from growlm.store import MIN_SAMPLE_BYTES, WEIGHTS, Store, StoredModule
from growlm.training.admission import Comparison
from growlm.training.config import ModuleTrainConfig

_BEGINNING = 256  # tokens of a passage that are scored, at most
_DECIDING_SHARE = 20  # tokens of the run for each one by which it is decided whether a module is admitted,
_DECIDING_TOKENS = 2048  # and so many at the least
_VALIDATION_SHARE = 30  # tokens of the run for each one on which its steps are scored
_VALIDATION_LEAST, _VALIDATION_MOST = 512, 16_384
_HELDOUT_SAMPLES = 32  # passages from which the router learns how far its own text may be

Files = dict[str, dict[str, Tensor]]  # tensors that lie beside a module's weights, by file


@dataclass(frozen=True)
class TrainingCorpus:
    """Documents, as they were read, and those of other text that is read along.

    Attributes:
        where: for messages.
    """

    where: str
    text: text_data.TextData
    replayed: text_data.TextData | None

    @classmethod
    def read(cls, data: Sequence[str | Path], config: ModuleTrainConfig) -> TrainingCorpus:
        """
        Raises:
            DataError: data that is missing or malformed.
        """
        text = text_data.read(data, text_key=config.text_key, separator=config.separator)
        replayed = None
        if config.replay is not None:
            replayed = text_data.read([config.replay], text_key=config.text_key, separator=config.separator)
        return cls(", ".join(map(str, data)), text, replayed)

    @cached_property
    def digest(self) -> str:
        """A run may only be resumed on text of the same one."""
        return self.text.digest if self.replayed is None else f"{self.text.digest} {self.replayed.digest}"

    def record(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {
            "sources": [asdict(s) for s in self.text.sources],
            "replayed": [asdict(s) for s in self.replayed.sources] if self.replayed is not None else [],
            "documents": len(self.text.documents),
        }

    def tokenized(self, tokenizer: Any, config: ModuleTrainConfig) -> Tokens:
        """
        Raises:
            DataError: too little text.
        """
        train, rest = text_data.split(self.text, seed=config.seed)
        packed = text_data.pack(train, tokenizer, config.sequence_length, max_tokens=config.max_tokens)
        replay = None
        if self.replayed is not None:
            documents = self.replayed.documents
            replay = text_data.pack(documents, tokenizer, config.sequence_length, max_tokens=config.max_tokens)
        passages = text_data.passages(rest, tokenizer, config.sequence_length)
        if not passages:
            raise DataError(f"{self.where}: held-out text is shorter than two tokens; give more text")
        validation, heldout = halves(passages)
        return Tokens(
            packed,
            replay,
            [p.tokens for p in validation],
            [p.tokens for p in heldout],
            [p.document_index for p in heldout],
            text_data.start_tokens(tokenizer),
        )


@dataclass(frozen=True)
class Tokens:
    """A body in token ids.

    Attributes:
        validation: passages that are not trained on, by which rate and step are chosen.
        heldout: others, which choose nothing: by them it is decided whether a module is admitted.
        begin: what every prompt begins with.
    """

    packed: text_data.PackedTokens
    replay: text_data.PackedTokens | None
    validation: list[list[int]]
    heldout: list[list[int]]
    documents: list[int]  # of which each of `heldout` is
    begin: list[int]

    def require_rows(self, base: Base, where: str, tokenizer: Any) -> None:
        """
        Raises:
            DataError: a token that the base has no row for.
        """
        for packed in (self.packed, self.replay):
            if packed is not None:
                base.require_rows(packed.tokens, where, tokenizer)
        base.require_rows([*self.begin, *itertools.chain(*self.validation, *self.heldout)], where, tokenizer)

    def compare(self, before: ModuleSet, after: ModuleSet, config: ModuleTrainConfig) -> Comparison:
        """Two module sets of one base on held-out passages, each to at most so many tokens as suit a run of this size;
        what they have in common is computed once."""
        trained_on = config.rows_wanted(len(self.packed)) * config.sequence_length
        chosen = drawn(self.heldout, max(trained_on // _DECIDING_SHARE, _DECIDING_TOKENS), config.seed)
        passages = [self.heldout[i][:_BEGINNING] for i in chosen]
        with phase("scoring held-out text by both", len(passages), "passages"):
            losses = paired_losses([before, after], passages)
        tokens = torch.tensor([len(p) - 1 for p in passages])
        return Comparison.of(losses[0], losses[1], tokens, [self.documents[i] for i in chosen])

    def evidence(self, base: Base, config: ModuleTrainConfig, keep: int) -> Files:
        """What the router needs to know of this text, and `keep` bytes of it.

        Args:
            base: as it is served.
        """
        crops = sample_passages(self.packed, config.router_samples, config.seed, self.begin)
        heldout = [*self.heldout, *self.validation][:_HELDOUT_SAMPLES]
        seen = router.gather_evidence(base, crops, heldout, seed=config.seed)
        files = router.files_of(seen)
        if keep:
            # Two bytes a token at the least. Where tokens take four, half of these rows fit: any half, since they are
            # in no order.
            rows = -(-keep // (2 * config.sequence_length))
            samples = router.pack_samples(sample_passages(self.packed, rows, config.seed, self.begin), keep)
            if len(samples["tokens"]):  # so few bytes that nothing fits keep nothing
                files[router.SAMPLES] = samples
        return files


def halves(passages: Sequence[text_data.Passage]) -> tuple[list[text_data.Passage], list[text_data.Passage]]:
    """Held-out passages in two parts, no document in both; of a single document's, passages or at the least tokens."""
    documents = sorted({p.document_index for p in passages})
    if len(documents) > 1:
        first = set(documents[::2])
        return [p for p in passages if p.document_index in first], [
            p for p in passages if p.document_index not in first
        ]
    if len(passages) > 1:
        return list(passages[::2]), list(passages[1::2])
    tokens, document = passages[0].tokens, passages[0].document_index
    if len(tokens) < 4:
        return list(passages), list(passages)
    middle = len(tokens) // 2
    return [text_data.Passage(tokens[:middle], document)], [text_data.Passage(tokens[middle:], document)]


def drawn(passages: Sequence[Sequence[int]], num_tokens: int, seed: int) -> list[int]:
    """Which passages are scored, in an order drawn with `seed`: so many that their beginnings hold `num_tokens`, where
    there are so many."""
    chosen: list[int] = []
    for index in np.random.default_rng(seed).permutation(len(passages)).tolist():
        if num_tokens <= 0:
            break
        chosen.append(index)
        num_tokens -= len(passages[index][:_BEGINNING])
    return chosen


def beginnings(passages: Sequence[Sequence[int]], num_tokens: int, seed: int) -> list[list[int]]:
    """Beginnings of passages as `drawn` chooses them."""
    return [list(passages[i][:_BEGINNING]) for i in drawn(passages, num_tokens, seed)]


def validation_tokens(trained_on: int) -> int:
    """On how many tokens a run of so many can be scored several times without taking much longer."""
    return min(max(trained_on // _VALIDATION_SHARE, _VALIDATION_LEAST), _VALIDATION_MOST)


def sample_passages(packed: text_data.PackedTokens, count: int, seed: int, begin: Sequence[int]) -> list[list[int]]:
    """Rows of the text in random order, less their last token, each beginning with `begin` as prompts do and no longer
    for it."""
    rows = np.random.default_rng(seed).permutation(len(packed))[:count]
    chosen = packed.tokens[rows][:, :-1].tolist()
    return [[*begin, *row][: len(row)] if row[: len(begin)] != [*begin] else row for row in chosen]


def bytes_to_keep(store: Store, name: str, config: ModuleTrainConfig) -> int:
    """How much of a text stays in the store.

    Raises:
        StoreError: nothing, and the store's router is trained on it.
    """
    keep = int(config.keep_samples) if config.keep_samples is not None else store.manifest.keep_samples
    if store.manifest.router == "transformer" and keep < MIN_SAMPLE_BYTES:
        raise StoreError(
            f"{store.path}: its transformer router is trained on kept text; without any, {name!r} could never be "
            f"chosen: leave out --keep-samples {keep}, or change to the gaussian router (growlm router --kind gaussian)"
        )
    return keep


def require_positions(base: Base, config: ModuleTrainConfig) -> None:
    """
    Raises:
        ConfigError: rows are longer than what the base was made for.
    """
    made_for = base.max_positions or base.trained_positions
    if made_for is not None and config.sequence_length > made_for:
        raise ConfigError(f"sequence_length is {config.sequence_length}; {base.where} has {made_for} positions")


# Evidence of several bodies in one module


def evidence_beside(stored: StoredModule) -> Files:
    """All that lies beside a stored module's weights.

    Raises:
        IntegrityError: a file is not what its manifest says.
    """
    return {
        file: read_tensors(stored.folder / file, sha256=digest)
        for file, digest in stored.manifest.files.items()
        if file != WEIGHTS
    }


def joined(old: Files, new: Files) -> tuple[Files, dict[str, int]]:
    """Evidence of what a module knew and of a body that it knows besides, the new after the old; and how much of it is
    new, with which `parted` gives the old back. What the old lacks is left out of both: of half a module's text the
    router is told nothing."""
    files, counts = dict(old), {"vectors": 0, "heldout": 0, "samples": 0}
    if router.VECTORS in old:
        pairs = [_vectors(files) for files in (old, new)]
        files |= router.files_of({key: torch.cat([p[key] for p in pairs]) for key in pairs[0]})
        counts |= {key: len(tensor) for key, tensor in pairs[1].items()}
    if router.SAMPLES in old and router.SAMPLES in new:
        passages = [router.unpack_samples(files[router.SAMPLES]) for files in (old, new)]
        files[router.SAMPLES] = _packed([*passages[0], *passages[1]])
        counts["samples"] = len(passages[1])
    return files, counts


def parted(files: Files, counts: Mapping[str, int]) -> Files:
    """Evidence without the last of it, as many as `joined` counted.

    Raises:
        KeyError: a count is missing.
        ValueError: a count of all there is or more.
    """
    left = dict(files)
    if router.VECTORS in files:
        kept = {key: t[: _left(t, counts[key])] for key, t in _vectors(files).items()}
        left |= router.files_of(kept)
    if router.SAMPLES in files and counts["samples"]:
        passages = router.unpack_samples(files[router.SAMPLES])
        left[router.SAMPLES] = _packed(passages[: _left(passages, counts["samples"])])
    return left


def _left(rows: Sized, count: int) -> int:
    if not 0 <= count < len(rows):
        raise ValueError(f"{count} of {len(rows)}")
    return len(rows) - count


def _vectors(files: Files) -> dict[str, Tensor]:
    return {"vectors": files[router.VECTORS]["vectors"], "heldout": files[router.EVIDENCE]["heldout"]}


def _packed(passages: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    return router.pack_samples(passages, 8 * sum(len(p) + 1 for p in passages))  # bytes in which all of it has room
