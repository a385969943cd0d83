"""growlm export."""

from __future__ import annotations

from typing import Annotated

import typer

from growlm.cli.app import app
from growlm.cli.asking import open_store
from growlm.cli.options import Json, OutPath, StorePath
from growlm.cli.output import print_json, reports


@app.command()
@reports("module")
def export(
    store: StorePath,
    out: OutPath,
    module: Annotated[str, typer.Option("--module", metavar="NAME", show_default=False)],
    version: Annotated[int | None, typer.Option("--version", help="By default the current one.")] = None,
    as_json: Json = False,
) -> None:
    """Write base and module as one transformers checkpoint. Any engine can load it.

    Example:

        growlm export brain out/ --module medicine
    """
    opened = open_store(store, module)
    from growlm.surgery.export import export as run

    path = run(opened, out, module, version=version)
    if as_json:
        return print_json({"path": str(path), "module": module})
    print(f'{path}: base and {module}; load it with AutoModelForCausalLM.from_pretrained("{path}")')
    return None
