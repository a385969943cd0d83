"""The report of an evaluation: one page that needs nothing but itself, with every number, and eval.json."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from growlm.errors import ConfigError, DataError, StoreError
from growlm.evaluation import plots
from growlm.evaluation.page import check_folder
from growlm.evaluation.report import FILE, write_report


def make_result(num_domains: int = 3, names: list[str] | None = None) -> dict[str, Any]:
    names = names or [f"domain-{i}" for i in range(num_domains)]
    sizes = {name: 1_000_000 + 7_919 * i for i, name in enumerate(names)}
    base, router = 24_000_000, 65_536
    return {
        "store": "brain",
        "base": "base/",
        "growlm": "0.1.0",
        "date": "2026-11-23",
        "perplexity": {
            name: {
                "base": 184.6 + i,
                "module": 70.4 + i,
                "routed": 70.9 + i,
                "routed_interval": [61.2 + i, 81.7 + i],
                "tokens": 12_345,
            }
            for i, name in enumerate(names)
        },
        "forgetting": 0.0,
        "forgetting_detail": {"checked": ["base", *names[:-1]], "changed": []},
        "routing": {
            "accuracy": 0.98,
            "accuracy_interval": [0.951, 0.997],
            "retained_gain": 0.991,
            "retained_gain_interval": None,
            "none": {"of_no_domain": 0.934, "of_domains": 0.017},
            "calibration": {
                "expected_error": 0.0321,
                "bins": [{"documents": 77, "confidence": 0.963, "accuracy": 0.942}],
            },
            "confusion": {
                name: {**dict.fromkeys(names, 0), name: 47 - i, names[0]: 40 + i, "none": 2}
                for i, name in enumerate(names)
            },
        },
        "matrix": {
            "domains": names,
            "before": [184.6] * len(names),
            "after": [[70.4 if i >= j else 171.3 for j in range(len(names))] for i in range(len(names))],
            "average_forgetting": 0.0125,
            "backward_transfer": -0.0125,
            "forward_transfer": 0.0747,
        },
        "compute": {
            "base_parameters": 6_000_001,
            "active_parameters": 6_500_002,
            "total_parameters": 7_500_003,
            "tokens_per_second": {"base": 5461.2, "module": 3451.4},
        },
        "memory": {
            "base_bytes": base,
            "router_bytes": router,
            "modules": sizes,
            "resident_bytes": base + router + max(sizes.values()),
            "total_bytes": base + router + sum(sizes.values()) + 4_096,
        },
        "samples": [{"domain": names[0], "prompt": "The heart", "text": " beats.", "module": names[0]}],
    }


class Page(HTMLParser):
    """Tags with their attributes, the cells of all tables, and the texts outside style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if self.open and {"td", "th"} & set(self.open):
            self.cells.append(data)


def write(result: dict[str, Any], folder: Path) -> tuple[str, Page]:
    path = write_report(result, folder)
    assert path == folder / "index.html"
    html = path.read_text("utf-8")
    return html, Page(html)


@pytest.mark.parametrize("num_domains", [1, 3, pytest.param(25, marks=pytest.mark.slow)])
def test_page_is_complete(tmp_path: Path, num_domains: int) -> None:
    result = make_result(num_domains)
    folder = tmp_path / "new" / "report"
    html, page = write(result, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["eval.json", "index.html"]
    assert json.loads((folder / "eval.json").read_text()) == result

    figures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(figures) == 5
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in figures)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        ElementTree.fromstring(svg)

    for name, row in result["perplexity"].items():
        assert name in page.cells
        assert {f"{row[key]:.1f}" for key in ("base", "module", "routed")} <= set(page.cells)
    for row in result["routing"]["confusion"].values():
        assert {str(count) for count in row.values()} <= set(page.cells)
    memory = result["memory"]
    sizes = [*memory["modules"].values(), *(memory[key] for key in memory if key != "modules"), 4_096]
    assert {f"{size:,}" for size in sizes} <= set(page.cells)
    assert {"171.3", "61.2 to 81.7", "6,500,002", "5,461"} <= set(page.cells) or len(result["perplexity"]) == 1
    facts = ("95.1% to 99.7%", "93.4%", "1.7%", "0.032", "96.3% sure, 94.2% right", "+0.0125", "-0.0125", "+0.0747")
    for fact in facts:
        assert fact in page.text
    for headline in ("98.0%", "99.1%", plots.human_bytes(memory["resident_bytes"])):
        assert headline in page.text


