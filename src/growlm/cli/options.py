"""Options: what the commands share. Option types, and options made from the fields of a config class.

Knows typer and config classes; nothing of what a command does. Imports nothing heavy: `--help` is printed with it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
import typer.core

from growlm.errors import ConfigError
from growlm.units import parse_count

if TYPE_CHECKING:
    from growlm.modules import ModuleConfig

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.", show_default=False)]
OutPath = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the checkpoint.", show_default=False)]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew instead of resuming.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Memory = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help="Budget for weights, keys and values, e.g. 2GB.")
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Where to compute: cpu, cuda, cuda:N, mps, or auto: a CUDA GPU where there is one, else the processor.",
    ),
]
Devices = Annotated[
    int,
    typer.Option(
        "--devices",
        metavar="N",
        help="Train on so many devices of this machine, a process each; the rows of a step are shared among them.",
    ),
]
ShardModel = Annotated[
    bool,
    typer.Option(
        "--shard-model",
        help="Of several devices each holds a part of the model's layers, gradients and optimiser state: for a model "
        "that is too large for one.",
    ),
]
ModuleChoice = Annotated[
    list[str] | None,
    typer.Option(
        "--module",
        metavar="NAME",
        help="auto (the router chooses; the default), base, or a module's name; repeat it for modules of kind experts "
        "that are active together.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="The most tokens to write.")]
ExpertsOn = Annotated[
    str,
    typer.Option("--experts-on", metavar="memory|disk", help="disk: of peer modules read only the rows that are used."),
]
RowCache = Annotated[
    str | None,
    typer.Option(
        "--row-cache",
        metavar="SIZE",
        help="With --experts-on disk: memory for rows read last, for each module; 64MB by default.",
        show_default=False,
    ),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Refuse a prompt that is longer than what the base was made for; else warn of it."),
]
SecondLook = Annotated[
    bool,
    typer.Option(
        "--second-look",
        help="Keep the module that the router chooses only where it reads the newest tokens of the prompt better than "
        "the base; else the base answers.",
    ),
]
TopP = Annotated[
    float, typer.Option("--top-p", help="Keep the likeliest tokens that hold this probability; 1 keeps all.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of the draw.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
_DATA = typer.Option(
    "--data",
    metavar="PATH...",
    help="Files or folders of text or source code, of records (.json, .jsonl, .csv, .tsv, .parquet, .arrow), or "
    "hub:owner/name; everything up to the next option.",
    show_default=False,
)
DataPaths = Annotated[list[str], _DATA]
SomeDataPaths = Annotated[list[str] | None, _DATA]  # where a command can do without

NamedData = Annotated[
    list[str],
    typer.Option("--data", metavar="NAME=PATH...", help="Text by name; a name can be repeated.", show_default=False),
]

TextKey = Annotated[str, typer.Option("--text-key", help="Key of the text in JSON, column in tables.")]
Separator = Annotated[
    str | None,
    typer.Option(
        "--separator",
        help="Cuts text files into documents, e.g. '\\n\\n', a blank line; by default a file is one document.",
        show_default=False,
    ),
]

Format = Annotated[
    str,
    typer.Option("--format", help="Of records: text, messages, sharegpt, alpaca or prompt; auto tells by their keys."),
]


def option(name: str) -> str:
    """How a setting is written on the command line."""
    return f"--{name.replace('_', '-')}"


def named_paths(data: Sequence[str]) -> dict[str, list[str]]:
    """Paths by name.

    Raises:
        ConfigError: something that is not NAME=PATH.
    """
    paths: dict[str, list[str]] = {}
    for item in data:
        name, equals, path = item.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"--data {item!r}: write it as NAME=PATH, e.g. medicine=heldout.txt")
        paths.setdefault(name, []).append(path)
    return paths


class Grouped(typer.core.TyperCommand):
    """A command whose options are listed under the heading that each has as `rich_help_panel`."""

    def format_options(self, context: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            if (record := parameter.get_help_record(context)) is not None:
                panel = getattr(parameter, "rich_help_panel", None)
                heading = panel or ("Options" if parameter.param_type_name == "option" else "Arguments")
                panels.setdefault(heading, []).append(record)
        for heading, records in panels.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def from_config(
    config: type, kinds: Mapping[str, type[ModuleConfig]] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for every field of a config class: its type, its default, its line of the docstring.

    The command receives the config object as its argument `config`.

    Args:
        kinds: shapes by kind, one of which the class takes with `kind`: their settings are options too, which are
            passed where they are given.
    """

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        own = {n: p for n, p in inspect.signature(command, eval_str=True).parameters.items() if n != "config"}
        hints = get_type_hints(config)
        docs = _field_docs(config)
        made = {f.name: (f.default, hints[f.name], docs.get(f.name, ""), None) for f in fields(config)}
        shaped = _of_kinds(kinds or {})
        if kinds:
            del made["shape"]
            made = {"kind": made["kind"], **made}  # it decides which of the others there are

        def run(**arguments: Any) -> None:
            settings = {name: arguments.pop(name) for name in made}
            settings |= {name: v for name in shaped if (v := arguments.pop(name)) is not None}
            command(**arguments, config=config(**settings))

        parameters = list(own.values())
        for name, (default, hint, doc, panel) in {**made, **shaped}.items():
            # A number with a unit is written as text.
            kind = {int | str: str, int | str | None: str | None, float | str | None: str | None}.get(hint, hint)
            flag = option(name)
            spelled = f"{flag}/--no-{flag[2:]}" if kind in (bool, bool | None) else flag
            given = typer.Option(spelled, help=doc, rich_help_panel=panel)
            parameters.append(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, given]
                )
            )
        ordered = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        run.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in ordered}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return wrap


