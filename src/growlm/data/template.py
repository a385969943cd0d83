"""Template: turns -> token ids as the base's own chat template writes them, and which of them are answers.

The template's markers are special tokens; what a message spells like one is letters, so that no message can end its own
turn or begin another. Knows a tokenizer and strings; not where turns come from.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from growlm.data.conversations import Turn
from growlm.data.encoding import encode_marked
from growlm.errors import ConfigError


@dataclass(frozen=True)
class Written:
    """Token ids of a conversation.

    Attributes:
        answers: of each, whether it is of what the assistant says, or the end of its turn.
    """

    tokens: list[int]
    answers: list[bool]


@dataclass(frozen=True)
class Tools:
    """What a model may call, in the form that templates take: OpenAI's.

    Attributes:
        offered: `{"type": "function", "function": {"name", "description", "parameters"}}` each.
        calls: by turn, what the assistant has called in it: `{"type": "function", "function": {"name", "arguments"}}`,
            arguments as an object.
    """

    offered: Sequence[Mapping[str, Any]] = ()
    calls: Mapping[int, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    def text(self) -> str:
        """All that it spells."""
        return json.dumps([self.offered, *self.calls.values()], ensure_ascii=False)


NO_TOOLS = Tools()


@dataclass(frozen=True)
class _Span:
    """Where a turn's content stands in what the template wrote."""

    start: int
    end: int
    role: str


@dataclass(frozen=True)
class _Skeleton:
    """What a template writes around contents: `text` has a mark for each, at `places` (start, end), None where it
    leaves one out."""

    text: str
    places: list[tuple[int, int] | None]


