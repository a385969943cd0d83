"""Conversations: records of several known forms -> turns of system, user and assistant.

Knows the forms by their keys; not how a model's template writes turns, nor where records come from.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from growlm.data.records import Record, string_at, type_of
from growlm.errors import DataError, shortened

# By form, the keys of its records, one set or another; the first form and the first set that fit are taken.
KEYS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "alpaca": (("instruction", "output"),),
    "prompt": (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response")),
}
MORE_KEYS: Mapping[str, tuple[str, ...]] = {"alpaca": ("input", "system")}  # that it may have besides
FORMATS = ("auto", "text", *KEYS)

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "tool": "tool", "observation": "tool",
}  # fmt: skip


class Turn(NamedTuple):
    """What one side says: `role` is system, user, assistant or tool."""

    role: str
    content: str


def format_of(keys: Collection[str]) -> str | None:
    """The form of conversation that records with these keys or columns have."""
    return next((name for name in KEYS if not lacking(keys, name)), None)


def keys_of(found: Collection[str], format: str) -> tuple[str, ...]:
    """Of the form's sets of keys the first of which fewest are missing."""
    return min(KEYS[format], key=lambda keys: sum(key not in found for key in keys))


def lacking(found: Collection[str], format: str) -> list[str]:
    """Keys that are missing to be of this form."""
    return [key for key in keys_of(found, format) if key not in found]


def turns_of(record: Record, format: str, where: str) -> tuple[Turn, ...]:
    """The turns of a record, at least one of which is an answer.

    Args:
        format: one of `KEYS`, whose keys it has.
        where: the record's place, for messages.

    Raises:
        DataError: it has no answer, or holds something else.
    """
    if format in ("messages", "sharegpt"):
        (key,) = keys_of(record, format)
        turns = _messages(record[key], key, where)
    else:
        asked, answered = keys_of(record, format)
        system, more = (string_at(record.get(key) or "", key, where) for key in ("system", "input"))
        question = string_at(record[asked], asked, where)
        if format == "alpaca" and more.strip():
            question = f"{question}\n\n{more}"
        turns = [Turn("user", question), Turn("assistant", string_at(record[answered], answered, where))]
        if format == "alpaca" and system.strip():
            turns.insert(0, Turn("system", system))
    if not any(turn.role == "assistant" and turn.content.strip() for turn in turns):
        raise DataError(f"{where}: no answer of the assistant's to learn; correct it or drop it")
    return tuple(turns)


def _messages(messages: Any, key: str, where: str) -> list[Turn]:
    if not isinstance(messages, list):
        raise DataError(f"{where}: {key!r} is {type_of(messages)}, expected a list of messages")
    turns = []
    for number, message in enumerate(messages, 1):
        place = f"{where}: message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{place} is {type_of(message)}, expected an object with role and content")
        said_by, said = ("from", "value") if "from" in message else ("role", "content")
        role = message.get(said_by)
        if not isinstance(role, str) or role not in _ROLES:
            raise DataError(f"{place}: {said_by} is {shortened(role)}, expected one of {', '.join(_ROLES)}")
        content = message.get(said)
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)  # parts, as of interfaces that also take pictures
        turns.append(Turn(_ROLES[role], string_at(content, said, place)))
    return turns


def written(turns: Sequence[Turn]) -> str:
    """Turns as one text that tells them from any others."""
    return json.dumps([turn._asdict() for turn in turns], ensure_ascii=False)


def asked(turns: Sequence[Turn]) -> str:
    """What the user says, as the router is shown a conversation."""
    return "\n".join(turn.content for turn in turns if turn.role == "user")