def _of_kinds(kinds: Mapping[str, type[ModuleConfig]]) -> dict[str, tuple[Any, Any, str, str | None]]:
    """Default, type, help and heading of an option for every setting of these shapes; one that is not given is None."""
    having: dict[str, list[str]] = {}
    for kind, shape in kinds.items():
        for name in shape.settings():
            having.setdefault(name, []).append(kind)
    options: dict[str, tuple[Any, Any, str, str | None]] = {}
    for name, of in having.items():
        told = {kind: _field_docs(kinds[kind]).get(name, "") + _default(kinds[kind], name) for kind in of}
        same = len(set(told.values())) == 1
        text = told[of[0]] if same else " ".join(f"Of {kind}: {text}" for kind, text in told.items())
        panel = None if len(of) == len(kinds) else f"Options of kind {' and '.join(of)}"
        options[name] = (None, _written_as(kinds[of[0]].model_fields[name].annotation) | None, text, panel)
    return options


def _default(shape: type[ModuleConfig], name: str) -> str:
    value = shape.model_fields[name].default
    return "" if value is None or value is False else f"  [default: {value}]"


def _written_as(hint: Any) -> Any:
    """The type of an option for a field of this type: of several types the first; several numbers are written as one
    text."""
    while get_origin(hint) in (Union, UnionType, Annotated):
        hint = get_args(hint)[0]
    return str if get_origin(hint) in (tuple, dict, Literal) else hint


def given_options(context: typer.Context, config: Any) -> dict[str, Any]:
    """Those fields of a config that were spelled out on the command line."""
    sources = {f.name: context.get_parameter_source(f.name) for f in fields(config)}
    given = {name: getattr(config, name) for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    # A number of tokens that was settled earlier would make --epochs of no effect.
    return given if "epochs" not in given else {"tokens": None, **given}


def refuse_beside(what: str, *others: str) -> None:
    """
    Raises:
        ConfigError: there are others, which would be of no effect.
    """
    if others:
        raise ConfigError(f"{what} trains nothing, so that {others[0]} is of no effect; leave out one of them")


def token_count(tokens: str | None) -> int | None:
    """The number behind --tokens of a command that trains nothing, e.g. 50k.

    Raises:
        ConfigError: fewer than 2.
    """
    if tokens is None:
        return None
    count = parse_count(tokens, "tokens")
    if count < 2:
        raise ConfigError(f"--tokens is {tokens}; it must be at least 2")
    return count


def _field_docs(config: type) -> dict[str, str]:
    """The `Attributes:` of a config class and of its parents: one sentence or two a field."""
    docs: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        _, _, listed = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
        for entry in re.split(r"\n(?=    \S)", listed):
            names, colon, text = entry.strip().partition(": ")
            if colon and all(n.isidentifier() for n in names.split(", ")):
                docs |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return docs


def spread(arguments: Sequence[str]) -> list[str]:
    """Lets --data and --general take several values: `--data a b` becomes `--data a --data b`."""
    found: list[str] = []
    many: str | None = None
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option in ("--data", "--general"):
            many, first = option, True
            if equals:
                found += [many, value]
                first = False
            continue
        if argument.startswith("-") and argument != "-":
            if many is not None and first:
                found.append(many)  # without a value: click says what is missing
            many = None
        if many is not None:
            found += [many, argument]
            first = False
        else:
            found.append(argument)
    if many is not None and first:
        found.append(many)
    return found
