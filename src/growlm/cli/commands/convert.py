"""growlm convert."""

from __future__ import annotations

from typing import Annotated

import typer

from growlm.cli.app import app
from growlm.cli.options import (
    Json,
    OutPath,
)
from growlm.cli.output import note, print_json, reports


@app.command()
@reports("source")
def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="Checkpoint folder, hub id, or a GGUF file.", show_default=False)
    ],
    out: OutPath,
    to: Annotated[
        str | None,
        typer.Option("--to", help="growlm, or molm for a growlm model (the default).", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert MoLM, JetMoE and GGUF models to checkpoints for growlm. A model of ours can be written in MoLM's layout;
    a GGUF file becomes a checkpoint folder in float32.

    Examples:

        growlm convert ibm/MoLM-350M-4B molm/

        growlm convert molm/ published/ --to molm

        growlm convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2/
    """
    from growlm.surgery.conversion import convert_checkpoint

    path, before, after = convert_checkpoint(source, out, to=to)
    if as_json:
        return print_json({"path": str(path), "from": before, "to": after})
    print(f"{path}: {before} -> {after}")
    if not any(path.glob("tokenizer*")):
        note(f"{source} has no tokenizer; save the one that it was trained with into {path} before you use it")
    return None
