"""growlm learn-all."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from growlm.cli.app import app
from growlm.cli.asking import open_store
from growlm.cli.options import Json, StorePath
from growlm.cli.output import note, print_json, reports

if TYPE_CHECKING:
    from growlm.cluster.learning import Outcome


@app.command("learn-all")
@reports("store", long=True)
def learn_all(
    store: StorePath,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="YAML: modules, data, settings.", show_default=False)],
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", metavar="ADDRESS", help="Learn as tasks of this Ray cluster; auto finds one, local starts one."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Learn many bodies of text, each as a module of its own.

    A plan is a YAML file:

    \b
        defaults: {kind: lora, tokens: 100k}
        modules:
          law: {data: statutes/, epochs: 3}
          medicine: {data: [pubmed.jsonl, notes/], text_key: abstract}

    Modules that are there already are left alone: the same command again does what is left.

    Examples:

        growlm learn-all brain plan.yaml

        growlm learn-all brain plan.yaml --ray auto
    """
    from growlm.cluster.learning import FAILED
    from growlm.cluster.learning import learn_all as run
    from growlm.cluster.plan import read_plan

    asked, opened = read_plan(plan), open_store(store)
    runner = None
    if ray is not None:
        from growlm.cluster.ray_tasks import on_ray

        runner = on_ray(ray)
    with redirect_stdout(sys.stderr):  # where Ray tells of machines that die
        outcomes = run(opened, asked, runner)
    failed = [one for one in outcomes if one.state == FAILED]
    if as_json:
        print_json({"modules": [one.to_json() for one in outcomes]})
    else:
        _tell(outcomes)
    if failed:
        sys.exit(1)


def _tell(outcomes: Sequence[Outcome]) -> None:
    """A row for each module, those that failed at the end, and why."""
    rows = [["module", "", "held-out loss", "gain", "seconds"]]
    for one in sorted(outcomes, key=lambda one: one.state == "failed"):
        row = [one.name, one.state, "", "", f"{one.seconds:,.0f}" if one.seconds else ""]
        if one.result is not None:
            before, after = one.result["loss_before"], one.result["loss_after"]
            row[2:4] = [f"{before:.3f} -> {after:.3f}", f"{one.result['gain']:.3f}"]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
    for one in outcomes:
        if one.error is not None:
            note(f"{one.name}: {one.error}")
