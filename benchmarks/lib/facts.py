"""Facts: questions about a text, each with its true answer beside three that are like it, made without a model.

Of running text: a sentence up to a number, a name or a rare word. Of questions and answers: the text's own questions.
Knows texts and a seed; no tokens, and nothing of who answers.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

KINDS = ("number", "name", "term")
CHOICES = 4
_SENTENCE = re.compile(r"(?<=[.!?…:;])[\"'”’“»)]*\s+|\n+")
_WORD = re.compile(r"\d(?:[\d.,:/-]*\d)?|[^\W\d_]+(?:['’-][^\W\d_]+)*")
_BEFORE = 5  # words of its sentence that stand before an answer, at the least
_TAIL = 3  # of them that are counted with it
_DETERMINED = 8  # words after which nothing but the answer stands in the text
_USUAL = 100  # times that a name stands in the text, at the most: more often it is a word of the domain
_TERM, _RARE = 6, 5  # letters of a rare word, at the least, and how often it stands in the text, at the most
_LIKE = 12  # other answers that are most like the true one, of which three are drawn
_OWNERS = ("'s", "’s")
_CALCULATED = "=+-*/<>×÷"  # a number behind one of them can be worked out
_ANSWER = 20  # words of an answer to one of the text's own questions, at the most
_FORM = 100  # one question in so many has a form, at the least
_ALIKE = 0.5  # share of all their words that two answers have in common, at the most


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        kind: of `KINDS`, or the form of one of the text's own questions.
        context: what stands before the answer: its sentence so far and the one before it, or the question.
        tail: the last words of it, with which the answer is counted.
        reworded: the same question in words after which the answer stands nowhere in the text.
        choices: the true answer first; each begins with the space before it.
        trained: whether sentence and answer stand in a row that was trained on.
        times: how often the answer stands in the whole text after the last words before it.
        answers: how often it stands there at all.
    """

    kind: str
    context: str
    tail: str
    reworded: str
    choices: tuple[str, ...]
    trained: bool
    times: int
    answers: int

    @property
    def fact(self) -> str:
        """The last words with the true answer, as they stand in the text."""
        return self.tail + self.choices[0]


def questions(
    documents: Sequence[str], rows: Sequence[str], count: int, seed: int, *, asked: bool = False
) -> list[Question]:
    """Up to `count` questions, half of them of what stands in `rows`, where there is enough of each.

    Args:
        rows: pieces of the documents.
        asked: the documents are questions with their answers, in lines that begin `Question: ` and `Answer: `.
    """
    draw = random.Random(f"facts/{seed}")
    text = _Text.of(documents, rows)
    both = _own_questions(documents, text, draw) if asked else _clozes(documents, text, draw)
    half = count // 2 if rows else 0
    trained = list(itertools.islice(both[True], count))
    others = list(itertools.islice(both[False], count - min(half, len(trained))))
    return [*trained[: count - len(others)], *others]


@dataclass(frozen=True)
class _Text:
    """All documents as one string, the rows as another, and how often words are written without a capital."""

    whole: str
    rows: str
    words: Counter[str]

    @classmethod
    def of(cls, documents: Sequence[str], rows: Sequence[str]) -> _Text:
        whole = "\n\n".join(documents)
        return cls(whole, "\n\n".join(rows), Counter(w for w in _WORD.findall(whole) if w[0].islower()))

    def times(self, words: str) -> int:
        return self.whole.count(words)


# Running text


@dataclass(frozen=True)
class _Place:
    """Where an answer stands: in which document, and where context, sentence, last words and answer begin."""

    document: int
    context: int
    sentence: int
    determined: int
    tail: int
    start: int
    end: int
    stop: int  # where the sentence ends
    kind: str
    form: str  # answers of one kind and form can stand for each other
    before: str  # the word before it


@dataclass
class _Seen:
    """Of an answer: how often it stands in the text, and after which words."""

    count: int
    before: set[str]


def _clozes(documents: Sequence[str], text: _Text, draw: random.Random) -> dict[bool, Iterator[Question]]:
    places: dict[tuple[str, bool], list[_Place]] = {(kind, rows): [] for kind in KINDS for rows in (False, True)}
    pools: dict[tuple[str, str], dict[str, _Seen]] = defaultdict(dict)
    for number, document in enumerate(documents):
        for place in _places(number, document, text):
            places[place.kind, document[place.sentence : place.end] in text.rows].append(place)
            answer = document[place.start : place.end]
            seen = pools[place.kind, place.form].setdefault(answer, _Seen(0, set()))
            seen.count += 1
            seen.before.add(place.before)

    def of_kind(kind: str, trained: bool) -> Iterator[Question]:
        used: set[tuple[int, int]] = set()
        for place in draw.sample(places[kind, trained], len(places[kind, trained])):
            if (sentence := (place.document, place.sentence)) not in used:
                pool = pools[kind, place.form]
                question = _cloze(documents[place.document], place, text, pool, trained, draw)
                if question is not None:
                    used.add(sentence)
                    yield question

    def in_turns(trained: bool) -> Iterator[Question]:
        left = [of_kind(kind, trained) for kind in KINDS]
        while left:
            for some in list(left):
                question = next(some, None)
                if question is None:
                    left.remove(some)
                else:
                    yield question

    return {trained: in_turns(trained) for trained in (True, False)}


