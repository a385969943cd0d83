"""Sizing: how much a demo does in so many seconds, from what a machine takes for a token. Pure: it measures nothing.

All sizes with one preset lie on a path from the least to the most that is worth doing, and a number from 0 to 1 is a
place on it. To plan is to find the last place whose time fits; so is to do less than planned when time runs short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

DOMAINS = ("python", "cpp", "maths")
SEQUENCE_LENGTH = 256

_PLANNED = 0.85  # of the time there is: machines are shared, and slow down
_PLACES = 1000  # on a path
_DIGITS = 2  # that sizes are rounded to

# Of the texts: bytes of a document, and bytes of a token by size of the vocabulary, which is trained on English.
_DOCUMENT_BYTES = {"english": 1700, "python": 3300, "cpp": 2800, "maths": 3100}
_TOKEN_BYTES = {2048: {"english": 3.2, "python": 1.9, "cpp": 1.9, "maths": 1.9}}
_TOKEN_BYTES[4096] = {"english": 3.7, "python": 2.4, "cpp": 2.5, "maths": 2.3}
_SPARE = 1.2  # text for every token of training: some is held out, and no token need be read twice
# Files are taken whole: of less text they are so few that what is held out is another matter.
_LEAST_BYTES = {"english": 1_000_000, "python": 2_000_000, "cpp": 2_000_000, "maths": 2_000_000}
_MOST_BYTES = {"english": 12_000_000, "python": 4_000_000, "cpp": 4_000_000, "maths": 4_000_000}

# What a byte costs beside one of English, whose sentences are searched for; and finding the files, in such bytes.
_BYTE_COST = {"english": 1.0, "python": 0.25, "cpp": 0.25, "maths": 0.25}
_FINDING = 400_000

# What the verbs read beside their training steps, in passages of SEQUENCE_LENGTH.
_PASSAGES_LEARN = 64 + 64  # what the base knows least; how far the domain's own text may be from its middle
_PASSAGES_GENERAL = 512  # the most general text that the router is shown, once: what pretraining held out
_ROUTED = 1.25  # modules that a document is scored under: its own, and at times one that the router took it for


@dataclass(frozen=True)
class DemoSize:
    """How much the demo does.

    Attributes:
        num_layers: of a module.
        text_bytes: by name of the text.
        learn_tokens: by domain, in the order of learning.
        router_samples: passages of each domain that the router is shown.
        max_documents: of each held-out text, how many are scored.
    """

    preset: str
    vocab_size: int
    num_layers: int
    pretrain_batch: int
    learn_batch: int
    text_bytes: dict[str, int]
    pretrain_tokens: int
    learn_tokens: dict[str, int]
    router_samples: int
    max_documents: int

    @property
    def stages(self) -> tuple[str, ...]:
        """In their order."""
        return ("text", "pretrain", *map(learning, self.learn_tokens), "evaluate", "generate", "report")


def learning(domain: str) -> str:
    """The stage in which a domain is learned."""
    return f"learn-{domain}"


@dataclass(frozen=True)
class Speeds:
    """Seconds that a machine takes, with a base of one preset.

    Attributes:
        byte: of English, collected; or read by the tokenizer that is made of it.
        pretrain, learn: a token of a training step.
        read: a token that the base reads.
        score: a token that base and module read.
        fixed: by stage, what it takes besides; the learning of every domain is the stage "learn".
    """

    byte: float
    pretrain: float
    learn: float
    read: float
    score: float
    fixed: dict[str, float]


def _rounded(number: float) -> int:
    """Down to a number that is easy to read."""
    unit = 10 ** max(math.floor(math.log10(number) + 1e-9) + 1 - _DIGITS, 0)
    return math.floor(number / unit + 1e-9) * unit


@dataclass(frozen=True)
class _Place:
    """What changes along a path."""

    pretrain_tokens: int
    learn_tokens: int
    router_samples: int
    max_documents: int


@dataclass(frozen=True)
class _Path:
    """Sizes with one preset.

    Attributes:
        least: what a demo can do at all.
        most: more would read the text again, or change nothing.
        enough: the learned tokens from which on every module halves its domain's perplexity, by what was measured.
    """

    vocab_size: int
    num_layers: int
    pretrain_batch: int
    learn_batch: int
    least: _Place
    most: _Place
    enough: int

    def at(self, preset: str, place: float) -> DemoSize:
        def between(field: str) -> int:
            low, high = getattr(self.least, field), getattr(self.most, field)
            return _rounded(low * (high / low) ** place)

        learn, pretrain = between("learn_tokens"), between("pretrain_tokens")
        tokens = {"english": pretrain, **dict.fromkeys(DOMAINS, learn)}
        wanted = {n: int(_SPARE * t * _TOKEN_BYTES[self.vocab_size][n]) for n, t in tokens.items()}
        size = {n: min(max(wanted[n], _LEAST_BYTES[n]), _MOST_BYTES[n]) for n in tokens}
        return DemoSize(
            preset,
            self.vocab_size,
            self.num_layers,
            self.pretrain_batch,
            self.learn_batch,
            size,
            pretrain,
            dict.fromkeys(DOMAINS, learn),
            between("router_samples"),
            between("max_documents"),
        )


# The larger preset is taken where its least fits, which is where the smaller one runs out of text. How the sizes were
# found, and where every module halves its domain's perplexity, is in docs/log.md.
_PATHS = {
    "small": _Path(4096, 4, 8, 4, _Place(800_000, 200_000, 256, 30), _Place(2_600_000, 900_000, 512, 60), 12_000),
    "tiny": _Path(2048, 2, 2, 2, _Place(20_000, 4_000, 32, 6), _Place(2_800_000, 1_000_000, 512, 60), 12_000),
}
_SMALLEST = "tiny"
_DEARER = {"tiny": 1.0, "small": 4.5}  # what a token costs, beside the smallest preset: a guess, before it is measured

FAST = replace(
    _PATHS[_SMALLEST].at(_SMALLEST, 0),
    pretrain_tokens=120_000,
    learn_tokens=dict.fromkeys(DOMAINS, 40_000),
    router_samples=192,
    max_documents=16,
)
# Enough to see what things take.
REHEARSAL = replace(
    FAST,
    text_bytes={"english": 300_000, "python": 300_000},
    pretrain_tokens=8_192,
    learn_tokens={"python": 8_192},
    router_samples=8,
    max_documents=4,
)


def rehearsal(preset: str) -> DemoSize:
    """A demo in small, by which the speeds of a machine are measured."""
    path = _PATHS[preset]
    return replace(
        REHEARSAL,
        preset=preset,
        vocab_size=path.vocab_size,
        num_layers=path.num_layers,
        pretrain_batch=path.pretrain_batch,
        learn_batch=path.learn_batch,
    )


def presets() -> list[str]:
    """In the order in which they are measured."""
    return sorted(_PATHS, key=lambda preset: _DEARER[preset])


def worth_measuring(preset: str, smallest: Speeds, seconds: float) -> bool:
    """Whether a preset's least might fit, by what the smallest takes."""
    cost = _DEARER[preset]
    guess = replace(
        smallest,
        pretrain=cost * smallest.pretrain,
        learn=cost * smallest.learn,
        read=cost * smallest.read,
        score=cost * smallest.score,
    )
    return total(_PATHS[preset].at(preset, 0), guess) <= _PLANNED * seconds


