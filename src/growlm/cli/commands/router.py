"""growlm router."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from growlm.cli.app import app
from growlm.cli.asking import open_store
from growlm.cli.options import (
    Json,
    StorePath,
    from_config,
    given_options,
    option,
    refuse_beside,
)
from growlm.cli.output import print_json, reports
from growlm.training.config import RouterConfig
from growlm.units import counted, format_size


@app.command()
@reports("store")
@from_config(RouterConfig)
def router(
    context: typer.Context,
    store: StorePath,
    config: Any,
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            help="Change to gaussian or product-key, or train a transformer and change to it.",
            show_default=False,
        ),
    ] = None,
    remove_version: Annotated[
        int | None,
        typer.Option("--remove-version", help="Of the transformer: the newest, to roll back.", show_default=False),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin training anew instead of resuming.")] = False,
    as_json: Json = False,
) -> None:
    """Show a store's router; change it, train it, or roll it back.

    Run a training again to go on after Ctrl-C or a kill. Settings that are not given are those of the newest version.

    Examples:

        growlm router brain

        growlm router brain --kind product-key

        growlm router brain --kind transformer --router-layers 4

        growlm router brain --remove-version 3
    """
    given = given_options(context, config)
    if kind != "transformer":
        what = f"--kind {kind}" if kind else "this command without --kind transformer"
        trains = [option(field) for field, value in given.items() if value is not None]
        refuse_beside(what, *trains, *(["--restart"] if restart else []))
    opened = open_store(store)
    from growlm.router import load_router
    from growlm.store import ROUTER_INDEX
    from growlm.training.router import describe_router, last_config, train_router

    if remove_version is not None:
        opened.remove_router_version(remove_version)
    if kind == "transformer":
        settings = replace(last_config(opened), **given)
        train_router(opened, settings, restart=restart)
    if kind is not None:
        opened.set_router(kind)
    if kind == ROUTER_INDEX:
        load_router(opened)  # makes its index now, and not before the first prompt
    found = describe_router(opened)
    if as_json:
        return print_json(found)
    print(f"{found['kind']}: chooses among {found['knows']} of {counted(found['modules'], 'module')}")
    if found["unknown"]:
        cure = f"; growlm router {store} --kind transformer trains anew" if found["kind"] == "transformer" else ""
        print(f"never chosen: {', '.join(found['unknown'][:10])}{cure}")
    if found["outdated"]:
        print(f"chosen by the text of an earlier version: {', '.join(found['outdated'][:10])}")
    for version in found["versions"]:
        accuracy = "no text held out" if version["accuracy"] is None else f"{version['accuracy']:.1%} on held-out text"
        print(
            f"  transformer version {version['version']}: {counted(version['modules'], 'module')}, "
            f"{format_size(version['bytes'])}, {accuracy}"
        )
    return None
