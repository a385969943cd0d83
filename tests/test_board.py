"""Board: one table on a terminal, of a log a line now and then."""

from __future__ import annotations

import io
import re
import sys

import pytest

from growlm import progress
from growlm.cluster.board import Board


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_says_what_each_module_is_at(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with Board(["law", "tax", "medicine"]) as board:
        board.tell("tax", "tax: training: 40% (4 of 10 steps)")
        board.end("law", "done", "after 3 s: held-out loss 4.000 -> 3.000")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    last = plain.rsplit("module", 1)[1].replace("\r", "\n")
    rows = [line.split() for line in last.splitlines()]
    assert [row[:2] for row in rows if row[:1] in (["tax"], ["law"], ["medicine"])] == [
        ["tax", "learns"], ["law", "done"], ["medicine", "waits"],
    ]  # fmt: skip
    assert "training: 40% (4 of 10 steps)" in last


def test_a_long_table_says_how_many_more_there_are(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Board([f"module-{number}" for number in range(100)]):
        pass
    assert "and 76 more" in terminal.getvalue()


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 2), (1000.0, 0)])
def test_a_log_has_a_line_now_and_then_and_one_for_each_end(monkeypatch, capsys, seconds, lines):
    monkeypatch.setattr(progress, "_LOG_SECONDS", seconds)
    with Board(["law", "tax"]) as board:
        board.tell("law", "law: training: 10%")
        board.tell("law", "law: training: 20%")
        board.end("law", "failed", "after 1 s: too short")
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "law: failed: after 1 s: too short"
    assert said[:-1] == [f"1 learns, 1 waits; law: training: {share}%" for share in (10, 20)][:lines]
