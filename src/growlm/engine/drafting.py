"""Drafting: an answer tried as a module's text goes on, and checked in one pass (suffix decoding, Oliaro et al. 2024).

A pass over several tokens of one text costs little more than one over a single token, and whoever recalls a text often
goes on as it does. What is drawn is drawn from the same logits with the same generator as without drafts, so that an
answer stays what it was. Knows texts and counts; runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from growlm.recall.memory import Memory
from growlm.recall.suffixes import LONGEST

MOST = 16  # drafts of one text in a pass
_FIRST = 4
_LEAST = 4  # tokens that must agree: fewer do by chance
_LONGEST_PAUSE = 64


class Drafter:
    """Drafts for one answer: more where they were right, none for a while where not, and for longer each time."""

    def __init__(self) -> None:
        self._most, self._pause, self._waiting = _FIRST, 1, 0

    def propose(self, memories: Sequence[Memory], text: Sequence[int], room: int) -> list[int]:
        """What one of the memories' texts goes on with after the newest tokens of `text`: no more tokens than there is
        room for, than were right lately, nor than agree with it."""
        if self._waiting:
            self._waiting -= 1
            return []
        newest = text[-LONGEST:][::-1]
        contexts = np.full((1, LONGEST), -1, dtype=np.int64)
        contexts[0, : len(newest)] = newest
        best: tuple[int, list[int]] = (_LEAST - 1, [])
        for memory in memories:
            assert memory.text is not None
            agreeing, following = memory.text.following(contexts, min(self._most, room))
            best = max(best, (agreeing, following), key=lambda found: found[0])
        agreeing, following = best
        return following[:agreeing]

    def learn(self, tried: int, right: int) -> None:
        """Takes in how many of the drafts of a pass were right."""
        if not tried:
            return
        if right == tried:
            self._most = min(2 * self._most, MOST)
        elif 2 * right < tried:
            self._most = max(self._most // 2, 1)
        if right:
            self._pause = 1
        else:
            self._waiting = self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
