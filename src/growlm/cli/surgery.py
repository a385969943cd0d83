"""Commands that operate on finished checkpoints and modules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from growlm.cli.app import app
from growlm.cli.options import DataPaths, Json, NamedData, OutPath, Restart, from_config, named_paths
from growlm.cli.output import note, print_json
from growlm.errors import ConfigError
from growlm.training.config import FinetuneConfig
from growlm.units import format_count, parse_count


@app.command()
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
    return None


@app.command()
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
def usage(
    source: Annotated[
        str, typer.Argument(metavar="STORE_OR_MODEL", help="A store, or a growlm checkpoint.", show_default=False)
    ],
    data: NamedData,
    module: Annotated[
        list[str] | None,
        typer.Option("--module", metavar="NAME", help="Of a store: module of kind experts; repeatable."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="Of each text at most, e.g. 50k.", show_default=False)
    ] = None,
    sequence_length: Annotated[int, typer.Option("--sequence-length", help="Tokens read at once.")] = 512,
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
    from growlm.surgery.usage import count_usage, open_modules

    paths = named_paths(data)
    modules, tokenizer = open_modules(source, module or [])
    if figure is not None and figure.suffix not in (".svg", ".png"):
        raise ConfigError(f"--figure {figure}: its name must end in .svg or .png")
    found = count_usage(modules, tokenizer, paths, tokens=_count(tokens), sequence_length=sequence_length)
    if figure is not None:
        from growlm.surgery.figures import write_usage

        note(f"figure: {write_usage(found, figure)}")
    if as_json:
        return print_json(found.to_json())
    print("\n".join(found.lines()))
    return None


@app.command()
def prune(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a growlm model.", show_default=False)],
    out: OutPath,
    data: DataPaths,
    keep: Annotated[float, typer.Option("--keep", help="Share of all parameters that stays.", show_default=False)],
    normalise: Annotated[
        str, typer.Option("--normalise", help="Compare layers by their largest count (max) or by their sum (sum).")
    ] = "max",
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="Of the text at most, e.g. 50k.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove the experts that a text uses least. The result is a smaller checkpoint of its own.

    Prune and finetune, or finetune with --load-concentration and prune once to any size.

    Examples:

        growlm prune molm/ small/ --data src/ --keep 0.5

        growlm prune code/ small/ --data heldout.txt --keep 0.3 --normalise sum
    """
    from growlm.surgery.pruning import prune as run

    result = run(source, out, data, keep=keep, normalise=normalise, tokens=_count(tokens))
    if as_json:
        return print_json(result)
    print(
        f"{out}: {format_count(result['parameters_before'])} -> {format_count(result['parameters'])} parameters "
        f"({result['kept']:.0%})"
    )
    for place in result["experts"]:
        print(f"  {place['place']}: {len(place['kept'])} of {place['of']} experts")
    return None


def _count(tokens: str | None) -> int | None:
    if tokens is None:
        return None
    count = parse_count(tokens)
    if count < 2:
        raise ConfigError(f"--tokens is {tokens}; it must be at least 2")
    return count
