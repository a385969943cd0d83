"""Report: one evaluation result as a self-contained web page and a JSON file.

Knows the dictionary that `growlm eval --json` prints. Does not know models or stores, and measures nothing.
Names and texts in a result come from users: each is escaped, and the page forbids itself to load anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from growlm.errors import DataError
from growlm.evaluation import page, plots
from growlm.evaluation.continual import row_names
from growlm.evaluation.plots import human_bytes, number
from growlm.evaluation.summary import NONE_SHARES
from growlm.progress import phase

FILE = "eval.json"  # the numbers, beside the page


def write_report(result: dict[str, Any], out_dir: Path) -> Path:
    """Write `index.html` and `eval.json` into `out_dir`, made if needed, and return the page's path.

    Both files are replaced whole, the page last, so a page always has its numbers beside it.

    Raises DataError when `result` holds no perplexity, ConfigError when `out_dir` cannot be written, and StoreError
    when its disk is full.
    """
    if not result.get("perplexity"):
        raise DataError('report: the result holds no "perplexity"; give it what `growlm eval --json` prints')
    numbers = json.dumps(result, indent=2) + "\n"
    with phase("drawing the report"):
        drawn = _page(result)
    return page.write(out_dir, drawn, {FILE: numbers})


def _page(result: Mapping[str, Any]) -> str:
    store = result.get("store")
    title = f"growlm evaluation: {store}" if store else "growlm evaluation"
    facts = {"base": "base: ", "date": "", "growlm": "growlm "}
    known = " · ".join(label + escape(str(result[key])) for key, label in facts.items() if result.get(key))
    header = f"<header><h1>{escape(title)}</h1><p>{known}</p></header>"
    body = [header, _tiles(result), _perplexity(result["perplexity"])]
    sections: dict[str, Callable[[Any], str]] = {
        "routing": _routing, "forgetting_detail": _forgetting, "matrix": _matrix, "memory": _memory,
        "compute": _compute, "samples": _samples,
    }  # fmt: skip
    body += [section(result[key]) for key, section in sections.items() if result.get(key)]
    return page.page(title, body, FILE)


def _tiles(result: Mapping[str, Any]) -> str:
    perplexity, routing = result["perplexity"], result.get("routing") or {}
    forgetting, detail = result.get("forgetting"), result.get("forgetting_detail")
    # Text that belongs to no module is there for the router: no module is meant to lower its perplexity.
    learned = [row for name, row in perplexity.items() if name != "none"]
    own, routed = (_mean(_reduction(row, key) for row in learned) for key in ("module", "routed"))
    tiles = [
        ("mean perplexity reduction", _percent(routed),
         f"over {_count(len(learned), 'domain')}, routed; with each domain's own module {_percent(own)}"),
        ("retained gain", _percent(routing.get("retained_gain")),
         "share of the improvement of each domain's own module that automatic routing keeps" + _none_cost(routing)),
        ("router accuracy", _percent(routing.get("accuracy")),
         "share of documents sent to the module of their own domain"),
        ("forgetting", "–" if forgetting is None else f"{forgetting:.3g}",
         _checked(detail) if detail else "the most that a part's loss rose; 0 means that nothing changed"),
    ]  # fmt: skip
    if memory := result.get("memory"):
        note = f"of {human_bytes(memory['total_bytes'])} in total: base, router and one module at a time"
        tiles.append(("resident memory", human_bytes(memory["resident_bytes"]), note))
    items = (f"<div><dt>{escape(name)}</dt><dd><b>{escape(value)}</b><span>{escape(note)}</span></dd></div>"
             for name, value, note in tiles)  # fmt: skip
    return f'<dl class="tiles">{"".join(items)}</dl>'


def _perplexity(perplexity: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["domain", "base", "own module", "routed", "95 % interval", "reduction", "gain kept", "tokens", "documents"]
    rows = []
    for name in plots.by_base(perplexity):
        row = perplexity[name]
        values = [number(row.get(key)) for key in ("base", "module", "routed")]
        counts = [_integer(row.get(key)) for key in ("tokens", "documents")]
        interval = _span(row.get("routed_interval"), number)
        rows.append(
            [name, *values, interval, _percent(_reduction(row, "routed")), _percent(row.get("retained_gain")), *counts]
        )
    alt = f"Bars of perplexity for {_count(len(rows), 'domain')}: base, own module and routed"
    figure = page.svg(plots.perplexity_figure(perplexity), "perplexity", alt)
    text = (
        "How surprised the model is by held-out text of each domain. Lower is better. Grey is the base. "
        "Blue is the base with the domain's own module, orange with the module that the router chose. Where "
        "orange is as short as blue, routing costs nothing. On a log axis a bar starts at 1, perfect "
        "prediction, and its length is the loss. The thin lines are 95 % intervals by bootstrap over documents. "
        "Reduction compares routed with base."
    )
    return page.section("Perplexity per domain", text, [figure], page.table("Perplexity per domain", head, rows))


def _routing(routing: Mapping[str, Any]) -> str:
    if not (confusion := routing.get("confusion")):
        return ""
    rows, columns = plots.confusion_axes(confusion)
    cells = []
    for name in rows:
        row = confusion[name]
        total = sum(row.values())
        right = row.get(name, 0) / total if total else None
        cells.append([name, _percent(right), *(_integer(row.get(column, 0)) for column in columns)])
    alt = f"Heat map of the modules that the router chose for documents of {_count(len(rows), 'domain')}"
    figure = page.svg(plots.confusion_figure(confusion), "confusion", alt)
    text = (
        "Each row is a true domain, each column the module that the router chose for its documents. The "
        "fuller a cell's colour, the larger its share of the row. A perfect router fills the diagonal only. "
        "“none” means that the router found no module that fits, and the base answered alone. Retained gain: "
        "share of the improvement of each domain's own module that automatic routing keeps, summed log-loss "
        "over the domains' documents; what wrong choices cost text of no domain is listed apart. A wrong choice "
        "between two similar modules costs accuracy, but little gain."
    )
    table = page.table("Documents by true domain and chosen module", ["true domain", "right", *columns], cells)
    facts = [
        f"{label}: {_percent(routing.get(key))}, 95 % interval {_span(routing.get(f'{key}_interval'), _percent)}"
        for label, key in (("accuracy", "accuracy"), ("retained gain", "retained_gain"))
    ]
    if (cost := routing.get("none_cost")) is not None:
        span = _span(routing.get("none_cost_interval"), _nats)
        facts.append(f"cost of routing on text of no domain: {_nats(cost)} nats a token, 95 % interval {span}")
    facts += [
        f"none for {what}: {_percent(routing['none'][key])}"
        for key, what in NONE_SHARES if key in routing.get("none", {})
    ]  # fmt: skip
    if calibration := routing.get("calibration"):
        bins = ", ".join(
            f"{_percent(b['confidence'])} sure, {_percent(b['accuracy'])} right ({_count(b['documents'], 'document')})"
            for b in calibration["bins"]
        )
        facts.append(f"expected calibration error: {calibration['expected_error']:.3f} ({bins})")
    listed = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return page.section("Router", text, [figure], f"{table}<ul>{listed}</ul>")


def _forgetting(detail: Mapping[str, Sequence[str]]) -> str:
    changed = set(detail.get("changed", ()))
    same = [name for name in detail.get("checked", ()) if name not in changed]
    listed = [("identical", same), ("changed", sorted(changed))]
    if unknown := detail.get("not_comparable"):
        listed.append(("not compared, because the loss was no number then or is none now", list(unknown)))
    items = "".join(f"<li>{state}: {escape(', '.join(names) or '–')}</li>" for state, names in listed)
    text = (
        f"What base and modules answered when each module was learned, and what they answer now: {_checked(detail)}. "
        "The number above is the largest increase of a loss, in nats a token, among the parts that changed."
    )
    return f"<section><h2>Forgetting</h2><p>{escape(text)}</p><ul>{items}</ul></section>"


def _matrix(matrix: Mapping[str, Any]) -> str:
    domains = matrix["domains"]
    rows = [["before", *map(number, matrix["before"])]]
    rows += [[name, *map(number, row)] for name, row in zip(row_names(matrix), matrix["after"], strict=True)]
    measures = ", ".join(
        f"{text} {_nats(matrix[key])}"
        for text, key in (("average forgetting", "average_forgetting"), ("backward transfer", "backward_transfer"),
                          ("forward transfer", "forward_transfer"))
    )  # fmt: skip
    text = (
        "Perplexity on each domain (column) with what the store knew after each domain (row), in the order of "
        "learning, routed. A column should fall once, at its own row, and stay: every row is of the modules' present "
        f"versions, so what can still change is the router's choice.{_updated(matrix)} In nats a token: {measures}."
    )
    figure = page.svg(
        plots.matrix_figure(matrix), "matrix", f"Heat map of perplexity on {_count(len(domains), 'domain')}"
    )
    return page.section("Learning one after another", text, [figure], page.table("Perplexity", ["", *domains], rows))


def _memory(memory: Mapping[str, Any]) -> str:
    so_far = plots.growth(memory)
    other = so_far[0][1] - memory["base_bytes"] - memory["router_bytes"]
    parts = [
        ["base", *_sizes(memory["base_bytes"]), "", ""],
        ["router", *_sizes(memory["router_bytes"]), *map(human_bytes, so_far[0])],
        *([name, *_sizes(size), *map(human_bytes, pair)]
          for (name, size), pair in zip(memory["modules"].items(), so_far[1:], strict=True)),
        *([["other files", *_sizes(other), "", ""]] if other > 0 else []),
        ["resident", *_sizes(memory["resident_bytes"]), "", ""],
        ["total", *_sizes(memory["total_bytes"]), "", ""],
    ]  # fmt: skip
    resident, total = human_bytes(memory["resident_bytes"]), human_bytes(memory["total_bytes"])
    ends = f"resident {resident}, total {total}"
    bars = page.svg(plots.memory_figure(memory), "memory", f"Two stacked bars: {ends}")
    added = f"with {_count(len(so_far) - 1, 'module')} added"
    lines = page.svg(plots.growth_figure(memory), "growth", f"Two lines, {added}: {ends}")
    text = (
        "Resident is what must be in memory to answer: base, router and the largest module. Total is "
        "all weights on disk. The lines show both as modules are added one by one, in the table's order. "
        "Total grows with every module, resident only when a module is larger than all before it."
    )
    head = ["part", "size", "bytes", "resident so far", "total so far"]
    return page.section("Memory", text, [bars, lines], page.table("Bytes per part", head, parts))


def _compute(compute: Mapping[str, Any]) -> str:
    speed = compute["tokens_per_second"]
    names = {"base": "base", "active": "active for a prompt, at most", "total": "in total"}
    rows = [[name, _integer(compute[f"{key}_parameters"])] for key, name in names.items()]
    rows += [[f"tokens a second while scoring, {name}", f"{value:,.0f}"] for name, value in speed.items()]
    text = "What a prompt costs: parameters that take part, and how fast this machine scored the text above."
    return page.section("Compute", text, [], page.table("Parameters and speed", ["", "number"], rows))


def _samples(samples: Iterable[Mapping[str, Any]]) -> str:
    items = []
    for sample in samples:
        domain, module = sample.get("domain"), sample.get("module") or plots.NO_MODULE
        items.append(
            f"<article><h3>{escape(str(domain))} <small>answered with {escape(str(module))}</small></h3>"
            f'<pre class="prompt">{escape(str(sample.get("prompt", "")))}</pre>'
            f"<pre>{escape(str(sample.get('text', '')))}</pre></article>"
        )
    text = "A prompt of each domain, and how the model went on with the module that the router chose."
    return f"<section><h2>Samples</h2><p>{text}</p>{''.join(items)}</section>"


def _reduction(row: Mapping[str, Any], key: str) -> float | None:
    base, value = row.get("base"), row.get(key)
    return None if not base or value is None else 1 - value / base


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _none_cost(routing: Mapping[str, Any]) -> str:
    cost = routing.get("none_cost")
    return "" if cost is None else f"; text of no domain loses {_nats(cost)} nats a token"


def _updated(matrix: Mapping[str, Any]) -> str:
    names = matrix.get("updated")
    return f" Updated since, and shown as they are today: {', '.join(names)}." if names else ""


def _checked(detail: Mapping[str, Sequence[str]]) -> str:
    checked, changed = len(detail.get("checked", ())), len(detail.get("changed", ()))
    return f"{_count(checked, 'part')} compared bit for bit, {changed or 'none'} changed"


def _span(interval: Sequence[float] | None, form: Callable[[Any], str]) -> str:
    return "–" if interval is None else f"{form(interval[0])} to {form(interval[1])}"


def _nats(difference: float | None) -> str:
    return "–" if difference is None or not math.isfinite(difference) else f"{difference:+.4f}"


def _percent(share: float | None) -> str:
    return "–" if share is None or not math.isfinite(share) else f"{share:.1%}"


def _integer(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _sizes(size: int) -> tuple[str, str]:
    return human_bytes(size), f"{size:,}"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
