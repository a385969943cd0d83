"""Commands that operate on finished checkpoints and modules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from growlm.cli.app import app
from growlm.cli.options import Json
from growlm.cli.output import print_json


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="Checkpoint folder, or a hub id.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the checkpoint.", show_default=False)],
    to: Annotated[str | None, typer.Option("--to", help="growlm, or molm for one of ours.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Read a published MoLM or JetMoE checkpoint and write it as a growlm model, or one of ours in MoLM's layout.

    Examples:

        growlm convert ibm/MoLM-350M-4B molm/

        growlm convert molm/ published/ --to molm
    """
    from growlm.surgery.conversion import convert_checkpoint

    path = convert_checkpoint(source, out, to=to)
    if as_json:
        return print_json({"path": str(path)})
    print(f"{path}: converted from {source}")
    return None
