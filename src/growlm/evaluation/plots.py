"""Plots: the figures of an evaluation, as matplotlib figures or SVG text.

Knows plain dictionaries of numbers. Does not know models, stores, files or pages. Uses no pyplot and leaves
matplotlib's settings as it found them. In SVG the colours are CSS variables, so a page can be light or dark.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from itertools import accumulate
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from growlm.evaluation.continual import row_names

# One colour per role. A role's hex is unique: `to_svg` finds the role by it.
LIGHT = {
    "surface": "#ffffff", "ink": "#1f2328", "muted": "#57606a", "grid": "#d8dee4", "heat": "#1c5cab",
    "base": "#8c959f", "module": "#1f6fd1", "router": "#d9601a", "other": "#c4ccd4",
}  # fmt: skip
DARK = {
    "surface": "#16191f", "ink": "#e6e9ee", "muted": "#9da7b3", "grid": "#343b44", "heat": "#6ea8f0",
    "base": "#7d8791", "module": "#5a9bf0", "router": "#f08a4b", "other": "#4a525c",
}  # fmt: skip
SETTINGS: Any = {
    "font.family": ["sans-serif"], "font.sans-serif": ["DejaVu Sans"], "font.size": 9.5, "text.usetex": False,
    "svg.fonttype": "none", "svg.hashsalt": "growlm", "text.color": LIGHT["ink"],
    "axes.facecolor": LIGHT["surface"], "axes.edgecolor": LIGHT["muted"], "axes.labelcolor": LIGHT["muted"],
    "axes.linewidth": 0.8, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "xtick.color": LIGHT["muted"], "xtick.labelcolor": LIGHT["muted"],
    "ytick.color": LIGHT["muted"], "ytick.labelcolor": LIGHT["ink"],
    "grid.color": LIGHT["grid"], "grid.linewidth": 0.8, "legend.frameon": False, "legend.fontsize": 9.5,
}  # fmt: skip
WIDTH = 396.0  # points; an SVG unit is a point
NO_MODULE = "none"  # the router's answer when no module fits
LOG_RATIO = 8  # perplexities further apart than this are drawn on a log axis
MAX_COUNTED_DOMAINS = 20  # above this the confusion cells carry no counts
HEAT_TEXT_SWITCH = 0.7  # from this share on a cell is dark enough for text in the surface's colour


def perplexity_figure(perplexity: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Per domain three bars: the base, the domain's own module, the module that the router chose; and their intervals.

    On a log axis bars start at 1, perfect prediction, so their length is the loss.
    """
    bars = (("base", "base", "base"), ("module", "module", "own module"), ("routed", "router", "routed"))
    domains = by_base(perplexity)
    values = [_finite(perplexity[domain].get(key)) for domain in domains for key, _, _ in bars]
    positive = [value for value in values if value > 0]
    log = bool(positive) and max(positive) / min(positive) > LOG_RATIO
    start = min([1.0, *positive]) if log else 0.0
    highs = [_finite(h) for d in domains for key, _, _ in bars for h in perplexity[d].get(f"{key}_interval") or ()]
    end = max([*positive, *highs], default=1.0)
    with _style():
        figure, axes = _new(WIDTH, 66 + 43 * max(1, len(domains)))
        for row, domain in enumerate(domains):
            for slot, (key, role, _) in enumerate(bars):
                value, y = perplexity[domain].get(key), row + (slot - 1) * 0.27
                width = max(0.0, _finite(value) - start)
                axes.barh(y, width, left=start, height=0.25, color=LIGHT[role], linewidth=0)
                reach = start + width
                if interval := perplexity[domain].get(f"{key}_interval"):
                    low, high = (max(start, _finite(end_)) for end_ in interval)
                    axes.plot([low, high], [y, y], color=LIGHT["ink"], linewidth=1.1, solid_capstyle="butt")
                    reach = max(reach, high)
                axes.annotate(number(value), (reach, y), (3, 0), textcoords="offset points",
                              va="center", fontsize=8.5)  # fmt: skip
        if log:
            axes.set_xscale("log")
            decades = math.log10(end / start)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.15g}"))
        axes.set_xlim(start, start * (end / start) ** 1.18 if log else end * 1.18)
        axes.set_ylim(len(domains) - 0.5, -0.5)
        axes.set_yticks(range(len(domains)), labels=[_label(d) for d in domains], parse_math=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("perplexity, log axis" if log else "perplexity")
        axes.grid(axis="x")
        _legend(figure, [Patch(color=LIGHT[role], label=label) for _, role, label in bars])
    return figure


def confusion_figure(confusion: Mapping[str, Mapping[str, int]]) -> Figure:
    """Heat map of true domain (rows) against chosen module (columns); colour is the share of the row."""
    rows, columns = confusion_axes(confusion)
    counted = max(len(rows), len(columns) - 1) <= MAX_COUNTED_DOMAINS
    cell = max(24.0 if counted else 17.0, min(46.0, 300 / len(columns)))
    labels = [_label(name) for name in columns]
    margin = 30 + 5.8 * max(len(label) for label in labels)  # room for the longest label
    with _style():
        figure, axes = _new(max(WIDTH, margin + 20 + cell * len(columns)), margin + 40 + cell * len(rows))
        for y, row in enumerate(rows):
            total = sum(confusion[row].values())
            for x, column in enumerate(columns):
                count = confusion[row].get(column, 0)
                share = count / total if total else 0.0
                if count:
                    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=(LIGHT["heat"], share)))
                if counted:
                    colour = "muted" if not count else "surface" if share >= HEAT_TEXT_SWITCH else "ink"
                    axes.text(x, y, str(count), ha="center", va="center", color=LIGHT[colour])
        _grid(axes, len(columns), len(rows))
        axes.set_xticks(range(len(columns)), labels=labels, rotation=90, parse_math=False)
        axes.set_yticks(range(len(rows)), labels=[_label(name) for name in rows], parse_math=False)
        axes.set_xlabel("chosen by the router")
        axes.set_ylabel("true domain")
        key = [Patch(facecolor=(LIGHT["heat"], s), edgecolor=LIGHT["grid"], label=f"{s:.0%}")
               for s in (0.0, 0.25, 0.5, 0.75, 1.0)]  # fmt: skip
        _legend(figure, key, "outside lower center")
    return figure


