"""Rows: the columns of a data set, as files or the hub spell them -> what the task files read.

Pure functions of one row. Each raises `DataError` saying what is wrong with the row and what one looks like; where the
row stands is the caller's to add.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from growlm.errors import DataError
from growlm.evaluation.tasks.answers import boxed, number, plain_latex

LETTERS = "ABCDEFGHIJ"
_CHOICE = "a row has question, choices (or A, B, C, D) and answer, an index from 0 or a letter"
_NUMBER = "a row has question and answer, a text that ends with '#### NUMBER'"
_MATHS = r"a row has problem and solution, a text with \boxed{ANSWER}, or problem and answer"


class Choice(TypedDict):
    """A multiple-choice question; `answer` counts from 0 and `subject` may be empty."""

    subject: str
    question: str
    choices: list[str]
    answer: int


class Worked(TypedDict):
    """A question with a worked solution; `answer` is in the form that a draw's answer is compared in."""

    subject: str
    question: str
    solution: str
    answer: str


def choice_row(row: Mapping[str, Any]) -> Choice:
    """A row of multiple choice: MMLU, C-Eval, ARC or PIQA.

    Question: `question` or `goal`. Choices: a list in `choices`, ARC's `{"text": [...], "label": [...]}`, columns `A`
    to `J`, or `sol1` and `sol2`. Answer: `answer`, `answerKey` or `label`; an index from 0, also as text, or a choice's
    letter or label. `subject` may be absent.
    """
    question = _text(row, ("question", "goal"), _CHOICE)
    labels: list[str] = []
    if "choices" in row:
        found = row["choices"]
        if isinstance(found, Mapping):
            labels = [str(label) for label in _list(found, "label")]
            found = _list(found, "text")
    else:
        names = [name for name in LETTERS if row.get(name) is not None] or ["sol1", "sol2"]
        if not all(name in row for name in names):
            raise DataError(_lacks(("choices",), row, _CHOICE))
        found = [row[name] for name in names]
    if not isinstance(found, list | tuple) or not 2 <= len(found) <= len(LETTERS):
        raise DataError(f"'choices' is {_shown(found)}, expected a list of 2 to {len(LETTERS)} texts; {_CHOICE}")
    choices = [_text({"choices": choice}, ("choices",), _CHOICE) for choice in found]
    name, answer = _first(row, ("answer", "answerKey", "label"), _CHOICE)
    labels = labels or list(LETTERS[: len(choices)])
    if isinstance(answer, str) and answer.strip() in labels:
        answer = labels.index(answer.strip())
    elif isinstance(answer, str) and re.fullmatch("[0-9]", answer.strip()) and not any(map(str.isdecimal, labels)):
        answer = int(answer)  # where the labels are numbers themselves, another number is no index
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        expected = f"expected 0 to {len(choices) - 1} or one of {', '.join(labels)}"
        raise DataError(f"{name!r} is {_shown(answer)}, {expected}; a split without answers cannot be evaluated")
    return Choice(subject=_subject(row), question=question, choices=choices, answer=answer)


def number_row(row: Mapping[str, Any]) -> Worked:
    """A row of GSM8K: `question`, and `answer`, a solution that ends with `#### NUMBER`.

    The calculator's notes, `<<6*7=42>>`, are left out: they are no text that a model should write.
    """
    question = _text(row, ("question",), _NUMBER)
    name, given = _first(row, ("answer",), _NUMBER)
    if isinstance(given, int | float) and not isinstance(given, bool):
        given = str(given)
    solution = re.sub(r"<<[^<>]*>>", "", _text({name: given}, (name,), _NUMBER))
    answer = number(solution)
    if not answer:
        raise DataError(f"{name!r} holds no number: {_shown(solution)}; {_NUMBER}")
    if "####" not in solution:
        solution = f"{solution}\n#### {answer}"
    return Worked(subject=_subject(row), question=question, solution=solution, answer=answer)


def maths_row(row: Mapping[str, Any]) -> Worked:
    r"""A row of MATH: `problem` (or `question`), and `solution` with a `\boxed{...}`, or `answer`, or both."""
    question = _text(row, ("problem", "question"), _MATHS)
    solution = _text(row, ("solution",), _MATHS) if row.get("solution") is not None else ""
    if row.get("answer") is not None:
        answer = _text({"answer": str(row["answer"])}, ("answer",), _MATHS)
        answer = boxed(answer) or answer
    elif not solution:
        raise DataError(_lacks(("solution",), row, _MATHS))
    else:
        answer = boxed(solution)
        if not answer:
            raise DataError(rf"'solution' has no complete \boxed{{...}}: {_shown(solution)}; {_MATHS}")
    if not boxed(solution):
        solution = f"{solution}\nThe answer is $\\boxed{{{answer}}}$.".strip()
    return Worked(subject=_subject(row), question=question, solution=solution, answer=plain_latex(answer))


def _subject(row: Mapping[str, Any]) -> str:
    return str(row.get("subject") or row.get("type") or "")


def _first(row: Mapping[str, Any], names: Iterable[str], form: str) -> tuple[str, Any]:
    for name in names:
        if name in row:
            return name, row[name]
    raise DataError(_lacks(names, row, form))


def _text(row: Mapping[str, Any], names: Iterable[str], form: str) -> str:
    name, found = _first(row, names, form)
    if not isinstance(found, str) or not found.strip():
        raise DataError(f"{name!r} is {_shown(found)}, expected a text that is not blank; {form}")
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name!r} holds half of a surrogate pair; remove it") from error
    return found.strip()


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    found = row.get(name)
    if not isinstance(found, list | tuple):
        raise DataError(f"{name!r} of 'choices' is {_shown(found)}, expected a list; {_CHOICE}")
    return list(found)


def _lacks(names: Iterable[str], row: Mapping[str, Any], form: str) -> str:
    found = ", ".join(repr(name) for name in list(row)[:20]) or "none"
    return f"no column {' or '.join(repr(name) for name in names)} among {found}; {form}"


def _shown(value: object) -> str:
    text = "null" if value is None else " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."
