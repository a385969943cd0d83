"""The command line's root, on which every command registers itself."""

from __future__ import annotations

from typing import Annotated

import typer

from growlm import __version__
from growlm.cli.output import note
from growlm.requirements import remarks

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="A language model that grows: a frozen base, and knowledge modules learned one by one, kept on disk, chosen "
    "by a router and loaded when a prompt needs them.",
)


def _show_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    if context.invoked_subcommand not in ("doctor", "version"):  # the one tells more, the other needs nothing
        for line in remarks():
            note(f"growlm: {line}")