class Template:
    """A tokenizer's chat template. Its own errors are let through as they are.

    Raises:
        ConfigError: the tokenizer has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not has_template(tokenizer):
            raise ConfigError(
                "the base's tokenizer has no chat template to write conversations with; take a base that was made for "
                "chat, or add a chat_template to its tokenizer_config.json"
            )
        self._tokenizer = tokenizer
        self._skeletons: dict[tuple[tuple[str, ...], bool], _Skeleton] = {}
        added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = special | set(tokenizer.all_special_ids)
        unknown = tokenizer.unk_token_id
        if unknown not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            self._special.discard(unknown)  # it stands for characters of a text, and marks nothing
        # Some tokenizers do not call special what their template marks turns with.
        self._others = {number: text for number, text in added.items() if number not in self._special and text.strip()}

    @property
    def takes_tools(self) -> bool:
        """Whether it tells the model of tools."""
        return "tools" in str(self._tokenizer.chat_template)

    def prompt(self, turns: Sequence[Turn], tools: Tools = NO_TOOLS) -> list[int]:
        """Token ids of a conversation that the assistant goes on with.

        Raises:
            ValueError: a turn spells out a special token, and the template rewrites turns so that it is not known where
                they stand; a tool or a call spells one out; or what a template raises itself.
        """
        text = self._render(turns, True, tools)
        skeleton, spans = _Skeleton(text, []), []
        markers = [*self._others.values(), *map(self._tokenizer.convert_ids_to_tokens, self._special)]
        told = tools.text()
        if spelled := next((marker for marker in markers if marker in told), None):
            raise ValueError(f"a tool or a call spells out {spelled!r}, which only the template may write")
        try:
            skeleton = self._skeleton(turns, True, tools)
            spans = self._spans(turns, skeleton, text, True, tools)
        except Exception:  # what a template dislikes of marks included
            if any(marker in turn.content for turn in turns for marker in markers):
                raise
        return self._encode(text, spans, skeleton)[0]

    def write(self, turns: Sequence[Turn]) -> Written:
        """Token ids of a whole conversation.

        Behind the last answer stands the end-of-text token, if the template writes no special token there.

        Raises:
            ValueError: the template rewrites turns so that it is not known where the answers are.
        """
        text = self._render(turns, False)
        skeleton = self._skeleton(turns, False)
        spans = self._spans(turns, skeleton, text, False)
        tokens, ends = self._encode(text, spans, skeleton)
        answers = [False] * len(tokens)
        markers = self._special | self._written_in(skeleton)
        for number, span in enumerate(spans):
            if span.role != "assistant":
                continue
            first, last = bisect_right(ends, span.start), bisect_right(ends, span.end)
            read = ends[last - 1] if last else 0
            if span.start < span.end and read < span.end and last < len(tokens) and tokens[last] not in markers:
                last += 1  # of the answer's end and of what the template writes behind it
            answers[first:last] = [True] * (last - first)
            if first == last:
                continue
            # The end of the turn is learned, and what the template writes before it.
            limit = spans[number + 1].start if number + 1 < len(spans) else len(text)
            behind = range(last, bisect_right(ends, limit))
            end = next((at for at in behind if tokens[at] in markers), None)
            if end is not None:
                answers[last : end + 1] = [True] * (end + 1 - last)
            elif number + 1 == len(spans) and self._tokenizer.eos_token_id is not None:
                tokens.append(self._tokenizer.eos_token_id)
                answers.append(True)
        return Written(tokens, answers)

    def _render(self, turns: Sequence[Turn], prompt: bool, tools: Tools = NO_TOOLS) -> str:
        messages: list[dict[str, Any]] = [turn._asdict() for turn in turns]
        for number, calls in tools.calls.items():
            messages[number]["tool_calls"] = list(calls)
        more = {"tools": list(tools.offered)} if tools.offered else {}
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **more)

    def _skeleton(self, turns: Sequence[Turn], prompt: bool, tools: Tools = NO_TOOLS) -> _Skeleton:
        roles = tuple(turn.role for turn in turns)
        if (roles, prompt) not in self._skeletons or tools is not NO_TOOLS:
            marks = [_mark(number) for number in range(len(roles))]
            text = self._render([Turn(role, mark) for role, mark in zip(roles, marks, strict=True)], prompt, tools)
            places: list[tuple[int, int] | None] = []
            for mark in marks:
                if text.count(mark) > 1:
                    raise ValueError("it writes a message more than once")
                start = text.find(mark)
                places.append(None if start < 0 else (start, start + len(mark)))
            made = _Skeleton(text, places)
            if tools is not NO_TOOLS:  # those of one request
                return made
            self._skeletons[roles, prompt] = made
        return self._skeletons[roles, prompt]

    def _spans(
        self, turns: Sequence[Turn], skeleton: _Skeleton, text: str, prompt: bool, tools: Tools = NO_TOOLS
    ) -> list[_Span]:
        """Where contents stand in `text`, in order: found by putting them where the marks are."""
        for trimmed in (False, True):
            contents = [turn.content.strip() if trimmed else turn.content for turn in turns]
            filled, spans = _filled(skeleton, skeleton.places, [("", content, "") for content in contents], turns)
            if filled == text:
                return spans
        # A template that rewrites some contents, as one that drops an earlier turn's reasoning: each by itself among
        # marks shows what becomes of it.
        places, fills = list(skeleton.places), [("", "", "") for _ in turns]
        for number, (place, turn) in enumerate(zip(skeleton.places, turns, strict=True)):
            if place is None:
                continue
            some = [Turn(other.role, _mark(at)) for at, other in enumerate(turns)]
            some[number] = turn
            places[number], new = _difference(skeleton.text, place, self._render(some, prompt, tools))
            fills[number] = ("", new, "")
            if places[number] != place and turn.role != "assistant":  # the template's own words are among them
                said = turn.content.strip()
                if not said or said not in new:
                    break
                before, _, behind = new.partition(said)
                fills[number] = (before, said, behind)
        else:
            ordered = sorted(place for place in places if place is not None)
            if all(one[1] <= other[0] for one, other in itertools.pairwise(ordered)):
                filled, spans = _filled(skeleton, places, fills, turns)
                if filled == text:
                    return spans
        raise ValueError("it rewrites messages so that what is whose cannot be told")

    def _written_in(self, skeleton: _Skeleton) -> set[int]:
        return {number for number, marker in self._others.items() if marker in skeleton.text}

    def _encode(self, text: str, spans: Sequence[_Span], skeleton: _Skeleton) -> tuple[list[int], list[int]]:
        """Token ids of what the template wrote, and where the characters of each end.

        A marker inside a content is cut behind its first character, and the pieces are read one by one.
        """
        others = self._written_in(skeleton)
        cuts: set[int] = set()
        while True:
            edges = [0, *sorted(cuts), len(text)]
            pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
            ids, offsets = encode_marked(self._tokenizer, pieces)
            tokens = [token for piece in ids for token in piece]
            at = [(a + edge, b + edge) for edge, piece in zip(edges, offsets, strict=False) for a, b in piece]
            found = {
                place
                for token, (start, end) in zip(tokens, at, strict=True)
                if token in self._special or token in others
                for place in _inside(text, start, end, spans, only_of_others=token not in self._special)
            }
            if not found - cuts:
                return tokens, [end for _, end in at]
            cuts |= found


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _mark(number: int) -> str:
    """A content that no template has, of letters alone: it is neither trimmed nor escaped."""
    letters = "".join(chr(ord("a") + int(digit)) for digit in str(number))
    return f"Zqxj{letters}Zqxj"


def _filled(
    skeleton: _Skeleton,
    places: Sequence[tuple[int, int] | None],
    fills: Sequence[tuple[str, str, str]],
    turns: Sequence[Turn],
) -> tuple[str, list[_Span]]:
    """The skeleton with something else at its places, and where contents then are.

    Args:
        fills: a content each, and what of the template stands before and behind it.
    """
    parts: list[str] = []
    spans: list[_Span] = []
    at = length = 0
    found = [(place, fill, turn) for place, fill, turn in zip(places, fills, turns, strict=True) if place is not None]
    for (start, end), (before, content, behind), turn in sorted(found, key=lambda item: item[0]):
        parts += [skeleton.text[at:start], before, content, behind]
        length += start - at + len(before)
        spans.append(_Span(length, length + len(content), turn.role))
        length += len(content) + len(behind)
        at = end
    return "".join([*parts, skeleton.text[at:]]), spans


def _difference(text: str, place: tuple[int, int], other: str) -> tuple[tuple[int, int], str]:
    """What of `text` around a place is something else in `other`, and what that is."""
    start = 0
    for a, b in zip(text[: place[0]], other, strict=False):
        if a != b:
            break
        start += 1
    most = min(len(text) - place[1], len(other) - start)
    behind = 0
    while behind < most and text[-1 - behind] == other[-1 - behind]:
        behind += 1
    return (start, len(text) - behind), other[start : len(other) - behind]


def _inside(text: str, start: int, end: int, spans: Sequence[_Span], *, only_of_others: bool) -> list[int]:
    """Where to cut a marker that stands inside a content."""
    for span in spans:
        if span.start <= start and end <= span.end and not (only_of_others and span.role == "assistant"):
            return [start + len(text[start:end]) - len(text[start:end].lstrip()) + 1]
    return []
