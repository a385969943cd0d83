"""growlm remove."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from growlm.cli.app import app
from growlm.cli.options import Json, StorePath, Yes
from growlm.cli.output import note, print_json
from growlm.errors import ConfigError, Interrupted


@app.command()
def remove(
    store: StorePath,
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    version: Annotated[int | None, typer.Option("--version", help="Only this one; by default all.")] = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Withdraw a module, all its versions or one. Everything else keeps its bytes.

    Examples:

        growlm remove brain law

        growlm remove brain law --version 1
    """
    from growlm.store import Store

    opened = Store.open(store)
    current = opened.module(name, version)
    which = f"version {version}" if version is not None else f"version {current.version} and all before it"
    plan = f"remove {name} ({which}) from {store}"
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"{plan}? there is no one to ask; add --yes")
        try:
            sure = typer.confirm(f"{plan}?", err=True)
        except typer.Abort:
            note("")  # ends the question's line
            raise Interrupted("interrupted; nothing was changed") from None
        if not sure:
            raise typer.Exit(1)
    opened.remove(name, version)
    if as_json:
        return print_json({"removed": name, "version": current.version})
    if version is None or (left := opened.find(name)) is None:
        print(f"removed {name}")
    else:
        print(f"removed {name} version {version}; version {left.version} is current")
    return None