def test_page_is_self_contained(tmp_path: Path) -> None:
    html, page = write(make_result(), tmp_path)
    assert not re.search(r"https?:", html.replace('xmlns="http://www.w3.org/2000/svg"', ""))
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "@import" not in html
    links = [attributes.get("href") or attributes.get("src") for _, attributes in page.tags]
    assert all(link == "eval.json" or link.startswith("#") for link in links if link)
    assert all(target.startswith("#") for target in re.findall(r"url\((.)", html))
    assert "prefers-color-scheme: dark" in html


def test_every_text_is_escaped(tmp_path: Path) -> None:
    bold, odd = "<b>", "$x^2 & \"'{0} 名"
    result = make_result(names=[bold, odd, "a-name-of-more-than-twenty-two-letters"])
    result["samples"] = [{"domain": bold, "prompt": "<script>1</script>", "text": "</pre><i>"}]
    for key in ("store", "base", "date", "growlm"):
        result[key] = f"<u>{key}"
    html, page = write(result, tmp_path)
    tags = [tag for tag, _ in page.tags]
    assert not {"i", "u", "script"} & set(tags)
    assert tags.count("b") == tags.count("dt")  # the tiles' own, none from a name
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    assert {bold, odd} <= set(page.cells)
    assert "<script>1</script>" in page.text
    assert "</pre><i>" in page.text
    assert "answered with none" in page.text
    assert "<u>store" in page.text


def test_optional_parts_may_be_missing(tmp_path: Path) -> None:
    result = make_result()
    for key in ("memory", "samples", "forgetting_detail", "store", "matrix", "compute"):
        del result[key]
    html, page = write(result, tmp_path)
    assert html.count("<svg") == 2
    assert "Memory" not in page.text
    assert "Samples" not in page.text


def test_missing_numbers_are_dashes(tmp_path: Path) -> None:
    result = make_result(2)
    result["perplexity"]["domain-0"].update(base=math.inf, module=math.nan, routed=None)
    result["routing"] = {"accuracy": None, "retained_gain": None, "confusion": {"domain-0": {}}}
    _, page = write(result, tmp_path)
    assert {"∞", "–"} <= set(page.cells)


def test_unusable_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="perplexity"):
        write_report({}, tmp_path / "report")
    assert not (tmp_path / "report").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        write_report(make_result(1), tmp_path / "file")


def test_a_folder_with_what_a_kill_left_is_free(tmp_path: Path) -> None:
    for left in (".writable", "..writable-0a1b2c3d", ".eval.json-0a1b2c3d", ".index.html-0a1b2c3d"):
        (tmp_path / left).write_text("")
        check_folder(tmp_path, FILE)
    (tmp_path / ".eval.json-old").write_text("someone's own")
    with pytest.raises(ConfigError, match="holds something else than a report"):
        check_folder(tmp_path, FILE)


def test_failed_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(make_result(1), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(StoreError, match="no room to write"):
        write_report(make_result(2), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_same_result_gives_the_same_page(tmp_path: Path) -> None:
    first, _ = write(make_result(), tmp_path / "a")
    second, _ = write(make_result(), tmp_path / "b")
    assert first == second


def test_figures_leave_matplotlib_alone_and_fit_their_domains() -> None:
    settings = dict(matplotlib.rcParams)
    small, large = (make_result(n)["routing"]["confusion"] for n in (20, 40))
    figures = [plots.confusion_figure(confusion) for confusion in (small, large)]
    assert dict(matplotlib.rcParams) == settings
    assert len(figures[0].axes[0].texts) == 20 * 21
    assert not figures[1].axes[0].texts
    assert (figures[1].get_size_inches() > figures[0].get_size_inches()).all()


def test_perplexity_axis_is_logarithmic_only_when_values_are_far_apart() -> None:
    near = {name: {"base": base, "module": 9.0, "routed": 9.0} for name, base in (("a", 40.0), ("b", 60.0))}
    far = {**near, "c": {"base": 400.0, "module": 9.0, "routed": 9.0}}
    assert plots.perplexity_figure(near).axes[0].get_xscale() == "linear"
    axes = plots.perplexity_figure(far).axes[0]
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c", "b", "a"]


def test_growth_ends_at_the_stated_bytes() -> None:
    memory = {"base_bytes": 10, "router_bytes": 1, "modules": {"a": 3, "b": 5, "c": 2},
              "resident_bytes": 16, "total_bytes": 24}  # fmt: skip
    assert plots.growth(memory) == [(11, 14), (14, 17), (16, 22), (16, 24)]


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (1_234_000_000, "1.23 GB")])
def test_human_bytes(size: int, text: str) -> None:
    assert plots.human_bytes(size) == text
