"""Progress: a bar on a terminal, a line now and then in a log, and nothing where it was not wanted."""

from __future__ import annotations

import pytest

from growlm.training import progress
from growlm.training.loop import StepReport
from growlm.training.progress import training_bar


@pytest.mark.parametrize(("show", "lines"), [(None, 2), (False, 0)])
def test_a_log_gets_a_line_at_times(monkeypatch, capsys, show, lines):
    now = iter(range(0, 1000, 20))  # seconds
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    with training_bar("law", show) as report:
        for step in range(1, 4):
            report(StepReport(step, 9, 3.5, 1000 * step, 1.0 * step))
    found = capsys.readouterr().err.splitlines()
    assert len(found) <= lines
    if lines:
        assert found[0].startswith("law: step ")
        assert "of 9  loss 3.500  1,000 tokens/s" in found[0]