def _places(number: int, document: str, text: _Text) -> Iterator[_Place]:
    ends = [m.span() for m in _SENTENCE.finditer(document)]
    starts = [0, *(end for _, end in ends)]
    stops = [*(start for start, _ in ends), len(document)]
    for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        words = list(_WORD.finditer(document, start, stop))
        at = _BEFORE
        while at < len(words):
            last = _run(document, words, at)
            found = _kind(document, words, at, last, text)
            if found is not None:
                first = words[at].start()
                yield _Place(
                    number,
                    starts[max(i - 1, 0)],
                    start,
                    words[max(at - _DETERMINED, 0)].start(),
                    words[at - _TAIL].start(),
                    first,
                    words[last].end(),
                    stop,
                    *found,
                    words[at - 1].group(),
                )
            at = last + 1


def _run(document: str, words: Sequence[re.Match[str]], at: int) -> int:
    """The last of the capitalised words that begin at one, with single spaces between; the word itself otherwise."""
    last = at
    if words[at].group()[0].isupper():
        while (
            last + 1 < len(words)
            and words[last + 1].group()[0].isupper()
            and document[words[last].end() : words[last + 1].start()] == " "
        ):
            last += 1
    return last


def _kind(document: str, words: Sequence[re.Match[str]], at: int, last: int, text: _Text) -> tuple[str, str] | None:
    """Kind and form of what stands there, if it is worth asking for."""
    start, end = words[at].start(), words[last].end()
    before, after = document[start - 2 : start], document[end : end + 1]
    if before[1:] != " " or before[:1].isspace() or after.isalnum() or after in ("_", "(", "-"):
        return None
    if after and not (after.isprintable() or after.isspace()):
        return None  # a part of something that was read in another encoding
    found = document[start:end]
    if found[0].isdigit():
        if sum(c.isdigit() for c in found) < 2 or before[0] in _CALCULATED:
            return None
        return "number", re.sub(r"\d", "0", found)
    if found[0].isupper():
        many = last - at + 1
        form = f"{many} {found.isupper()} {found.endswith(_OWNERS)}"
        proper = any(text.words[w.group().lower()] == 0 for w in words[at : last + 1])
        joined = words[at - 1].group()[0].isupper() and document[words[at - 1].end() : start] == " "
        return ("name", form) if proper and not joined and many <= 3 and len(found) > 2 else None
    rare = len(found) >= _TERM and text.words[found] <= _RARE
    return ("term", "") if rare else None


def _cloze(
    document: str, place: _Place, text: _Text, pool: dict[str, _Seen], trained: bool, draw: random.Random
) -> Question | None:
    answer = document[place.start : place.end]
    context = document[place.context : place.start]
    rest = document[place.end : place.stop]
    standing = {w.lower() for w in _WORD.findall(context + rest)}

    def stands(words: str) -> bool:
        """Beside it: it would be repeated and not known."""
        return any(w.lower() in standing for w in words.split(" "))

    determined = document[place.determined : place.start]
    usual = place.kind == "name" and pool[answer].count > _USUAL
    if usual or stands(answer) or text.times(determined) != text.times(determined + answer):
        return None
    others = [o for o in pool if not stands(o) and not o.startswith(answer) and not answer.startswith(o)]
    if len(others) < CHOICES - 1:
        return None
    draw.shuffle(others)
    like = sorted(others, key=lambda o: _unlike(answer, pool[answer].count, place.before, o, pool[o]))
    chosen = draw.sample(like[:_LIKE], CHOICES - 1)
    sentence, tail = document[place.sentence : place.start], document[place.tail : place.start - 1]
    return Question(
        kind=place.kind,
        context=context[:-1],
        tail=tail,
        reworded=f"Fill in the blank: {sentence}____{rest}\nAnswer:",
        choices=tuple(f" {choice}" for choice in (answer, *chosen)),
        trained=trained,
        times=text.times(f"{tail} {answer}"),
        answers=text.times(answer),
    )


def _unlike(answer: str, count: int, before: str, other: str, seen: _Seen) -> float:
    """How easily another answer is told from the true one by its length, its ending, how usual it is, and whether it
    ever stands after the word before it."""
    ending = 0 if other[0].isdigit() or other[-2:] == answer[-2:] else 1
    rarity = abs(math.log2(seen.count / count))
    return 2 * (before not in seen.before) + ending + rarity + abs(len(other) - len(answer)) / 2


# The text's own questions


