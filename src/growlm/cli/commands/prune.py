"""growlm prune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from growlm.cli.app import app
from growlm.cli.asking import open_source
from growlm.cli.options import (
    Device,
    Format,
    Json,
    Separator,
    SomeDataPaths,
    TextKey,
    token_count,
)
from growlm.cli.output import print_json, reports
from growlm.errors import ConfigError
from growlm.units import format_count


@app.command()
@reports("source")
def prune(
    source: Annotated[
        str, typer.Argument(metavar="STORE_OR_MODEL", help="A store, or folder of a growlm model.", show_default=False)
    ],
    keep: Annotated[
        float,
        typer.Option("--keep", help="Share of the model's or module's parameters that stays.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT",
            help="Folder for the smaller model. Of a store: a new store for the smaller module alone; left out, it "
            "becomes the module's next version.",
            show_default=False,
        ),
    ] = None,
    data: SomeDataPaths = None,
    module: Annotated[
        str | None,
        typer.Option(
            "--module", metavar="NAME", help="Of a store: module of kind experts or peer.", show_default=False
        ),
    ] = None,
    normalise: Annotated[
        str | None,
        typer.Option(
            "--normalise",
            help="Compare layers by their largest count (max, the default) or by their sum (sum).",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="Of the text at most, e.g. 50k.", show_default=False)
    ] = None,
    text_key: TextKey = "text",
    separator: Separator = None,
    format: Format = "auto",
    device: Device = "auto",
    drop_layers: Annotated[
        str | None,
        typer.Option(
            "--drop-layers",
            metavar="ORDER",
            help="Of a model, as a baseline: drop whole layers instead, the top ones or uniformly spread ones (top, "
            "uniform); --keep is the share of layers.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove the experts that a text uses least. They are those of a growlm model, or of a store's module.

    Of a model the result is a smaller checkpoint of its own; a store keeps the module's older version. Prune and
    finetune, or finetune with --load-concentration and prune once to any size.

    Examples:

        growlm prune molm/ small/ --data src/ --keep 0.5

        growlm prune code/ small/ --data heldout.txt --keep 0.3 --normalise sum

        growlm prune brain --module german --data buecher/ --keep 0.5

        growlm prune molm/ shallow/ --drop-layers uniform --keep 0.5
    """
    reading: dict[str, Any] = {"text_key": text_key, "separator": separator, "format": format}
    open_source(source, [] if module is None else [module], data or (), **reading)
    from growlm.surgery import pruning
    from growlm.surgery.module_pruning import prune_module

    settings: dict[str, Any] = {
        "keep": keep, "normalise": normalise or "max", "tokens": token_count(tokens), "device": device,
        **reading,
    }  # fmt: skip
    if (Path(source).expanduser() / "store.json").exists():
        from growlm.store import Store

        if drop_layers is not None:
            raise ConfigError(f"{source}: is a store, whose base stays as it is; --drop-layers is for a model's folder")
        result = prune_module(Store.open(source), module, _required(data), out=out, **settings)
    elif module is not None:
        raise ConfigError(f"{source}: is no store; --module {module} is for the modules of one")
    elif out is None:
        raise ConfigError(f"{source}: is no store; say where the smaller model goes: growlm prune {source} OUT")
    elif drop_layers is None:
        result = pruning.prune(source, out, _required(data), **settings)
    else:
        asked: dict[str, Any] = {"--data": data, "--normalise": normalise, "--tokens": tokens, "--separator": separator}
        asked["--device"] = device != "auto"
        for option, value in asked.items():
            if value:
                raise ConfigError(f"--drop-layers reads no text; leave out {option}, or --drop-layers")
        result = pruning.prune_layers(source, out, keep=keep, order=drop_layers)
    if as_json:
        return print_json(result)
    what = f"{result['path']}: {result['module']} version {result['version']}" if "module" in result else result["path"]
    print(
        f"{what}: {format_count(result['parameters_before'])} -> {format_count(result['parameters'])} parameters "
        f"({result['kept']:.0%})"
    )
    if "layers" in result:
        print(f"  layers {', '.join(map(str, result['layers']['kept']))} of {result['layers']['of']}")
    for place in result.get("experts", []):
        each = f", each with {place['experts']} experts" if "experts" in place else " experts"
        print(f"  {place['place']}: {len(place['kept'])} of {place['of']}{each}")
    return None


def _required(data: list[str] | None) -> list[str]:
    if not data:
        raise ConfigError("--data is missing; give text of what the experts are to be kept for")
    return data
