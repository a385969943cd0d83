"""Training corpus: text to learn from, as rows to train on, passages to measure by, and what the router sees of it.

Knows files of text, token ids and a base; nothing of modules and how they are trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, replace
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
from growlm.errors import ConfigError, DataError, StoreError, setting
from growlm.modules import ModuleSet
from growlm.modules.scoring import paired_losses
from growlm.progress import phase
from growlm.store import MIN_SAMPLE_BYTES, WEIGHTS, Store, StoredModule
from growlm.training.admission import Comparison
from growlm.training.config import ModuleTrainConfig
from growlm.training.questions import short_questions

_BEGINNING = 128  # tokens of a passage that are scored, at most: many short ones are surer than few long ones
_DECIDING_SHARE = 20  # tokens of the run for each one by which it is decided whether a module is admitted,
_DECIDING_TOKENS = 2048  # and so many at the least
_VALIDATION_SHARE = 30  # tokens of the run for each one on which its steps are scored
_VALIDATION_LEAST, _VALIDATION_MOST = 512, 16_384
_HELDOUT_SAMPLES, _HELDOUT_QUESTIONS = 32, 16  # from which the router learns how far prompts of a text may be from it

Files = dict[str, dict[str, Tensor]]  # tensors that lie beside a module's weights, by file
Shown = tuple[list[list[int]], list[list[int]]]  # token ids of texts that the router is fitted to, and of held-out ones


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
        text = text_data.read(data, **config.reading)
        replayed = None if config.replay is None else text_data.read([config.replay], **config.reading)
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

    def lines(self, tokens: Tokens, tokenizer: Any, config: ModuleTrainConfig) -> list[str]:
        """For people, before it is learned: how much was read, how much of that is trained on, and a piece as the base
        will see it."""
        ended = config.max_tokens is not None and tokens.packed.num_tokens >= config.max_tokens
        return [tokens.told, *text_data.summary(tokens.packed, tokenizer, setting("tokens") if ended else None)]

    def tokenized(self, tokenizer: Any, config: ModuleTrainConfig) -> Tokens:
        """
        Raises:
            DataError: too little text, or a conversation that the base's chat template cannot write.
            ConfigError: conversations, and the base has no chat template.
        """
        train, rest = text_data.split(self.text, seed=config.seed)
        length, limits = config.sequence_length, {"max_tokens": config.max_tokens}
        packed = text_data.pack(train, tokenizer, length, loss=config.loss, **limits)
        replay = None
        if self.replayed is not None:
            replay = text_data.pack(self.replayed.documents, tokenizer, length, loss=config.loss, **limits)
        passages = text_data.passages(rest, tokenizer, length, loss=config.loss)
        if not passages:
            found = "has no answer within a row" if any(d.turns for d in rest) else "is shorter than two tokens"
            raise DataError(f"{self.where}: held-out text {found}; give more text")
        validation, heldout = halves(passages)
        begin, prompts = text_data.start_tokens(tokenizer), None
        if any(d.turns for d in self.text.documents):
            shown = [prompts_of(documents, tokenizer, length) for documents in (train, rest)]
            prompts = (shown[0], shown[1]) if all(shown) else None  # of those who say nothing
        questions: Shown = ([], [])
        if prompts is None:
            questions = (
                questions_about(train, config.router_samples, tokenizer, length, config.seed),
                questions_about(rest, _HELDOUT_QUESTIONS, tokenizer, length, config.seed),
            )
        told = text_data.split_told(self.text.documents, train, rest)
        return Tokens(train, packed, replay, validation, heldout, begin, told, questions, prompts)


@dataclass(frozen=True)
class Tokens:
    """A body in token ids.

    Attributes:
        documents: all that are not held out, of which `packed` are those that are trained on.
        validation: passages that are not trained on, by which rate and step are chosen.
        heldout: others, which choose nothing: by them it is decided whether a module is admitted.
        begin: what every prompt begins with.
        told: how many documents were read and held out, for people.
        questions: about what is trained on, and about held-out text, which the router is shown besides passages; none
            of conversations, in which users ask.
        prompts: of conversations, what the router is shown: those that are trained on, and held-out ones.
    """

    documents: Sequence[text_data.Document]
    packed: text_data.PackedTokens
    replay: text_data.PackedTokens | None
    validation: list[text_data.Passage]
    heldout: list[text_data.Passage]
    begin: list[int]
    told: str
    questions: Shown
    prompts: Shown | None = None

    def require_rows(self, base: Base, where: str, tokenizer: Any) -> None:
        """
        Raises:
            DataError: a token that the base has no row for.
        """
        for packed in (self.packed, self.replay):
            if packed is not None:
                base.require_rows(packed.tokens, where, tokenizer)
        others = [p.tokens for p in (*self.validation, *self.heldout)]
        for prompts in self.prompts or ():
            others += prompts
        base.require_rows([*self.begin, *itertools.chain(*others)], where, tokenizer)

    def deciding(self, config: ModuleTrainConfig) -> list[text_data.Passage]:
        """Held-out passages by which it is decided whether a module is admitted."""
        trained_on = config.rows_wanted(len(self.packed)) * config.sequence_length
        return beginnings(self.heldout, deciding_tokens(trained_on), config.seed)

    def compare(self, before: ModuleSet, after: ModuleSet, config: ModuleTrainConfig) -> Comparison:
        """Two module sets of one base on held-out passages, each to at most so many tokens as suit a run of this size;
        what they have in common is computed once."""
        passages = self.deciding(config)
        with phase("scoring held-out text by both", len(passages), "passages"):
            found = [p.tokens for p in passages]
            losses = paired_losses([before, after], found, counted=text_data.masks_of(passages))
        scored = torch.tensor([p.num_scored for p in passages])
        return Comparison.of(losses[0], losses[1], scored, [p.document_index for p in passages])

    def evidence(self, base: Base, config: ModuleTrainConfig, keep: int, layer: int | None) -> Files:
        """What the router needs to know of this text, and `keep` bytes of it.

        Args:
            base: as it is served.
            layer: after which the router of the store reads its states.
        """
        seen = router.gather_evidence(base, *self.shown(base, config), layer=layer, seed=config.seed)
        files = router.files_of(seen)
        if samples := self.samples(config, keep):
            files[router.SAMPLES] = samples
        return files

    def shown(self, base: Base, config: ModuleTrainConfig) -> Shown:
        """What the router is shown: passages and questions, and held-out ones."""
        heldout = [p.tokens for p in (*self.heldout, *self.validation)] if self.prompts is None else self.prompts[1]
        # A question has words that the text has not, and maybe no token that the base has a row for.
        asked, asked_of_heldout = ([q for q in some if q and max(q) < base.vocab_size] for some in self.questions)
        return (
            [*self._shown(config.router_samples, config.seed), *asked],
            [*heldout[:_HELDOUT_SAMPLES], *asked_of_heldout],
        )

    def samples(self, config: ModuleTrainConfig, keep: int) -> dict[str, Tensor]:
        """`keep` bytes of this text, packed; empty where so few that nothing fits."""
        if not keep:
            return {}
        # Two bytes a token at the least. Where tokens take four, half of these rows fit: any half, since they are in no
        # order.
        rows = -(-keep // (2 * config.sequence_length))
        samples = router.pack_samples(self._shown(rows, config.seed), keep)
        return samples if len(samples["tokens"]) else {}

    def _shown(self, count: int, seed: int) -> list[list[int]]:
        """What stands for this text's prompts, in random order."""
        if self.prompts is None:
            return sample_passages(self.packed, count, seed, self.begin)
        prompts = self.prompts[0]
        return [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))[:count]]


