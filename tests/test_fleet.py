"""The simulation of many engines: every request is answered, wherever it goes, and rules do what they say."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np

from benchmarks.speed import fleet


def test_every_request_is_answered_under_every_rule(tmp_path, capsys):
    fleet.main(
        [
            "--out",
            str(tmp_path),
            "--modules",
            "60",
            "--engines",
            "4",
            "--requests",
            "150",
            "--room",
            "4",
            "--batch",
            "2",
        ]
    )
    found = json.loads((tmp_path / "fleet.json").read_text())
    assert found.pop("settings")["modules"] == 60
    assert list(found) == ["hash", "two choices", "bounded", "popularity", "least loaded"]
    for one in found.values():
        middle, late = one["first token, s, p50 and p99"]
        assert 0.15 <= middle <= late <= one["longest wait, s"] + 0.01
        assert 0 < one["hit rate"] < 1
    assert found["hash"]["busiest engine over the mean"] > found["least loaded"]["busiest engine over the mean"]


def test_the_most_wanted_modules_are_dealt_to_several_engines_and_all_to_some():
    class Node:
        def __init__(self) -> None:
            self.to_do = 0

    shares = np.array([0.5, 0.2, *[0.03] * 10])
    nodes, rule = [Node() for _ in range(8)], fleet.by_popularity(shares, 8)
    counts: Counter[int] = Counter()
    for module in [0] * 64 + list(range(1, 12)):
        node = rule(nodes, module)
        node.to_do += 1
        counts[nodes.index(node)] += module == 0
    assert sum(count > 0 for count in counts.values()) == 8  # half of all requests are too much for seven of eight
    assert len(fleet.preferred(7, 8)) == len(set(fleet.preferred(7, 8))) == 8
