"""growlm demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from growlm.cli.app import app
from growlm.cli.options import Device, Json
from growlm.cli.output import print_json, reports


@app.command()
@reports("out")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for base, store and report.")] = Path("demo-out"),
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            metavar="FILE|FOLDER",
            help="A published base, a GGUF file or a checkpoint folder, that learns instead of one that is pretrained "
            "here.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            help="In which it ends: it measures this machine, and does as much as fits. By default 10, with --base 20.",
        ),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="The least, as much on any machine: a minute or two, with --base a quarter hour."),
    ] = False,
    device: Device = "auto",
    precision: Annotated[
        str, typer.Option("--precision", metavar="auto|bfloat16|float32", help="Of training's matrix products.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Grow a model from text that is on this machine. Pretrain, learn three domains, evaluate, report.

    With --base it begins with that base, learns with the defaults of growlm learn, and finetunes the base on the same
    text to compare, if there is time.

    Exit status 1 if a module does not halve its domain's perplexity; with --base, if one does not help.

    Examples:

        growlm demo

        growlm demo --minutes 3

        growlm demo --fast

        growlm demo --base SmolLM2-135M-Instruct.Q4_1.gguf
    """
    from growlm.demo.run import demo as run

    result = run(out, base=base, fast=fast, minutes=minutes, device=device, precision=precision)
    if as_json:
        print_json(result.to_json())
    else:
        print("\n".join(result.lines()))
    if result.missed:
        raise typer.Exit(1)
