r"""Answers: the number or the \boxed{...} in what a model wrote, in a form to compare, and the majority of several.

Pure text. "" stands for no answer: it never wins a vote and is never right.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
# A minus is a sign only where it cannot be read as "less" or as a range: not after a digit, letter or bracket.
_NUMBER = re.compile(rf"(?:(?<![\w)])[-−]\$?)?(?:{_DIGITS}(?:\.\d+)?|(?<!\d)\.\d+)")
_GROUP = r"\{((?:[^{}\\]|\\.)*)\}"  # of TeX, with no group inside
_RATIONAL = re.compile(
    r"(-?)(?:\\frac\{(-?\d{1,50})\}\{(\d{1,50})\}|(-?\d{1,50})/(\d{1,50})|(\d{0,50}(?:\.\d{1,50})?))"
)
_SPACING = re.compile(r"\\[!,;: ]|~|\s+|\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])")


# Numbers


def number(text: str) -> str:
    """The answer of a solution that ends with `#### NUMBER`; without such an end, the last number in it.

    Thousands' commas, currency, a sentence's full stop and zeros that say nothing are left out: "$1,250.50." is
    "1250.5". The first `####` counts: what a model writes after it belongs to no answer.
    """
    _, mark, end = text.partition("####")
    found = _NUMBER.findall(end.split("\n")[0])[:1] if mark else []
    found = found or _NUMBER.findall(text)[-1:]
    return _canonical(found[0]) if found else ""


def _canonical(digits: str) -> str:
    sign = "-" if digits[0] in "-−" else ""
    whole, _, part = digits.lstrip("-−$").replace(",", "").partition(".")
    value = whole.lstrip("0") or "0"
    if part := part.rstrip("0"):
        value += f".{part}"
    return value if value == "0" else sign + value


# TeX


def boxed(text: str) -> str:
    r"""What the last complete `\boxed{...}` holds, with all the braces inside it."""
    closing = _closing(text)
    for found in reversed(list(re.finditer(r"\\boxed\s*(?:\{|(\w+))", text))):
        if found[1] is not None:
            return found[1]
        if (end := closing.get(found.end() - 1)) is not None:
            return text[found.end() : end].strip()
    return ""


def _closing(text: str) -> dict[int, int]:
    """Where each brace that is opened is closed; a brace after a backslash is a character. All at once, because a text
    may open thousands and close none."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for found in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if found.group() == "{":
            opened.append(found.start())
        elif found.group() == "}" and opened:
            closing[opened.pop()] = found.start()
    return closing


def plain_latex(text: str) -> str:
    r"""An answer in TeX, so that the usual ways to write the same thing are equal.

    Left out: spacing, `\left` and `\right`, dollars, degrees, per cent, a unit in `\text{}` after a number, thousands'
    commas, a full stop, a leading `x =` or `x \in`. Of `\dfrac12`, `1/2` and `0.5` each becomes `1/2`. No algebra:
    `2x+1` and `1+2x` are different answers.
    """
    plain = text.replace("\\$", "").replace("$", "").replace("{,}", ",").replace("−", "-")
    plain = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°|\\?%", "", plain)
    plain = re.sub(
        rf"(?<=[\d}}])(?:\\[ ,;!]|[\s~])*\\(?:text|mbox|mathrm)\s*{_GROUP}(?:\^\{{?\d\}}?)?\s*\.?\s*$", "", plain
    )
    plain = re.sub(rf"\\(?:text|textbf|mbox|mathrm|mathbf)\s*{_GROUP}", r"\1", plain)
    plain = _SPACING.sub("", plain)
    plain = re.sub(r"\\[dtc]frac", r"\\frac", plain)
    plain = re.sub(r"\\(frac|sqrt)(\d)", r"\\\1{\2}", plain)
    plain = re.sub(rf"\\frac{_GROUP}(\w)", r"\\frac{\1}{\2}", plain)
    plain = re.sub(r"^[a-zA-Z](?:=|\\in(?![a-zA-Z]))", "", plain).removesuffix(".")
    while (inner := re.fullmatch(_GROUP, plain)) is not None:
        plain = inner.group(1)
    if re.fullmatch(rf"-?{_DIGITS}(?:\.\d+)?", plain):
        plain = plain.replace(",", "")
    return _rational(plain) or plain or "".join(text.split())


def _rational(text: str) -> str:
    found = _RATIONAL.fullmatch(text)
    if not text.strip("-") or found is None:
        return ""
    sign, top, bottom, top_of_slash, bottom_of_slash, decimal = found.groups()
    if decimal is not None:
        value = Fraction(decimal)
    else:
        below = int(bottom or bottom_of_slash)
        if below == 0:
            return ""
        value = Fraction(int(top or top_of_slash), below)
    return str(-value if sign else value)


# Votes


def majority(answers: Iterable[str]) -> str:
    """The answer given most often, the earliest of those that tie; draws without an answer have no vote."""
    votes = Counter(answer for answer in answers if answer)
    return votes.most_common(1)[0][0] if votes else ""


def vote_on_numbers(draws: Iterable[Sequence[str]], docs: Sequence[Any]) -> list[str]:
    """The harness's filter for GSM8K: of each question's draws, the number that most of them end with."""
    return [_voted(texts, number) for texts in draws]


def vote_on_boxes(draws: Iterable[Sequence[str]], docs: Sequence[Any]) -> list[str]:
    r"""The harness's filter for MATH: of each problem's draws, the `\boxed{...}` that most of them give."""
    return [_voted(texts, lambda text: plain_latex(found) if (found := boxed(text)) else "") for texts in draws]


def _voted(texts: Sequence[str], answer: Callable[[str], str]) -> str:
    return majority(answer(text) for text in texts)


def exact(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The harness's metric: whether the answer is the row's."""
    return {"exact_match": float(results[0] == doc["answer"])}
