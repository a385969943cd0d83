"""Biographies of people who do not exist: facts drawn from a seed, written down in many phrasings.

Every fact is drawn uniformly and independently from a set of known size, so that the bits in a biography can be counted
(bioS of Allen-Zhu and Li, "Physics of Language Models: Part 3.3, Knowledge Capacity Scaling Laws", arXiv:2404.05405).
Knows text and numbers; nothing of tokens or models.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean

import numpy as np

_FIRST = [c + v for c, v in product("bdfgklmnrt", "aeio")]  # the two syllables of an invented word
_SECOND = [c + v + d for (c, d), v in product([("b", "n"), ("d", "r"), ("g", "s"), ("k", "l"), ("l", "m"), ("m", "t"),
                                               ("n", "d"), ("r", "k"), ("s", "n"), ("v", "r")], "aeiu")]  # fmt: skip
_NUM_WORDS = len(_FIRST) * len(_SECOND)


def _words(start: int, count: int) -> tuple[str, ...]:
    """Invented words of five letters, none twice. The stride, prime to their number, mixes the syllables."""
    assert start + count <= _NUM_WORDS
    places = ((start + i) * 611 % _NUM_WORDS for i in range(count))
    return tuple((_FIRST[p // len(_SECOND)] + _SECOND[p % len(_SECOND)]).capitalize() for p in places)


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


FIRST_NAMES, LAST_NAMES = _words(0, 128), _words(128, 320)
PLACES, EMPLOYERS = _words(448, 200), _words(648, 256)
FIELDS = _listed(
    "accounting acoustics aesthetics agronomy algebra anatomy archaeology architecture astronomy ballet biology botany "
    "carpentry cartography ceramics chemistry commerce dance dentistry design drama economics education engineering "
    "entomology ethics film finance forestry genetics geography geology geometry glaciology grammar heraldry history "
    "hydrology journalism law linguistics literature logic management marketing medicine metallurgy meteorology music "
    "navigation nursing optics painting pharmacy philosophy photography physics poetry politics psychology sculpture "
    "sociology statistics surgery"
)
MONTHS = _listed("January February March April May June July August September October November December")
DAYS, YEARS = tuple(f"{d:02}" for d in range(1, 29)), tuple(str(y) for y in range(1850, 2050))

# A value is one of each part's values, joined by spaces. No value of an attribute begins another: a model that spreads
# its probability evenly over the values then has no more than 1 / num_values for each.
ATTRIBUTES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "birth date": (DAYS, MONTHS, YEARS),
    "birth place": (PLACES,),
    "university": (PLACES,),
    "field": (FIELDS,),
    "employer": (EMPLOYERS,),
}
NUM_NAMES = len(FIRST_NAMES) * len(LAST_NAMES)

# The name comes before the value: what is before the value asks for it.
PHRASINGS: Mapping[str, tuple[str, ...]] = {
    "birth date": (
        "{name} was born on {value}.",
        "The birth date of {name} is {value}.",
        "{name} has a birthday on {value}.",
        "The life of {name} began on {value}.",
    ),
    "birth place": (
        "{name} was born in {value}.",
        "The birth place of {name} is {value}.",
        "{name} comes from {value}.",
        "The home town of {name} was {value}.",
    ),
    "university": (
        "{name} went to the university of {value}.",
        "The university of {name} is that of {value}.",
        "{name} has a degree from {value}.",
        "The teachers of {name} were in {value}.",
    ),
    "field": (
        "{name} studied {value}.",
        "The field of {name} is {value}.",
        "{name} is an expert in {value}.",
        "The degree of {name} is in {value}.",
    ),
    "employer": (
        "{name} works for {value}.",
        "The employer of {name} is {value}.",
        "{name} has a job at {value}.",
        "The work of {name} is paid by {value}.",
    ),
}


@dataclass(frozen=True)
class Person:
    """A name that nobody else has, and one value for every attribute."""

    name: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Sentence:
    """One fact in words; `text[start:end]` is the value, and all before it is the prompt that asks for it."""

    text: str
    attribute: str
    start: int
    end: int

    @property
    def value(self) -> str:
        return self.text[self.start : self.end]


def num_values(attribute: str) -> int:
    """How many values an attribute can have."""
    return math.prod(map(len, ATTRIBUTES[attribute]))


def num_bits(attribute: str) -> float:
    """Bits of one value: log2 of how many are possible, for values are drawn uniformly."""
    return math.log2(num_values(attribute))


def bits_per_person() -> float:
    """Bits of all values of one person, the name aside: 45.3."""
    return sum(map(num_bits, ATTRIBUTES))


def bits_known(losses: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Bits known of each attribute of a group of people: number of people x max(0, log2 S - mean loss in bits), S the
    number of values that the attribute can have (Allen-Zhu and Li's learned bits of the values).

    The floor is on the mean of an attribute in a group: a model that has never met a group, or answers it wrongly,
    knows nothing of it, and not less. Left out are the bits of the names (the paper's N log2(N0 / N): prompts give the
    name away here), of the phrasings, and of the lists of values, which the base knows.

    Args:
        losses: of every person, by attribute, summed over the value's tokens, in bits.
    """
    return {a: len(some) * max(0.0, num_bits(a) - fmean(some)) for a, some in losses.items()}


def people(count: int, seed: int, *, skip: int = 0) -> list[Person]:
    """People `skip` to `skip + count` of a seed's `NUM_NAMES` people, no two of the same name.

    Facts are uniform and independent of each other and of the name.

    Raises:
        ValueError: more people than there are names.
    """
    if min(count, skip) < 0 or skip + count > NUM_NAMES:
        raise ValueError(f"people {skip:,} to {skip + count:,} of a seed; there are {NUM_NAMES:,} names")
    order = np.random.default_rng([seed, 0]).permutation(NUM_NAMES)[skip : skip + count]
    found = []
    for number in order.tolist():
        draw = np.random.default_rng([seed, 1, number])
        name = f"{FIRST_NAMES[number // len(LAST_NAMES)]} {LAST_NAMES[number % len(LAST_NAMES)]}"
        facts = {
            attribute: " ".join(part[draw.integers(len(part))] for part in parts)
            for attribute, parts in ATTRIBUTES.items()
        }
        found.append(Person(name, facts))
    return found


def sentence(person: Person, attribute: str, phrasing: int) -> Sentence:
    """One fact of a person in one of the phrasings of its attribute."""
    before, after = PHRASINGS[attribute][phrasing].format(name=person.name, value="\0").split("\0")
    value = person.facts[attribute]
    return Sentence(before + value + after, attribute, len(before), len(before) + len(value))


def sentences(person: Person, draw: random.Random) -> list[Sentence]:
    """Every fact of a person once, in an order and in phrasings that are drawn anew."""
    attributes = draw.sample(list(ATTRIBUTES), len(ATTRIBUTES))
    return [sentence(person, a, draw.randrange(len(PHRASINGS[a]))) for a in attributes]


def biography(person: Person, draw: random.Random) -> str:
    """All facts of a person as one text."""
    return " ".join(s.text for s in sentences(person, draw))


def biographies(group: Sequence[Person], texts: int, seed: int) -> list[str]:
    """So many texts of everyone, in a mixed order: every person once, then every person once more."""
    draw = random.Random(seed)
    found = []
    for _ in range(texts):
        found += [biography(person, draw) for person in draw.sample(group, len(group))]
    return found
