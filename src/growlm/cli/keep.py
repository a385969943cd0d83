"""Commands that look after a store: what is in it, whether it is whole, take out, hand on."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from growlm import __version__
from growlm.cli.app import app
from growlm.cli.options import Json, OutPath, StorePath, Yes
from growlm.cli.output import note, plural, print_json, reports
from growlm.errors import ConfigError
from growlm.units import format_count, format_size


@app.command()
@reports("store")
def status(store: StorePath, as_json: Json = False) -> None:
    """List a store's modules, their sizes, and what is active for a prompt.

    Example:

        growlm status brain
    """
    from growlm.store import Store

    found = Store.open(store).status()
    if as_json:
        return print_json(found)
    print(f"base {found['base']}: {format_count(found['base_parameters'])} parameters")
    width = max((len(m["name"]) for m in found["modules"]), default=0)
    for m in found["modules"]:
        print(
            f"  {m['name']:<{width}}  version {m['version']}  {m['kind']}  {format_size(m['bytes']):>9}  "
            f"{format_count(m['parameters'])} parameters{', ' + m['about'] if m['about'] else ''}"
        )
    print(
        f"total {format_count(found['total_parameters'])} parameters; with the largest module "
        f"{format_count(found['active_parameters'])}"
    )
    return None


@app.command()
@reports("store")
def verify(store: StorePath, as_json: Json = False) -> None:
    """Read every file of a store and name each that is not what it should be.

    Example:

        growlm verify brain
    """
    from growlm.store import Store

    opened = Store.open(store)
    problems = opened.verify()
    if as_json:
        print_json({"ok": not problems, "problems": problems})
    elif not problems:
        print(f"{store}: {plural(len(opened.modules), 'module')}, every file as it should be")
    else:
        print("\n".join(problems))
    if problems:
        raise typer.Exit(1)


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
            raise ConfigError("interrupted; nothing was changed") from None
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


@app.command()
@reports("module")
def export(
    store: StorePath,
    out: OutPath,
    module: Annotated[str, typer.Option("--module", metavar="NAME", show_default=False)],
    version: Annotated[int | None, typer.Option("--version", help="By default the current one.")] = None,
    as_json: Json = False,
) -> None:
    """Write the base with one module as an ordinary transformers checkpoint, for any engine.

    Example:

        growlm export brain out/ --module medicine
    """
    from growlm.store import Store
    from growlm.surgery.export import export as run

    path = run(Store.open(store), out, module, version=version)
    if as_json:
        return print_json({"path": str(path), "module": module})
    print(f'{path}: base and {module}; load it with AutoModelForCausalLM.from_pretrained("{path}")')
    return None


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version."""
    if as_json:
        return print_json({"growlm": __version__})
    print(__version__)
    return None