@dataclass(frozen=True)
class _Asked:
    """A question (`context`) about a `subject`, and the beginning of its answer.

    Attributes:
        form: what stands before the subject, and behind it.
    """

    context: str
    form: tuple[str, str]
    subject: str
    answer: str

    @cached_property
    def said(self) -> list[str] | None:
        """The answer without the subject, in two parts, or in one where it is not named; None where the answer names it
        in another way besides, by which it would be told, or only says what comes."""
        found = re.search(rf"(?<!\w){re.escape(self.subject)}(?!\w)", self.answer, re.I)
        parts = [self.answer[: found.start()], self.answer[found.end() :]] if found else [self.answer]
        rest = " ".join(parts)
        named = any(w in rest.lower() for w in re.findall(r"[^\W\d_]{4,}", self.subject.lower()))
        short = parts[1].startswith(" (") if found else re.search(r"[A-Z]{2}", rest)
        heading = self.answer.endswith("?") or " - " in self.answer
        return None if named or short or heading else parts

    def about(self, other: _Asked) -> str:
        """What it says, said of another's subject."""
        assert self.said is not None
        if len(self.said) == 1:
            return self.answer
        before, after = self.said
        name = other.subject
        if other.said is not None and len(other.said) == 2 and other.said[0]:  # as it is written within a sentence
            name = other.answer[len(other.said[0]) :][: len(name)]
        return before + (name if before else name[0].upper() + name[1:]) + after


def _own_questions(documents: Sequence[str], text: _Text, draw: random.Random) -> dict[bool, Iterator[Question]]:
    pairs = [pair for document in documents for pair in re.findall(r"^Question: (.+)\nAnswer: (.+)$", document, re.M)]
    form_of = _forms([question for question, _ in pairs])
    by_form: dict[tuple[str, str], list[_Asked]] = defaultdict(list)
    for question, answer in dict(pairs).items():
        form = form_of(question)
        if form is not None:
            subject = question.removeprefix(form[0]).removesuffix(form[1]).strip()
            one = _Asked(f"Question: {question}\nAnswer:", form, subject, _beginning(answer))
            if one.said is not None:
                by_form[form].append(one)
    asked = [one for of_form in by_form.values() for one in of_form]
    draw.shuffle(asked)

    def some(trained: bool) -> Iterator[Question]:
        for one in asked:
            if (f"{one.context} {one.answer}" in text.rows) is trained:
                others = _other_answers(one, by_form[one.form], draw)
                if len(others) == CHOICES - 1:
                    tail = one.context[one.context.index(one.subject) :]
                    yield Question(
                        kind=one.form[0].strip(),
                        context=one.context,
                        tail=tail,
                        reworded=f"This is about {one.subject}. {one.form[0]}it{one.form[1]}\nReply:",
                        choices=tuple(f" {answer}" for answer in (one.answer, *others)),
                        trained=trained,
                        times=text.times(f"{tail} {one.answer}"),
                        answers=text.times(one.answer),
                    )

    return {trained: some(trained) for trained in (True, False)}


def _forms(asked: Sequence[str]) -> Callable[[str], tuple[str, str] | None]:
    """The form of a question: the longest beginning that many different questions have, and the ending that nearly all
    of those have."""
    different = set(asked)
    least = max(len(different) // _FORM, CHOICES)
    beginnings = Counter(b for q in different for b in _beginnings(q))

    def beginning(question: str) -> str | None:
        return next((b for b in reversed(_beginnings(question)) if beginnings[b] >= least), None)

    ends: dict[str, list[list[str]]] = defaultdict(list)
    for question in different:
        if (b := beginning(question)) is not None:
            ends[b].append(_parts(question))
    endings: dict[str, str] = {}
    for b, found in ends.items():
        many = 0
        while True:
            usual, times = Counter("".join(p[-many - 1 :]) for p in found if len(p) > many + 1).most_common(1)[0]
            if times < 0.9 * len(found):
                break
            many, endings[b] = many + 1, usual

    def form(question: str) -> tuple[str, str] | None:
        b = beginning(question)
        if b is None or not question.endswith(endings.get(b, "")):
            return None
        return b, endings.get(b, "")

    return form


def _parts(question: str) -> list[str]:
    """Words with the space before them, and the question mark."""
    return re.findall(r"\s*[^\s?]+|\s*\?", question)


def _beginnings(question: str) -> list[str]:
    parts = _parts(question)
    return ["".join(parts[:n]) + " " for n in range(1, len(parts) - 1)]


def _beginning(answer: str) -> str:
    """Its first sentence, or as much of it as is asked for."""
    first = re.split(r"(?<=[.!?])\s", answer, maxsplit=1)[0]
    return " ".join(first.split(" ")[:_ANSWER])


def _other_answers(one: _Asked, asked: Sequence[_Asked], draw: random.Random) -> list[str]:
    """Up to three answers to questions of the same form, said of what `one` asks about, none of which says what the
    true answer or another of them says."""
    assert one.said is not None
    found: list[str] = []
    words = [set(one.answer.lower().split())]
    for other in draw.sample(asked, len(asked)):
        assert other.said is not None
        # An answer that names its subject would be told by that alone among some that do not.
        if other.subject.lower() == one.subject.lower() or len(other.said) != len(one.said):
            continue
        answer = other.about(one)
        own = set(answer.lower().split())
        longer = len(answer) / len(one.answer)
        if 0.6 <= longer <= 1.7 and all(len(own & w) <= _ALIKE * len(own | w) for w in words):
            found.append(answer)
            words.append(own)
        if len(found) == CHOICES - 1:
            break
    return found
