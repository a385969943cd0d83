"""Prose: the English sentences of docstrings, comments and manuals, without code, tables and parameter lists.

Works on strings. Knows nothing of where they come from or what they are for.
"""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Iterator

_COMMENTS = re.compile(r"#[^\n]*\n(?:[ \t]*#[^\n]*\n)+")
_COMMENT_MARK = re.compile(r"^[ \t]*#+ ?", re.MULTILINE)
_LICENCE = re.compile(r"copyright|licen[cs]e|generated from", re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1[^\n]*$|\Z)", re.DOTALL | re.MULTILINE)
_HTML = re.compile(r"<[^<>\n]{1,200}>")
_LINK = re.compile(r"!?\[([^\]\n]*)\]\([^)\n]*\)")
_ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`")
# "- text", "1. text" and "name (type): Text" open a unit whose later lines are indented further.
_ITEM = re.compile(r"(?:[-*•+]|\d+[.)]|[\w*`]+ ?(?:\([^)\n]*\))?:(?= [A-Z]))\s+")
_OPENING = re.compile(r"[A-Z\"'`“(\[]")
_WORD = re.compile(r"[A-Za-z']+")
_SMALL = """
a an and any are as at be been but by can each for from has have if in into is it its may must no not of on
only or other same should so some such than that the their then there these they this to used was we when
where which will with you your
"""
_SMALL_WORDS = frozenset(_SMALL.split())
_MIN_WORDS = 8
_MIN_SMALL_SHARE = 0.22  # of the words; English prose has 0.35 to 0.5, code and lists of names less than 0.1
_MIN_LETTER_SHARE = 0.82  # of the characters, spaces counted as letters


def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a Python source, in order, dedented, each at least 60 characters long.

    Found by scanning for triple-quoted strings that open a line or an argument (as in `add_docstr(x, ...)`),
    because `ast.parse` takes half a minute for the 140 MB of source that the demonstration reads, the scan a
    second. A string that is no docstring but stands like one, such as a template, is returned too.
    """
    for start, prefix, quote, body in _triple_quoted(source):
        if len(body) < 60 or not set(prefix) <= {"r", "u"}:
            continue
        before = source[source.rfind("\n", 0, start) + 1 : start].rstrip()
        if before and before[-1] not in "(,":
            continue
        if "\\" in body and "r" not in prefix:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
                try:
                    body = str(ast.literal_eval(quote + body + quote))
                except (SyntaxError, ValueError):
                    continue
            body = body.encode(errors="replace").decode()  # an escaped surrogate cannot be written as UTF-8
        yield inspect.cleandoc(body)


def comments(source: str) -> Iterator[str]:
    """The comments of a Python source, of two lines or more, without their marks; licences are left out."""
    for match in _COMMENTS.finditer(source):
        if source[source.rfind("\n", 0, match.start()) + 1 : match.start()].strip():
            continue  # begins behind code
        if not _LICENCE.search(match[0]):
            yield _COMMENT_MARK.sub("", match[0])


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of English prose in `text` (reStructuredText, Markdown or plain), each on one line.

    Doctests, code blocks, tables, headings, grammars and lists of names fail the tests of `_is_prose`; the
    sentences that describe a parameter pass, without its name.
    """
    text = _FENCE.sub("", text)
    text = _LINK.sub(r"\1", _HTML.sub("", _ROLE.sub(r"`\1`", text))).replace("``", "`").replace("**", "")
    for block in re.split(r"\n[ \t]*\n", text):
        if ">>>" in block:
            continue
        for unit in _units(block):
            if _is_prose(unit):
                yield unit


def _triple_quoted(source: str) -> Iterator[tuple[int, str, str, str]]:
    """Start, lower-case prefix, quote and body of every triple-quoted string.

    All of them, not only docstrings, so that a closing quote is never taken for an opening one.
    """
    position = 0
    following = {quote: source.find(quote) for quote in ('"""', "'''")}
    while True:
        for quote, at in following.items():
            if 0 <= at < position:
                following[quote] = source.find(quote, position)
        found = [(at, quote) for quote, at in following.items() if at >= 0]
        if not found:
            return
        opening, quote = min(found)
        closing = source.find(quote, opening + 3)
        while closing > 0 and source[closing - 1] == "\\":
            closing = source.find(quote, closing + 1)
        if closing < 0:
            return
        start = opening
        while start > 0 and opening - start < 2 and source[start - 1].isalpha():
            start -= 1
        yield start, source[start:opening].lower(), quote, source[opening + 3 : closing]
        position = closing + 3


def _units(block: str) -> Iterator[str]:
    """Runs of lines that share an indentation, joined; an item joins the lines indented below it."""
    lines: list[str] = []
    indent: int | None = None  # None: after the first line of an item, any deeper line may follow
    item_indent = 0
    for raw in block.split("\n"):
        line = raw.strip()
        if not line:
            continue
        here = len(raw) - len(raw.lstrip())
        item = _ITEM.match(line)
        follows = here > item_indent if indent is None else here == indent
        if lines and (item or not follows):
            yield " ".join(lines)
            lines = []
        if item:
            indent, item_indent = None, here
            line = line[item.end() :]
        else:
            indent = here
        lines.append(line)
    if lines:
        yield " ".join(lines)


def _is_prose(unit: str) -> bool:
    if len(unit) < 40 or unit[-1] not in ".!?:" or not _OPENING.match(unit):
        return False
    words = _WORD.findall(unit)
    if len(words) < _MIN_WORDS:
        return False
    if sum(word.lower() in _SMALL_WORDS for word in words) < _MIN_SMALL_SHARE * len(words):
        return False
    return sum(map(len, words)) + unit.count(" ") >= _MIN_LETTER_SHARE * len(unit)