def seconds_of(size: DemoSize, speeds: Speeds) -> dict[str, float]:
    """What each stage takes."""
    documents = {name: size.max_documents * _document_tokens(size, name) for name in ("english", *size.learn_tokens)}
    held = {name: _held_out(size, name) for name in size.text_bytes}
    routed = len(documents) * size.max_documents * SEQUENCE_LENGTH
    seconds = {
        "text": text_cost(size) * speeds.byte,
        "pretrain": size.pretrain_tokens * speeds.pretrain
        + 2 * held["english"] * speeds.read
        + size.text_bytes["english"] * speeds.byte,
    }
    for at, (name, tokens) in enumerate(size.learn_tokens.items()):
        general = min(held["english"] / SEQUENCE_LENGTH, _PASSAGES_GENERAL) if at == 0 else 0
        passages = size.router_samples + _PASSAGES_LEARN + general
        seconds[learning(name)] = (
            tokens * speeds.learn
            + passages * SEQUENCE_LENGTH * speeds.read
            + held[name] * (speeds.read + speeds.score)
            + _BYTE_COST[name] * size.text_bytes[name] * speeds.byte
        )
    of_domains = sum(tokens for name, tokens in documents.items() if name != "english")
    seconds["evaluate"] = (sum(documents.values()) + routed) * speeds.read + _ROUTED * of_domains * speeds.score
    return {stage: seconds.get(stage, 0.0) + speeds.fixed.get(_kind(stage), 0.0) for stage in size.stages}


def text_cost(size: DemoSize) -> float:
    """Bytes of English that are collected in the same time."""
    return sum(_FINDING + _BYTE_COST[name] * size for name, size in size.text_bytes.items())


def total(size: DemoSize, speeds: Speeds) -> float:
    """Seconds of all stages."""
    return sum(seconds_of(size, speeds).values())


def with_fixed(speeds: Speeds, size: DemoSize, took: Mapping[str, float]) -> Speeds:
    """Speeds of which `fixed` is what stages of that size took longer than the tokens in them."""
    expected = seconds_of(size, replace(speeds, fixed={}))
    return replace(speeds, fixed={_kind(s): max(took[s] - expected[s], 0.0) for s in size.stages})


