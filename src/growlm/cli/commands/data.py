"""growlm data: look at text before it is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from growlm.cli.app import app
from growlm.cli.asking import open_source
from growlm.cli.options import Format, Json, Separator, TextKey
from growlm.cli.output import print_json, reports

_data = typer.Typer(rich_markup_mode=None, no_args_is_help=True, context_settings=app.info.context_settings)
app.add_typer(_data, name="data")


@_data.callback()
def options() -> None:
    """Look at text before it is learned.

    Example:

        growlm data show chats.jsonl --base Qwen/Qwen2.5-0.5B-Instruct
    """


@_data.command()
@reports("base")
def show(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILES...", help="As of growlm learn --data.", show_default=False),
    ],
    base: Annotated[
        str,
        typer.Option(
            "--base", metavar="FOLDER", help="The base that will read it, or a store of it.", show_default=False
        ),
    ],
    text_key: TextKey = "text",
    separator: Separator = None,
    format: Format = "auto",
    loss: Annotated[str, typer.Option("--loss", help="Of conversations: answers or all.")] = "answers",
    sequence_length: Annotated[int, typer.Option("--sequence-length", help="Tokens a row.")] = 512,
    samples: Annotated[int, typer.Option("--samples", help="How many documents to show.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="By which they are drawn.")] = 0,
    as_json: Json = False,
) -> None:
    """Show documents as the model will see them, what is learned between « and ».

    Examples:

        growlm data show chats.jsonl --base Qwen/Qwen2.5-0.5B-Instruct

        growlm data show questions.csv --base brain/ --text-key body --json
    """
    reading: dict[str, Any] = {"text_key": text_key, "separator": separator, "format": format}
    open_source(base, [], files, **reading)
    from growlm.base.checkpoint import load_tokenizer, resolve
    from growlm.data import read
    from growlm.data import show as run
    from growlm.store import Store

    documents = read(files, **reading).documents
    of_store = (Path(base) / "store.json").is_file()
    tokenizer = Store.open(base).load_tokenizer() if of_store else load_tokenizer(resolve(base))
    shown = run(documents, tokenizer, sequence_length, loss=loss, samples=samples, seed=seed)
    if as_json:
        return print_json(shown.to_json())
    print("\n".join(shown.lines()))
    return None
