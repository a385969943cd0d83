"""Figures of usage: a heat map of experts by layer for each text, and one of the divergence between texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from growlm.errors import ConfigError
from growlm.progress import phase
from growlm.usage.usage import Usage

_MIN_SCALE = 0.2  # nats that the darkest colour of a divergence stands for at least: noise is to look like noise


def usage_figure(usage: Usage) -> Figure:
    """Shares of choices, a row an expert router, a column an expert, one panel a text; then KL divergences (figure 2).
    A red line stands before the experts of a module that joined others; grey is where a layer has no such expert.

    Raises:
        ConfigError: there are no expert routers, only pools of experts by product keys, whose columns could not be told
            apart.
    """
    if not usage.places:
        raise ConfigError("a figure shows routed experts, and there are none; product keys are in the table and --json")
    names = list(usage.counts)
    several = len(names) > 1
    width = max(p.num_experts for p in usage.places)
    panels = len(names) + several
    figure = Figure(figsize=(2.2 + 2.8 * panels, 1.2 + 0.28 * len(usage.places)), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    labels = [
        p.name.replace("layer ", "").replace("feed-forward", "ff").replace("attention", "att") for p in usage.places
    ]
    for axis, name in zip(axes, names, strict=False):
        grid = np.full((len(usage.places), width), np.nan)
        for row, place in enumerate(usage.places):
            grid[row, : place.num_experts] = usage.share(name, row).numpy() * place.num_experts
        axis.set_facecolor("0.75")  # where a layer has no such expert
        image = axis.imshow(grid, aspect="auto", cmap="Blues", vmin=0, vmax=4)
        for row, place in enumerate(usage.places):
            if 0 < place.new < place.num_experts:  # a module's experts begin here
                first = place.num_experts - place.new - 0.5
                axis.plot([first, first], [row - 0.5, row + 0.5], color="tab:red", linewidth=1.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(name)
        axis.set_xlabel("expert")
        axis.set_yticks(range(len(labels)), labels if axis is axes[0] else [""] * len(labels), fontsize=7)
    bar = figure.colorbar(image, ax=list(axes[: len(names)]), shrink=0.8, extend="max")
    bar.set_label("times its even share")
    if several:
        table = np.array([[0.0 if a == b else usage.divergence(a, b) for b in names] for a in names])
        axis = axes[-1]
        scale = max(float(table.max()), _MIN_SCALE)
        axis.imshow(table, cmap="Oranges", vmin=0, vmax=scale)
        for i, j in np.ndindex(table.shape):
            dark = table[i, j] > 0.6 * scale
            axis.text(
                j, i, f"{table[i, j]:.3f}", ha="center", va="center", fontsize=8, color="white" if dark else "black"
            )
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_title("KL of row from column, nats")
    return figure


def write_usage(usage: Usage, path: Path) -> Path:
    """Writes the figure as its suffix says."""
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with phase("drawing the figure"):
        usage_figure(usage).savefig(path, dpi=130)
    return path
