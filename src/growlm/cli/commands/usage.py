"""growlm usage."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from growlm.cli.app import app
from growlm.cli.asking import open_source
from growlm.cli.options import (
    Device,
    Format,
    Json,
    NamedData,
    Separator,
    TextKey,
    named_paths,
    token_count,
)
from growlm.cli.output import note, print_json, reports
from growlm.errors import ConfigError


@app.command()
@reports("source")
def usage(
    source: Annotated[
        str, typer.Argument(metavar="STORE_OR_MODEL", help="A store, or a growlm checkpoint.", show_default=False)
    ],
    data: NamedData,
    module: Annotated[
        list[str] | None,
        typer.Option("--module", metavar="NAME", help="Of a store: module of kind experts or peer; repeatable."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="Of each text at most, e.g. 50k.", show_default=False)
    ] = None,
    sequence_length: Annotated[int, typer.Option("--sequence-length", help="Tokens read at once.")] = 512,
    text_key: TextKey = "text",
    separator: Separator = None,
    format: Format = "auto",
    device: Device = "auto",
    figure: Annotated[
        Path | None, typer.Option("--figure", help="Write heat maps to this file (.svg or .png).", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Count how often a text uses every expert. It also says how far texts differ in that.

    Examples:

        growlm usage molm/ --data english=news.txt code=src/ --figure usage.svg

        growlm usage brain --module german --data german=heldout.txt --json
    """
    paths = named_paths(data)
    reading: dict[str, Any] = {"text_key": text_key, "separator": separator, "format": format}
    open_source(source, module or [], chain(*paths.values()), **reading)
    from growlm.usage.usage import count_usage, open_modules

    modules, tokenizer = open_modules(source, module or [], device=device)
    if figure is not None and figure.suffix not in (".svg", ".png"):
        raise ConfigError(f"--figure {figure}: its name must end in .svg or .png")
    found = count_usage(
        modules,
        tokenizer,
        paths,
        tokens=token_count(tokens),
        sequence_length=sequence_length,
        **reading,
    )
    if figure is not None and found.places:
        from growlm.usage.figures import write_usage

        note(f"figure: {write_usage(found, figure)}")
    elif figure is not None:
        note(f"--figure {figure}: not drawn: a figure shows routed experts, and there are none; product keys are below")
    if as_json:
        return print_json(found.to_json())
    print("\n".join(found.lines()))
    return None