def plan(speeds: Mapping[str, Speeds], seconds: float) -> DemoSize | None:
    """The most that fits, of the presets that were measured; None if not even the least does."""
    for preset in _PATHS:
        if preset in speeds:
            size = _most(preset, partial(_fits, speeds[preset], _PLANNED * seconds))
            if size is not None:
                return size
    return None


def _fits(speeds: Speeds, seconds: float, size: DemoSize) -> bool:
    return total(size, speeds) <= seconds


def less(size: DemoSize, speeds: Speeds, stages: Collection[str], seconds: float, pace: float) -> DemoSize:
    """A size cut down so that the stages that have not begun fit the time that is left; the least if nothing does.

    Args:
        stages: that have not begun.
        seconds: left.
        pace: what stages take, for a second that the speeds say.
    """

    def cut(to: DemoSize) -> DemoSize:
        return _smaller(size, to, stages)

    def fits(to: DemoSize) -> bool:
        each = seconds_of(cut(to), speeds)
        return pace * sum(each[stage] for stage in stages) <= seconds

    return cut(_most(size.preset, fits) or _PATHS[size.preset].at(size.preset, 0))


def seconds_for_least(speeds: Mapping[str, Speeds]) -> float:
    """The time in which a demo can be done at all."""
    return _time_of(speeds, lambda preset: _PATHS[preset].at(preset, 0))


def seconds_for_half(speeds: Mapping[str, Speeds], times: float = 1.0) -> float:
    """The time from which on every module should halve its domain's perplexity.

    Args:
        times: as many tokens as should be enough, by what was measured since.
    """
    return _time_of(speeds, lambda preset: _first(preset, times * _PATHS[preset].enough))


def enough(size: DemoSize) -> bool:
    """Whether every module should halve its domain's perplexity."""
    return min(size.learn_tokens.values()) >= _PATHS[size.preset].enough


def tokens_missed(size: DemoSize, gains: Mapping[str, float]) -> float:
    """How many times as many tokens as should be enough would halve every domain's perplexity.

    Args:
        gains: by domain, by how many nats a token its module is better than the base. What a module gains grows slower
            than its tokens, but nothing is known of how: that it grows like the tokens is the best guess of the least.
    """
    wanted = 1.0
    for name, gain in gains.items():
        if gain < math.log(2):
            share = size.learn_tokens[name] / _PATHS[size.preset].enough
            wanted = max(wanted, share * min(math.log(2) / max(gain, 1e-9), 16.0))
    return wanted


def _document_tokens(size: DemoSize, name: str) -> float:
    return _DOCUMENT_BYTES[name] / _TOKEN_BYTES[size.vocab_size][name]


def _held_out(size: DemoSize, name: str) -> float:
    """Tokens on which training measures itself, as `data.split` chooses them."""
    documents = min(max(0.02 * size.text_bytes[name] / _DOCUMENT_BYTES[name], 16), 256 if name == "english" else 128)
    return documents * _document_tokens(size, name)


def _kind(stage: str) -> str:
    return stage.partition("-")[0]


def _most(preset: str, fits: Callable[[DemoSize], bool]) -> DemoSize | None:
    """The last size on a path that fits: those before it fit as well."""
    path, low, high = _PATHS[preset], 0, _PLACES
    if not fits(path.at(preset, 0)):
        return None
    while low < high:
        middle = -(-(low + high) // 2)
        low, high = (middle, high) if fits(path.at(preset, middle / _PLACES)) else (low, middle - 1)
    return path.at(preset, low / _PLACES)


def _first(preset: str, tokens: float) -> DemoSize:
    """The first size on a path that learns so many tokens; the last if none does."""
    sizes = (_PATHS[preset].at(preset, place / _PLACES) for place in range(_PLACES + 1))
    return next((s for s in sizes if min(s.learn_tokens.values()) >= tokens), _PATHS[preset].at(preset, 1))


def _time_of(speeds: Mapping[str, Speeds], size_with: Callable[[str], DemoSize]) -> float:
    return min(total(size_with(preset), speeds[preset]) for preset in speeds) / _PLANNED


def _smaller(size: DemoSize, to: DemoSize, stages: Collection[str]) -> DemoSize:
    """`size`, cut down to `to` where it is about stages that have not begun."""
    learned = {n: min(t, to.learn_tokens[n]) if learning(n) in stages else t for n, t in size.learn_tokens.items()}
    changes: dict[str, Any] = {"learn_tokens": learned}
    if "text" in stages:
        changes["text_bytes"] = {n: min(b, to.text_bytes[n]) for n, b in size.text_bytes.items()}
    if "pretrain" in stages:
        changes["pretrain_tokens"] = min(size.pretrain_tokens, to.pretrain_tokens)
    if all(learning(name) in stages for name in learned):  # the router compares what it was shown of each
        changes["router_samples"] = min(size.router_samples, to.router_samples)
    if "evaluate" in stages:
        changes["max_documents"] = min(size.max_documents, to.max_documents)
    return replace(size, **changes)
