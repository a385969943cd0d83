"""Sizing with a published base: how much a demo does in so many seconds, from what it takes for a token of that base.

Pure: it measures nothing. All sizes lie on a path from the least to the most, as those of small bases do (`sizing.py`).
Full finetuning reads the same text as the modules: where there is no time for both, it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from growlm.demo.sizing import learning
from growlm.training.config import FITTED

DOMAINS = ("models", "operators", "maths")
FIRST = ("base", "text")  # stages of which the machine is not measured: they come before
TEXT_BYTES = {"english": 1_000_000, "models": 2_000_000, "operators": 600_000, "maths": 2_000_000}
SEQUENCE_LENGTH = 512  # the default of `growlm learn` and `growlm eval`

_PLANNED = 0.85  # of the time there is: machines are shared, and slow down
_PLACES = 200  # on the path
_UNIT = 2048  # tokens that sizes are rounded to

# Tokens that the verbs read beside their training steps.
_DOCUMENT_TOKENS = 1400
_EVIDENCE = (96 + 32) * 64 + 96 * 12  # of a domain, for the router: beginnings of passages, and questions
_GENERAL = 52_000  # of general text, for the router, before the first domain: English, the sample and its frames
_VALIDATIONS = 6  # times that a run is scored
_LOADS = 1.5  # times the base is loaded or hashed in a verb,
_WRITES = 4  # and as often as that takes, that it is written, with its optimiser, and read again
_SAMPLES = 1000  # that are generated one by one, which takes longer
_TRIALS = 1.15  # of a learning step: the trials of rates


@dataclass(frozen=True)
class PublishedSize:
    """How much the demo does.

    Attributes:
        learn_tokens: by domain, in the order of learning, and of finetuning.
        finetune: whether the base is finetuned on the same text.
        max_documents: of each held-out text, how many are scored.
        text_bytes: by name of the text.
    """

    learn_tokens: dict[str, int]
    finetune: bool
    max_documents: int
    text_bytes: dict[str, int]

    @property
    def stages(self) -> tuple[str, ...]:
        """In their order: what costs the most and is needed the least comes last."""
        finetuned = map(finetuning, self.learn_tokens) if self.finetune else ()
        return (*FIRST, *map(learning, self.learn_tokens), "evaluate", "generate", *finetuned, "report")


def finetuning(domain: str) -> str:
    """The stage in which the base is finetuned on a domain."""
    return f"finetune-{domain}"


@dataclass(frozen=True)
class PublishedSpeeds:
    """Seconds that a machine takes with one base.

    Attributes:
        load: of the base.
        read: a token that the base reads for the router.
        score: a token of which the base tells the loss.
        learn: a token of a learning step.
        finetune: a token of a finetuning step; None where there is no memory for it.
    """

    load: float
    read: float
    score: float
    learn: float
    finetune: float | None


@dataclass(frozen=True)
class _Place:
    tokens: int
    documents: int


# Of half as many tokens a run has too few steps for `learn` to try learning rates, and the one that it computes instead
# is too high for published bases.
_LEAST, _MOST = _Place(10_240, 4), _Place(131_072, 40)


def size_of(place: float, *, finetune: bool) -> PublishedSize:
    """A place on the path, from 0 to 1."""
    tokens = _LEAST.tokens * (_MOST.tokens / _LEAST.tokens) ** place
    documents = _LEAST.documents * (_MOST.documents / _LEAST.documents) ** place
    learned = round(tokens / _UNIT) * _UNIT
    return PublishedSize(dict.fromkeys(DOMAINS, learned), finetune, round(documents), dict(TEXT_BYTES))


FAST = size_of(0, finetune=False)


def seconds_of(size: PublishedSize, speeds: PublishedSpeeds) -> dict[str, float]:
    """What each stage takes; those before the machine is measured are not among them."""
    load, read, score = _LOADS * speeds.load, speeds.read, speeds.score
    text = size.max_documents * _DOCUMENT_TOKENS * score
    order = list(size.learn_tokens)
    seconds = {}
    for name, tokens in size.learn_tokens.items():
        shown = _EVIDENCE + (_GENERAL if name == order[0] else 0)
        scored = _VALIDATIONS * _validation(tokens) + 2 * max(tokens // 20, 2048) + tokens // 20 + FITTED
        seconds[learning(name)] = load + _TRIALS * tokens * speeds.learn + shown * read + scored * score
    # All texts under the base, of which English is the shortest, and domains under their modules, and where the router
    # errs under others.
    seconds["evaluate"] = load + (0.5 + 2.25 * len(order)) * text
    seconds["generate"] = load + _SAMPLES * read
    if size.finetune:
        step = math.inf if speeds.finetune is None else speeds.finetune
        for name, tokens in size.learn_tokens.items():
            scored = _VALIDATIONS * _validation(tokens) + 2 * max(tokens // 20, 2048)
            texts = len(order) + 1 if name == order[-1] else 1
            seconds[finetuning(name)] = _WRITES * load + tokens * step + scored * score + texts * text
    seconds["report"] = 5.0
    return seconds


def total(size: PublishedSize, speeds: PublishedSpeeds) -> float:
    return sum(seconds_of(size, speeds).values())


def plan(speeds: PublishedSpeeds, seconds: float) -> PublishedSize | None:
    """The most that fits, with finetuning where that leaves enough to learn; None if not even the least does."""
    return _most(lambda size: total(size, speeds) <= _PLANNED * seconds)


def less(
    size: PublishedSize, speeds: PublishedSpeeds, stages: Collection[str], seconds: float, pace: float
) -> PublishedSize:
    """A size cut down so that the stages that have not begun fit the time that is left; the least if nothing does."""

    def cut(to: PublishedSize) -> PublishedSize:
        learned = {n: min(t, to.learn_tokens[n]) if learning(n) in stages else t for n, t in size.learn_tokens.items()}
        changes: dict[str, Any] = {"learn_tokens": learned, "finetune": size.finetune and to.finetune}
        if "evaluate" in stages:
            changes["max_documents"] = min(size.max_documents, to.max_documents)
        return replace(size, **changes)

    def fits(to: PublishedSize) -> bool:
        each = seconds_of(cut(to), speeds)
        return pace * sum(taken for stage, taken in each.items() if stage in stages) <= seconds

    if fits(size):
        return size
    return cut(_most(fits) or size_of(0, finetune=False))


def seconds_for_least(speeds: PublishedSpeeds) -> float:
    return total(size_of(0, finetune=False), speeds) / _PLANNED


def seconds_for_finetuning(speeds: PublishedSpeeds) -> float:
    """From which on the base is finetuned as well; infinite where there is no memory for it."""
    return total(size_of(0, finetune=True), speeds) / _PLANNED


def _validation(tokens: int) -> int:
    return min(max(tokens // 30, 512), 16_384)


def _path(*, finetune: bool) -> Iterator[PublishedSize]:
    return (size_of(place / _PLACES, finetune=finetune) for place in range(_PLACES + 1))


def _most(fits: Callable[[PublishedSize], bool]) -> PublishedSize | None:
    for finetune in (True, False):
        fitting = [size for size in _path(finetune=finetune) if fits(size)]
        if fitting:
            return fitting[-1]
    return None
