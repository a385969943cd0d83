"""Commands that operate on finished checkpoints and modules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from growlm.cli.app import app
from growlm.cli.options import (
    DataPaths,
    Device,
    Json,
    NamedData,
    OutPath,
    Restart,
    Separator,
    SomeDataPaths,
    TextKey,
    from_config,
    named_paths,
)
from growlm.cli.output import note, print_json, reports
from growlm.errors import ConfigError
from growlm.training.config import FinetuneConfig
from growlm.units import format_count, parse_count


@app.command()
@reports("source")
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="Checkpoint folder, or a hub id.", show_default=False)],
    out: OutPath,
    to: Annotated[
        str | None,
        typer.Option("--to", help="growlm, or molm for a growlm model (the default).", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a published MoLM or JetMoE checkpoint and write it as a growlm model, or one of ours in MoLM's layout.

    Examples:

        growlm convert ibm/MoLM-350M-4B molm/

        growlm convert molm/ published/ --to molm
    """
    from growlm.surgery.conversion import convert_checkpoint

    path, before, after = convert_checkpoint(source, out, to=to)
    if as_json:
        return print_json({"path": str(path), "from": before, "to": after})
    print(f"{path}: {before} -> {after}")
    if not any(path.glob("tokenizer*")):
        note(f"{source} has no tokenizer; save the one that it was trained with into {path} before you use it")
    return None


@app.command()
@reports("out")
@from_config(FinetuneConfig)
def finetune(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, or a hub id.", show_default=False)],
    out: OutPath,
    data: DataPaths,
    config: Any,
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """Train all parameters of a checkpoint further, as before or after pruning. To keep knowledge apart, learn.

    Run the same command again to go on after Ctrl-C or a kill.

    Examples:

        growlm finetune molm/ code/ --data src/ --load-concentration 0.1

        growlm finetune small/ better/ --data src/ --tokens 2M --learning-rate 1e-4
    """
    from growlm.training.finetune import finetune as run

    result = run(source, out, data, config, restart=restart)
    if as_json:
        return print_json(result.to_json())
    print(
        f"{out}: {format_count(result.parameters)} parameters; held-out loss {result.loss_before:.3f} -> "
        f"{result.loss_after:.3f} after {result.tokens:,} tokens ({result.tokens_per_second:,.0f} tokens/s)"
    )
    return None


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
    device: Device = "auto",
    figure: Annotated[
        Path | None, typer.Option("--figure", help="Write heat maps to this file (.svg or .png).", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Count how often every expert is chosen on a text, and how far texts differ in that.

    Examples:

        growlm usage molm/ --data english=news.txt code=src/ --figure usage.svg

        growlm usage brain --module german --data german=heldout.txt --json
    """
    from growlm.usage.usage import count_usage, open_modules

    paths = named_paths(data)
    modules, tokenizer = open_modules(source, module or [], device=device)
    if figure is not None and figure.suffix not in (".svg", ".png"):
        raise ConfigError(f"--figure {figure}: its name must end in .svg or .png")
    found = count_usage(
        modules,
        tokenizer,
        paths,
        tokens=_count(tokens),
        sequence_length=sequence_length,
        text_key=text_key,
        separator=separator,
    )
    if figure is not None:
        from growlm.usage.figures import write_usage

        note(f"figure: {write_usage(found, figure)}")
    if as_json:
        return print_json(found.to_json())
    print("\n".join(found.lines()))
    return None


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
    """Remove the experts that a text uses least, from a growlm model or from a store's module.

    Of a model the result is a smaller checkpoint of its own; a store keeps the module's older version. Prune and
    finetune, or finetune with --load-concentration and prune once to any size.

    Examples:

        growlm prune molm/ small/ --data src/ --keep 0.5

        growlm prune code/ small/ --data heldout.txt --keep 0.3 --normalise sum

        growlm prune brain --module german --data buecher/ --keep 0.5

        growlm prune molm/ shallow/ --drop-layers uniform --keep 0.5
    """
    from growlm.surgery import pruning
    from growlm.surgery.module_pruning import prune_module

    settings: dict[str, Any] = {
        "keep": keep, "normalise": normalise or "max", "tokens": _count(tokens), "text_key": text_key,
        "separator": separator, "device": device,
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


def _count(tokens: str | None) -> int | None:
    if tokens is None:
        return None
    count = parse_count(tokens)
    if count < 2:
        raise ConfigError(f"--tokens is {tokens}; it must be at least 2")
    return count