def matrix_figure(matrix: Mapping[str, Any]) -> Figure:
    """Heat map: what was measured (rows: before, then after each domain learned) on each domain (columns).

    Colour is the share of the column's largest fall in log-perplexity: the fuller, the better.
    """
    columns = list(matrix["domains"])
    rows = ["before", *row_names(matrix)]
    values = [matrix["before"], *matrix["after"]]
    cell_width, cell_height = max(40.0, min(58.0, 300 / len(columns))), 24.0
    margin = 20 + 5.8 * max(len(_label(name)) for name in rows)
    with _style():
        figure, axes = _new(max(WIDTH, margin + cell_width * len(columns)), margin + 30 + cell_height * len(rows))
        for x in range(len(columns)):
            logs = [math.log(max(_finite(row[x]), 1.0)) if _finite(row[x]) else math.nan for row in values]
            fall = logs[0] - min((loss for loss in logs if math.isfinite(loss)), default=math.nan)
            for y, loss in enumerate(logs):
                # A loss that is no number has no colour.
                share = max(0.0, (logs[0] - loss) / fall) if fall > 0 and math.isfinite(loss) else 0.0
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=(LIGHT["heat"], share)))
                colour = "surface" if share >= HEAT_TEXT_SWITCH else "ink"
                axes.text(x, y, number(values[y][x]), ha="center", va="center", color=LIGHT[colour], fontsize=8.5)
        _grid(axes, len(columns), len(rows))
        axes.set_xticks(range(len(columns)), labels=[_label(c) for c in columns], rotation=90, parse_math=False)
        axes.set_yticks(range(len(rows)), labels=[_label(r) for r in rows], parse_math=False)
        axes.set_xlabel("perplexity on")
    return figure


def _grid(axes: Axes, columns: int, rows: int) -> None:
    """Cells around whole numbers, column labels on top."""
    for line in range(columns + 1):
        axes.axvline(line - 0.5, color=LIGHT["grid"], linewidth=0.6)
    for line in range(rows + 1):
        axes.axhline(line - 0.5, color=LIGHT["grid"], linewidth=0.6)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelcolor=LIGHT["ink"])
    axes.spines[:].set_visible(False)
    axes.xaxis.set_label_position("top")


