"""growlm export."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from growlm.cli.app import app
from growlm.cli.asking import open_store
from growlm.cli.options import Json, OutPath, StorePath
from growlm.cli.output import note, print_json, reports


@app.command()
@reports("module")
def export(
    store: StorePath,
    out: OutPath,
    module: Annotated[str, typer.Option("--module", metavar="NAME", show_default=False)],
    version: Annotated[int | None, typer.Option("--version", help="By default the current one.")] = None,
    form: Annotated[
        Literal["checkpoint", "peft"],
        typer.Option("--as", help="Base and module as one checkpoint, or a lora module alone as a PEFT adapter."),
    ] = "checkpoint",
    no_text: Annotated[bool, typer.Option("--no-text", help="Refuse a module that holds text of its domain.")] = False,
    as_json: Json = False,
) -> None:
    """Write base and module as one checkpoint, or as a PEFT adapter.

    Any engine can load the checkpoint.

    Examples:

        growlm export brain out/ --module medicine

        growlm export brain adapter/ --module law --as peft
    """
    opened = open_store(store, module)
    from growlm.surgery.export import export as run

    path = run(opened, out, module, version=version, form=form, no_text=no_text)
    if opened.module(module, version).text_files:
        note("the text that it recalls is not part of this: what is written answers by the layers alone")
    if as_json:
        return print_json({"path": str(path), "module": module})
    if form == "peft":
        print(f'{path}: {module} as a PEFT adapter; load it with PeftModel.from_pretrained(base, "{path}")')
        return None
    print(f'{path}: base and {module}; load it with AutoModelForCausalLM.from_pretrained("{path}")')
    return None
