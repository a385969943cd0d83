"""growlm eval."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from growlm.cli.app import app
from growlm.cli.asking import open_store
from growlm.cli.options import Json, Memory, StorePath, from_config, named_paths
from growlm.cli.output import note, print_json, reports
from growlm.errors import ConfigError
from growlm.evaluation.config import EvalConfig


@app.command(name="eval")
@reports("store")
@from_config(EvalConfig)
def evaluate(
    store: StorePath,
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="NAME=PATH...",
            help="Held-out text by module; none=PATH is text that belongs to no module.",
            show_default=False,
        ),
    ],
    config: Any,
    report: Annotated[Path | None, typer.Option("--report", help="Write a page with figures to this folder.")] = None,
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity, routing and forgetting on held-out text.

    Examples:

        growlm eval brain --data medicine=heldout.txt law=heldout2.txt --report report/

        growlm eval brain --data law=heldout2.txt none=news.txt --json
    """
    texts = named_paths(data)
    if "base" in texts:
        raise ConfigError("--data base=...: the base is no module; text that belongs to no module is none=PATH")
    opened = open_store(
        store, *(name for name in texts if name != "none"), data=chain(*texts.values()), **config.reading
    )
    from growlm.base.placement import find_device
    from growlm.evaluation import evaluate as run

    find_device(config.device)  # before a folder is made
    if report is not None:
        from growlm.evaluation.page import check_folder
        from growlm.evaluation.report import FILE, write_report

        check_folder(report, FILE)
    result = run(opened, texts, config, memory=memory).to_json()
    if report is not None:
        page = write_report(result, report)
        note(f"report: {page}")
    if as_json:
        return print_json(result)
    from growlm.evaluation.summary import summary

    print("\n".join(summary(result)))
    return None
