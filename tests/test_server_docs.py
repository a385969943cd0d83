"""What the docs say of a server is what it tells."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from servers import serving
from stores import make_store

SERVING = Path(__file__).parents[1] / "docs" / "serving"

pytestmark = pytest.mark.usefixtures("one_thread")


def test_alerts_and_dashboard_ask_for_what_is_measured(tmp_path):
    make_store(tmp_path, "llama", {"letters": {"kind": "lora", "r": 4}})
    with serving(tmp_path / "store", engine={"memory": "64MB"}) as served:
        assert served.post("/v1/completions", prompt="abc", model="letters", max_tokens=3).status_code == 200
        told = set(re.findall(r"^(growlm_\w+)", served.http.get("/metrics").text, re.MULTILINE))
    dashboard = json.loads((SERVING / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked.append((SERVING / "prometheus-rules.yml").read_text())
    names = {name for text in asked for name in re.findall(r"growlm_\w+", text)}
    assert len(names) > 10
    assert names <= told