def prompts_of(documents: Sequence[text_data.Document], tokenizer: Any, length: int) -> list[list[int]]:
    """Documents as a user would prompt, since it is prompts that are routed: of a conversation what the user says, of
    other text passages of it."""
    begin = text_data.start_tokens(tokenizer)
    asked = [text_data.asked(d.turns) for d in documents if d.turns]
    found = [[*begin, *ids][:length] for ids in text_data.encode_texts(tokenizer, [a for a in asked if a.strip()])]
    texts = [d for d in documents if not d.turns]
    return [*found, *(p.tokens for p in text_data.passages(texts, tokenizer, length))]


def questions_about(
    documents: Sequence[text_data.Document], count: int, tokenizer: Any, length: int, seed: int
) -> list[list[int]]:
    """So many short questions of documents' own words, as token ids, each beginning as prompts do."""
    asked = short_questions([d.text for d in documents if not d.turns], count, seed)
    begin = text_data.start_tokens(tokenizer)
    return [[*begin, *ids][:length] for ids in text_data.encode_texts(tokenizer, asked)]


def halves(passages: Sequence[text_data.Passage]) -> tuple[list[text_data.Passage], list[text_data.Passage]]:
    """Held-out passages in two parts, no document in both; of a single document's, passages or at the least tokens."""
    documents = sorted({p.document_index for p in passages})
    if len(documents) > 1:
        first = set(documents[::2])
        return (
            [p for p in passages if p.document_index in first],
            [p for p in passages if p.document_index not in first],
        )
    if len(passages) > 1:
        return list(passages[::2]), list(passages[1::2])
    (one,) = passages
    if len(one.tokens) < 4 or one.counted is not None:  # a conversation is no conversation in halves
        return [one], [one]
    middle = len(one.tokens) // 2
    return [replace(one, tokens=one.tokens[:middle])], [replace(one, tokens=one.tokens[middle:])]


def beginnings(passages: Sequence[text_data.Passage], num_tokens: int, seed: int) -> list[text_data.Passage]:
    """So many tokens at least, where there are so many: beginnings of passages, in an order drawn with `seed`. A
    conversation whose beginning has no answer is read as far as it is there."""
    chosen: list[text_data.Passage] = []
    for index in np.random.default_rng(seed).permutation(len(passages)):
        if num_tokens <= 0:
            break
        cut = passages[index].beginning(_BEGINNING)
        chosen.append(cut if cut.num_scored else passages[index])
        num_tokens -= len(chosen[-1].tokens)
    return chosen


def deciding_tokens(trained_on: int) -> int:
    """By how many held-out tokens it is decided, at the least, whether a run of so many is any good."""
    return max(trained_on // _DECIDING_SHARE, _DECIDING_TOKENS)


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
        raise ConfigError(
            f"{setting('sequence_length')} is {config.sequence_length}; {base.where} has {made_for} positions"
        )


# Evidence of several bodies in one module


def evidence_beside(stored: StoredModule) -> Files:
    """All that lies beside a stored module's weights, but for the text that it recalls.

    Raises:
        IntegrityError: a file is not what its manifest says.
    """
    with stored.reading():
        return {
            file: read_tensors(stored.folder / file, sha256=digest)
            for file, digest in stored.manifest.files.items()
            if file != WEIGHTS and file not in stored.text_files
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
