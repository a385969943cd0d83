"""growlm version."""

from __future__ import annotations

from growlm import __version__
from growlm.cli.app import app
from growlm.cli.options import Json
from growlm.cli.output import print_json


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version."""
    if as_json:
        return print_json({"growlm": __version__})
    print(__version__)
    return None
