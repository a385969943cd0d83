"""Learning report: one learned module as a page, with the loss of every step in a file of JSON lines beside it.

Knows what `learn` gives back. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from growlm.evaluation import page, plots
from growlm.progress import phase
from growlm.training.history import FILE, lines
from growlm.training.learn import LearnResult


def write_learning_report(result: LearnResult, out_dir: Path) -> Path:
    """Writes `index.html` and `losses.jsonl` into `out_dir`, made if needed, and returns the page's path.

    Raises ConfigError when `out_dir` cannot be written, and StoreError when its disk is full.
    """
    with phase("drawing the report"):
        drawn = page.page(f"growlm: {result.name} version {result.version}", _body(result), FILE)
    return page.write(out_dir, drawn, {FILE: lines(result.history)})


def _body(result: LearnResult) -> list[str]:
    head, *rows = result.table()
    texts = "" if result.texts is None else f" of {result.texts} held-out texts"
    body = [
        f"<header><h1>{escape(result.name)} <small>version {result.version}</small></h1></header>",
        page.section(
            "Base and module",
            f"How surprised each is by the beginnings{texts} that neither trained the module nor chose its rate or its "
            "last step. Lower is better.",
            [],
            page.table("On held-out text", head, rows),
        ),
    ]
    if result.history:
        body.append(_training(result))
    return [*body, _samples(result)] if result.samples else body


def _training(result: LearnResult) -> str:
    scores = {int(step): loss for step, loss in result.validation.items()}
    figure = plots.losses_figure(result.history, scores, result.best_step)
    alt = f"Two lines over {len(result.history)} steps: the loss of each step and of held-out text"
    rows = [[f"{step:,}", f"{loss:.4f}"] for step, loss in sorted(scores.items())]
    kept = "" if result.best_step is None else f" What was kept is the module after step {result.best_step:,}."
    text = (
        "The loss of every step on the text that it trained on, before its change, and at some steps that of other "
        "text, which is not trained on and chooses rate and step. Where documents are alike the first is lower from "
        f"the beginning: a row that is trained on holds several, and a held-out text stands alone.{kept} Peak learning "
        f"rate {result.learning_rate:.2g}; {result.tokens:,} tokens in {result.seconds:,.0f} s. All are in {FILE}."
    )
    table = page.table("Loss of text that chooses the step", ["after step", "loss"], rows)
    return page.section("Training", text, [page.svg(figure, "losses", alt)], table)


def _samples(result: LearnResult) -> str:
    items = "".join(_sample(number, sample.to_json()) for number, sample in enumerate(result.samples, 1))
    text = "Beginnings of held-out text, and how it goes on: in the text itself, written by the base, by the module."
    return f"<section><h2>Samples</h2><p>{text}</p>{items}</section>"


def _sample(number: int, sample: Mapping[str, Any]) -> str:
    parts = "".join(
        f"<h3><small>{name}</small></h3><pre>{escape(sample[key])}</pre>"
        for key, name in (("text", "the text"), ("base", "base"), ("module", "module"))
    )
    return f'<article><h3>Prompt {number}</h3><pre class="prompt">{escape(sample["prompt"])}</pre>{parts}</article>'
