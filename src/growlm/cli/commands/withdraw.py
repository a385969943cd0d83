"""growlm withdraw."""

from __future__ import annotations

from typing import Annotated

import typer

from growlm.cli.app import app
from growlm.cli.asking import open_store
from growlm.cli.options import Device, Json, StorePath
from growlm.cli.output import note, print_json, reports


@app.command()
@reports("name")
def withdraw(
    store: StorePath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of a module that recalls.", show_default=False)],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Of the documents, as generate --sources names them; a file's name for all of it; where none is "
            "called so, * and ? stand for any characters.",
            show_default=False,
        ),
    ],
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Take documents out of the text that a module recalls.

    The module's next version has none of their tokens. Older versions keep them until they are removed.

    Examples:

        growlm withdraw brain law statutes/1998.txt

        growlm withdraw brain support "tickets.jsonl:17" "tickets-2019*"
    """
    opened = open_store(store, name)
    from growlm.training.text_growth import withdraw as run

    result = run(opened, name, sources, device=device)
    if as_json:
        return print_json(result.to_json())
    print(
        f"{name} version {result.version}: {result.documents_before:,} -> {result.documents:,} documents, "
        f"{result.tokens_before:,} -> {result.tokens:,} tokens"
    )
    for version in result.still_in:
        note(f"version {version} still holds some of it: growlm remove {opened.path} {name} --version {version}")
    if opened.module(name).manifest.kind != "recall":
        note("its layers were trained with them and keep what they learned: learn it again to be rid of that")
    return None
