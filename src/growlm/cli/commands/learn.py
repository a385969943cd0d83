"""growlm learn."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from growlm.cli.app import app
from growlm.cli.options import DataPaths, Grouped, Json, Restart, StorePath, from_config
from growlm.cli.output import note, plural, print_json, reports
from growlm.modules.shapes import SHAPES
from growlm.training.config import LearnConfig


@app.command(cls=Grouped)
@reports("name", long=True)
@from_config(LearnConfig, SHAPES)
def learn(
    store: StorePath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the module.", show_default=False)],
    data: DataPaths,
    config: Any,
    update: Annotated[bool, typer.Option("--update", help="NAME exists: learn its next version.")] = False,
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """Learn a body of text as a new module. The base and all other modules keep their bytes.

    Run the same command again to go on after Ctrl-C or a kill.

    Examples:

        growlm learn brain medicine --data pubmed.jsonl

        growlm learn brain law --data statutes/ --epochs 3 --placement interleaved
    """
    from growlm.store import Store
    from growlm.training.learn import learn as run

    result = run(Store.open(store), name, data, config, update=update, restart=restart)
    if as_json:
        return print_json(result.to_json())
    error = "" if result.error is None else f" ± {result.error:.3f}"
    gain = f"gain {result.gain:.3f}{error}, {plural(result.texts or 0, 'held-out text')}"
    print(
        f"{name} version {result.version}: held-out loss {result.loss_before:.3f} -> {result.loss_after:.3f} ({gain}) "
        f"after {result.tokens:,} tokens in {result.seconds:,.0f} s ({result.tokens_per_second:,.0f} tokens/s)"
        + (f"; router version {result.router}" if result.router else "")
    )
    if result.loss_after > result.loss_before:
        note(f"{name} does worse than the base on its own held-out text: give more text or --epochs, or remove it")
    return None
