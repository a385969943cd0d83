"""growlm route."""

from __future__ import annotations

from typing import Annotated

import typer

from growlm.cli.app import app
from growlm.cli.asking import none_because, open_engine
from growlm.cli.options import (
    Device,
    Json,
    Memory,
    SecondLook,
    StorePath,
    Strict,
)
from growlm.cli.output import print_json, reports

_TIE = 1e-6  # by which scores differ at the most that are equal


@app.command()
@reports("store")
def route(
    store: StorePath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", show_default=False)],
    memory: Memory = None,
    device: Device = "auto",
    second_look: SecondLook = False,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Say which module the router would choose for a prompt.

    Example:

        growlm route brain "What does aspirin inhibit?"
    """
    with open_engine(store, memory, device, strict=strict, second_look=second_look) as engine:
        answer = engine.route(prompt)
    best = max(answer.scores.values(), default=0.0)
    tied = [name for name, score in answer.scores.items() if best - score <= _TIE]
    if as_json:
        told = {"module": answer.module, "refused": answer.refused, "scores": answer.scores}
        return print_json(told | {"tied": tied if len(tied) > 1 else []})
    print(answer.module or "none of the modules")
    if second_look and answer.module is None:
        print(f"  {none_because(answer.refused)}")
    if len(tied) > 1:
        print(f"  {' and '.join(tied)} are as likely, as modules of the same text are; the first of them is chosen")
    for name, score in list(answer.scores.items())[:10]:
        print(f"  {score:6.1%}  {name}")
    return None