def memory_figure(memory: Mapping[str, Any]) -> Figure:
    """Two stacked bars: what is resident (base, router, the largest module) and everything on disk."""
    modules = sorted(memory["modules"].values(), reverse=True)
    base, router = memory["base_bytes"], memory["router_bytes"]
    stacks = [
        [("base", base), ("router", router), *(("module", size) for size in modules[:1])],
        [("base", base), ("router", router), *(("module", size) for size in modules)],
    ]
    totals = [memory["resident_bytes"], memory["total_bytes"]]
    for stack, total in zip(stacks, totals, strict=True):
        if (rest := total - sum(size for _, size in stack)) > 0:
            stack.append(("other", rest))  # older versions of modules, manifests
    with _style():
        figure, axes = _new(WIDTH, 140)
        for y, (stack, total) in enumerate(zip(stacks, totals, strict=True)):
            left = 0
            for role, size in stack:
                axes.barh(y, size, left=left, height=0.6, color=LIGHT[role],
                          edgecolor=LIGHT["surface"], linewidth=0.5)  # fmt: skip
                left += size
            axes.annotate(human_bytes(total), (left, y), (4, 0), textcoords="offset points", va="center")
        longest = max(1, *totals, *(sum(size for _, size in stack) for stack in stacks))
        axes.set_xlim(0, longest * 1.2)
        axes.set_ylim(1.5, -0.5)
        axes.set_yticks([0, 1], labels=["resident", "total"])
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human_bytes(x)))
        axes.grid(axis="x")
        used = {role for stack in stacks for role, _ in stack}
        names = {"base": "base", "router": "router", "module": "modules", "other": "other files"}
        _legend(figure, [Patch(color=LIGHT[r], label=label) for r, label in names.items() if r in used])
    return figure


def growth_figure(memory: Mapping[str, Any]) -> Figure:
    """Resident against total bytes as the modules are added one by one, in the order of `growth`."""
    so_far = growth(memory)
    lines = (("resident", "module", "-", "o"), ("total", "muted", "--", "s"))
    with _style():
        figure, axes = _new(WIDTH, 210)
        handles = []
        for which, (name, role, dash, marker) in enumerate(lines):
            sizes = [pair[which] for pair in so_far]
            style: dict[str, Any] = {
                "color": LIGHT[role], "linestyle": dash, "marker": marker, "markersize": 3.5,
                "label": f"{name}: {human_bytes(sizes[-1])}",
            }  # fmt: skip
            axes.plot(range(len(sizes)), sizes, clip_on=False, zorder=3 - which, **style)
            handles.append(Line2D([], [], **style))
        axes.set_xlim(0, max(1, len(so_far) - 1))
        axes.set_ylim(0, max(1, *(max(pair) for pair in so_far)) * 1.08)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: human_bytes(y)))
        axes.tick_params(axis="y", length=0, labelcolor=LIGHT["muted"])
        axes.set_xlabel("modules added")
        axes.grid(axis="y")
        _legend(figure, handles)
    return figure


