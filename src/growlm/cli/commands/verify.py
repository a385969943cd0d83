"""growlm verify."""

from __future__ import annotations

import typer

from growlm.cli.app import app
from growlm.cli.options import Json, StorePath
from growlm.cli.output import print_json, reports
from growlm.units import counted


@app.command()
@reports("store")
def verify(store: StorePath, as_json: Json = False) -> None:
    """Name every file of a store that is not what it should be. All of them are read.

    Example:

        growlm verify brain
    """
    from growlm.store import Store

    opened = Store.open(store)
    problems = opened.verify()
    if as_json:
        print_json({"ok": not problems, "problems": problems})
    elif not problems:
        print(f"{store}: {counted(len(opened.modules), 'module')}, every file as it should be")
    else:
        print("\n".join(problems))
    if problems:
        raise typer.Exit(1)
