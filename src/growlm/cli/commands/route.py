"""growlm route."""

from __future__ import annotations

from typing import Annotated

import typer

from growlm.cli.app import app
from growlm.cli.asking import open_engine
from growlm.cli.options import (
    Device,
    Json,
    Memory,
    StorePath,
    Strict,
)
from growlm.cli.output import print_json, reports


@app.command()
@reports("store")
def route(
    store: StorePath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", show_default=False)],
    memory: Memory = None,
    device: Device = "auto",
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Say which module the router would choose for a prompt.

    Example:

        growlm route brain "What does aspirin inhibit?"
    """
    with open_engine(store, memory, device, strict=strict) as engine:
        answer = engine.route(prompt)
    if as_json:
        return print_json({"module": answer.module, "scores": answer.scores})
    print(answer.module or "none of the modules")
    for name, score in list(answer.scores.items())[:10]:
        print(f"  {score:6.1%}  {name}")
    return None