def losses_figure(history: Sequence[Mapping[str, Any]], scores: Mapping[int, float], best: int | None) -> Figure:
    """Loss by step: of the text that each step trained on, smoothed, and of held-out text where it was scored.

    Args:
        history: a mapping a step, with `step` and `loss`.
        scores: held-out loss by steps done.
        best: the step that was kept.
    """
    steps = [line["step"] for line in history]
    losses = [_finite(line["loss"]) for line in history]
    near = max(len(losses) // 15, 1)  # steps that a point is the mean of
    smooth = [sum(part) / len(part) for at in range(len(losses)) if (part := losses[max(at - near + 1, 0) : at + 1])]
    with _style():
        figure, axes = _new(WIDTH, 230)
        axes.plot(steps, losses, color=LIGHT["other"], linewidth=0.7)
        axes.plot(steps, smooth, color=LIGHT["base"], linewidth=1.4)
        held = sorted(scores)
        axes.plot(held, [scores[s] for s in held], color=LIGHT["module"], marker="o", markersize=3.5, clip_on=False)
        if best is not None and best in scores:
            axes.plot([best], [scores[best]], color=LIGHT["router"], marker="o", markersize=6, clip_on=False, zorder=4)
        # A few large losses at the beginning would leave no room for the rest.
        shown = sorted([*smooth, *scores.values()])
        top, bottom = shown[min(int(0.98 * len(shown)), len(shown) - 1)], shown[0]
        top = max(top, scores.get(0, top))  # where training began
        room = 0.08 * (top - bottom) or 0.1
        axes.set_ylim(bottom - room, top + room)
        axes.set_xlim(0, max([*steps, *scores]))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(axis="y", length=0, labelcolor=LIGHT["muted"])
        axes.set_xlabel("steps")
        axes.set_ylabel("loss, nats a token")
        axes.grid(axis="y")
        kinds: Any = (("base", "trained on", "-", ""), ("module", "held out", "-", "o"), ("router", "kept", "", "o"))
        _legend(
            figure,
            [Line2D([], [], color=LIGHT[r], linestyle=dash, marker=m, label=label) for r, label, dash, m in kinds],
        )
    return figure


def by_base(perplexity: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The domains, the base's highest perplexity first."""
    return sorted(perplexity, key=lambda domain: -_finite(perplexity[domain].get("base")))


def growth(memory: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(resident, total) bytes with 0, 1, 2, ... modules in the order of `memory["modules"]`.

    The last pair is exactly `resident_bytes` and `total_bytes`; the router is counted at its present size.
    """
    sizes = [0, *memory["modules"].values()]
    before_resident = memory["resident_bytes"] - max(sizes)
    before_total = memory["total_bytes"] - sum(sizes)
    largest, added = accumulate(sizes, max), accumulate(sizes)
    return [(before_resident + big, before_total + all_) for big, all_ in zip(largest, added, strict=True)]


def confusion_axes(confusion: Mapping[str, Mapping[str, int]]) -> tuple[list[str], list[str]]:
    """Rows (true domains) and columns (chosen modules), rows in their given order, "none" last in both."""
    rows = sorted(confusion, key=lambda name: name == NO_MODULE)  # stable: only "none" moves
    chosen = {name for row in confusion.values() for name in row}
    known = [name for name in rows if name != NO_MODULE]
    return rows, [*known, *sorted(chosen - {*known, NO_MODULE}), NO_MODULE]


def to_svg(figure: Figure, name: str, alt: str) -> str:
    """The figure as one `<svg>` element that can share a page with others.

    `name` prefixes every id, so it is unique on the page; `alt` is what a screen reader says.
    """
    assert re.fullmatch(r"[a-z][a-z0-9-]*", name), name
    text = io.StringIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with _style():
        figure.savefig(text, format="svg", transparent=True, metadata=empty)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    roles = {colour: f"var(--{role}, {colour})" for role, colour in LIGHT.items()}

    def inside_page(tag: re.Match[str]) -> str:  # only tags: matplotlib escapes < and > in texts
        out = re.sub(r'\bid="', f'id="{name}-', tag[0])
        out = re.sub(r"url\(#", f"url(#{name}-", out)
        out = re.sub(r'xlink:href="#', f'href="#{name}-', out)
        return re.sub(r"#[0-9a-f]{6}\b", lambda hex_: roles.get(hex_[0], hex_[0]), out)

    svg = re.sub(r"<[^>]+>", inside_page, svg)
    width, height = (72 * inches for inches in figure.get_size_inches())
    root = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(alt)}" stroke-linejoin="round" width="{width * 1.2:.0f}" '
        f'style="min-width: {width * 0.8:.0f}px">'
    )
    return root + svg[svg.index(">") + 1 :].strip()


def number(value: Any) -> str:
    """A perplexity as a reader wants it: 9.87, 184.6, 12,346. A dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def human_bytes(size: float) -> str:
    """Bytes in decimal units with three digits: 999 B, 1.23 MB, 45.6 GB."""
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    while abs(size) >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        # Names may use scripts that matplotlib's font lacks. In SVG the reader's browser draws them.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield


def _new(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Figure, handles: Sequence[Any], place: Any = "outside upper center") -> None:
    figure.legend(handles=handles, loc=place, ncols=len(handles), handlelength=1.2, columnspacing=1.4)


def _label(name: str, limit: int = 22) -> str:
    name = " ".join(name.split())
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _finite(value: Any) -> float:
    return float(value) if value is not None and math.isfinite(value) else 0.0
