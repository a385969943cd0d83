"""growlm import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from growlm.cli.app import app
from growlm.cli.asking import open_store
from growlm.cli.options import Device, Format, Json, Separator, SomeDataPaths, StorePath, TextKey
from growlm.cli.output import print_json, reports
from growlm.training.config import LearnConfig
from growlm.units import format_count, format_size


@app.command("import")
@reports("name", long=True)
def import_(
    store: StorePath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the module.", show_default=False)],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of the PEFT adapter.", show_default=False)],
    data: SomeDataPaths = None,
    text_key: TextKey = "text",
    separator: Separator = None,
    format: Format = "auto",
    update: Annotated[bool, typer.Option("--update", help="NAME exists: make its next version.")] = False,
    admit_anyway: Annotated[
        bool, typer.Option("--admit-anyway", help="Even if it does no better than the base on held-out text.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Make a module of a LoRA adapter in PEFT's format.

    With text of its domain (--data), the router is shown some of it, and the module must do better than the base on a
    part that is held out. Without, the router is shown texts that base and adapter write.

    Examples:

        growlm import brain law adapters/law --data statutes/

        growlm import brain law adapters/law
    """
    config = LearnConfig(
        "lora", text_key=text_key, separator=separator, format=format, admit_anyway=admit_anyway, device=device
    )
    opened = open_store(store, data=data or (), **config.reading)
    opened.find(name)
    from growlm.training.importing import import_adapter

    result = import_adapter(opened, name, folder, data or (), config, update=update)
    if as_json:
        return print_json(result.to_json())
    told = "" if result.comparison is None else f"; {result.comparison.told()}"
    print(
        f"{name} version {result.version}: {format_count(result.parameters)} parameters, "
        f"{format_size(result.bytes)}{told}"
    )
    return None
