"""Questions about a text, made of its own words without a model: a router is shown them besides passages of the text,
since users ask and do not paste a page.

They need not make sense. What they share with what users ask is the form, short and a question, and with the text its
words: a router that has seen passages alone takes the form for general text.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

_FORMS = (
    "{}", "{}?", "What is {}?", "What are {}?", "What does {} mean?", "Tell me about {}.", "Who is {}?", "Who was {}?",
    "Who wrote about {}?", "How does {} work?", "How do I {}?", "How many {} are there?", "Why is it {}?",
    "Why did {}?", "Explain {}.", "Can you explain {}?", "What does it say about {}?", "Where is {}?",
    "What happens with {}?", "When was {}?", "Is {} allowed?", "What did {} do?", "Which {} did {} have?",
    "Does {} cause {}?", "What is the difference between {} and {}?", "What is known about {}?", "Write about {}.",
    "Give me an example of {}.",
)  # fmt: skip
_WORDS = 5  # of the text, in a row, at most
_CHARACTERS = 40  # of them, at most, where a text has few spaces
_AROUND = " \t\n.,;:!?\"'()[]{}<>*#=-–—…«»„“”‘’¿¡"


def short_questions(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """So many questions about texts, each of some words in a row from anywhere in one of them; none where no text has a
    word."""
    draw = random.Random(seed)
    texts = [text for text in texts if _bare(text)]
    if not texts:
        return []
    lengths = list(itertools.accumulate(map(len, texts)))
    found = []
    for _ in range(count):
        form = draw.choice(_FORMS)
        (text,) = draw.choices(texts, cum_weights=lengths)
        found.append(form.format(*(_words(text, draw) for _ in range(form.count("{}")))))
    return found


def _words(text: str, draw: random.Random) -> str:
    wanted = draw.randint(1, _WORDS)
    for _ in range(8):  # where the text is rules and spaces, another place may have words
        start = at = draw.randrange(len(text))
        while start and not text[start - 1].isspace() and at - start < _CHARACTERS:
            start -= 1  # to where the word begins
        words = text[start : start + 8 * _CHARACTERS].split()
        if some := _bare(" ".join(words[:wanted])[:_CHARACTERS]):
            return some
    return _bare(text)[:_CHARACTERS]


def _bare(text: str) -> str:
    """Without what stands around words."""
    while (bare := text.strip().strip(_AROUND)) != text:
        text = bare
    return text
