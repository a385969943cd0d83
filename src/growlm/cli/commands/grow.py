"""growlm grow."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from growlm.cli.app import app
from growlm.cli.asking import open_store
from growlm.cli.options import (
    Json,
    Restart,
    SomeDataPaths,
    StorePath,
    from_config,
    given_options,
    option,
    refuse_beside,
)
from growlm.cli.output import note, print_json, reports
from growlm.errors import ConfigError
from growlm.training.config import GrowConfig

_OF_TEXT = {
    "--separator", "--text-key", "--format", "--loss", "--keep-samples", "--router-samples", "--admit-anyway",
    "--sequence-length",
}  # fmt: skip


@app.command()
@reports("name", long=True)
@from_config(GrowConfig)
def grow(
    context: typer.Context,
    store: StorePath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of a module.", show_default=False)],
    config: Any,
    experts: Annotated[
        str | None,
        typer.Option("--experts", metavar="+N", help="Append so many to every pool, e.g. +4096.", show_default=False),
    ] = None,
    data: SomeDataPaths = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take the last step of growth back.")] = False,
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """Append experts to a peer module, or text to one that recalls.

    New experts are trained on new text; the last step can be taken back. To a module of kind recall, or lora+recall and
    its like, documents are appended, and nothing is trained.

    What the module has learned keeps its bits. Without --data it answers as before until the new experts are trained;
    without --experts those are trained that were appended before. Each is the module's next version, and the one before
    stays, so that nothing is asked. Run a training again to go on after Ctrl-C or a kill.

    Examples:

        growlm grow brain law --experts +4096 --data statutes-2027/

        growlm grow brain law --experts +4096

        growlm grow brain law --data statutes-2027/ --epochs 3

        growlm grow brain law --undo

        growlm grow brain manuals --data manual-2027.pdf
    """
    given = given_options(context, config).items()
    used = ("seed", "device")  # without training too
    trains = [option(field) for field, value in given if field not in used and value is not None]
    if experts is not None and re.match(r"\s*\d", experts):
        raise ConfigError(
            f"--experts {experts}: so many are appended to those that there are; write --experts +{experts}"
        )
    if undo:
        asked = {"--experts": experts, "--data": data, "--restart": restart}
        refuse_beside("--undo", *(name for name, value in asked.items() if value), *trains)
    elif experts is not None and not data:
        refuse_beside("--experts without --data", *trains, *(["--restart"] if restart else []))
    opened = open_store(store, name, data=config.paths(data or ()), **config.reading)
    if opened.module(name).text_files:
        asked = {"--experts": experts, "--undo": undo, "--restart": restart}
        if wrong := [flag for flag, value in asked.items() if value]:
            raise ConfigError(f"{name} recalls a text, which grows by --data alone; leave out {wrong[0]}")
        if useless := [flag for flag in trains if flag not in _OF_TEXT]:
            raise ConfigError(f"{name} recalls a text, and nothing is trained: {useless[0]} is of no effect")
        if not data:
            raise ConfigError(f"{name} recalls a text; name with --data what is to be appended")
        from growlm.training.text_growth import add_text

        added = add_text(opened, name, data, config)
        if as_json:
            return print_json(added.to_json())
        print(
            f"{name} version {added.version}: {added.tokens_before:,} -> {added.tokens:,} tokens of text, "
            f"{added.documents_before:,} -> {added.documents:,} documents"
            + ("" if added.loss_after is None else f"; held-out loss {added.loss_before:.3f} -> {added.loss_after:.3f}")
        )
        return None
    from growlm.training import grow as growth

    if undo:
        result = growth.take_back(opened, name, device=config.device)
    else:
        result = growth.grow(opened, name, experts, data or (), config, restart=restart)
    if as_json:
        return print_json(result.to_json())
    line = f"{name} version {result.version}: {result.experts_before:,} -> {result.experts:,} experts"
    if result.loss_before is not None and result.loss_after is not None:
        line += (
            f"; held-out loss {result.loss_before:.3f} -> {result.loss_after:.3f} (gain {result.gain:.3f}"
            f"{'' if result.error is None else f' ± {result.error:.3f}'}) after {result.tokens:,} tokens in "
            f"{result.seconds:,.0f} s ({result.tokens_per_second:,.0f} tokens/s)"
            + (f"; router version {result.router}" if result.router else "")
        )
    elif result.experts_open < result.experts:
        line += f", {result.experts - result.experts_open:,} of them not trained: it answers as before"
    print(line)
    if result.loss_before is not None and result.loss_after is not None and result.loss_after > result.loss_before:
        note(f"{name} does worse on the new held-out text than before: give more text or --epochs, or --undo")
    return None
