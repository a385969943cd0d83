"""Commands that make something: a base, a store, a module, a router, the demo."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from growlm.cli.app import app
from growlm.cli.options import DataPaths, Device, Json, OutPath, Restart, SomeDataPaths, StorePath, from_config
from growlm.cli.output import note, plural, print_json, reports
from growlm.errors import ConfigError
from growlm.training.config import GrowConfig, LearnConfig, PretrainConfig, RouterConfig
from growlm.units import format_count, format_size


@app.command()
@reports("out")
@from_config(PretrainConfig)
def pretrain(
    out: OutPath,
    data: DataPaths,
    config: Any,
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """Train a small base model from scratch: tokenizer and weights, an ordinary transformers checkpoint.

    Run the same command again to go on after Ctrl-C or a kill.

    Examples:

        growlm pretrain base/ --data notes/ more.jsonl --preset small --tokens 4M

        growlm pretrain base/ --data text.parquet --config my-model/config.json --epochs 2
    """
    from growlm.training.pretrain import pretrain as run

    result = run(out, data, config, restart=restart)
    if as_json:
        return print_json(result.to_json())
    print(
        f"{out}: {format_count(result.parameters)} parameters, vocabulary {result.vocab_size:,}; held-out loss "
        f"{result.loss_before:.3f} -> {result.loss_after:.3f} after {result.tokens:,} tokens "
        f"({result.tokens_per_second:,.0f} tokens/s)"
    )
    return None


@app.command()
@reports("store")
def new(
    store: StorePath,
    base: Annotated[str, typer.Option("--base", help="Checkpoint folder, or a hub id.", show_default=False)],
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto.")] = "auto",
    router: Annotated[
        str,
        typer.Option(
            "--router",
            help="gaussian (grows domain by domain), product-key (the same, for very many) or transformer (trained on "
            "kept text).",
        ),
    ] = "gaussian",
    keep_samples: Annotated[
        str | None,
        typer.Option(
            "--keep-samples",
            metavar="SIZE",
            help="Text of every module that is kept for the router; by default 2MB for a transformer, else none.",
        ),
    ] = None,
    general: Annotated[
        list[str] | None,
        typer.Option(
            "--general",
            metavar="PATH...",
            help="General text, from which the router learns what belongs to no module; up to 512 passages of it stay "
            "in the store. By default the held-out text beside the base, or else text that the base writes.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="Where --general is read: cpu, cuda, cuda:N, mps or auto.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Make a store for a base model.

    Examples:

        growlm new brain --base base/

        growlm new brain --base Qwen/Qwen2.5-0.5B --dtype bfloat16 --general news.jsonl

        growlm new brain --base base/ --router transformer --keep-samples 2MB
    """
    from growlm.store import Store

    if general:
        from growlm.base.placement import find_device

        find_device(device)  # before anything is made
    elif device != "auto":
        raise ConfigError("--device is where --general is read; give general text, or leave it out")
    missing = [path for path in (store.expanduser(), *store.expanduser().parents) if not path.exists()]
    made = Store.create(store, base, dtype=dtype, router=router, keep_samples=keep_samples)
    if general:
        from growlm.training.general import describe_general

        with _undone_on_failure(made.path, missing):
            describe_general(made, made.load_base(device=device), made.load_tokenizer(), general)
    if as_json:
        return print_json(made.manifest.model_dump())
    print(f"{store}: made for {base} ({made.manifest.dtype}, {format_size(made.base_bytes())})")
    return None


@app.command()
@reports("name")
@from_config(LearnConfig)
def learn(
    store: StorePath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the module.", show_default=False)],
    data: DataPaths,
    config: Any,
    update: Annotated[bool, typer.Option("--update", help="NAME exists: learn its next version.")] = False,
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """Learn a body of text as a new module. The base and all other modules keep their bytes.

    Run the same command again to go on after Ctrl-C or a kill.

    Examples:

        growlm learn brain medicine --data pubmed.jsonl

        growlm learn brain law --data statutes/ --epochs 3 --placement interleaved
    """
    from growlm.store import Store
    from growlm.training.learn import learn as run

    result = run(Store.open(store), name, data, config, update=update, restart=restart)
    if as_json:
        return print_json(result.to_json())
    print(
        f"{name} version {result.version}: held-out loss {result.loss_before:.3f} -> {result.loss_after:.3f} after "
        f"{result.tokens:,} tokens in {result.seconds:,.0f} s ({result.tokens_per_second:,.0f} tokens/s)"
        + (f"; router version {result.router}" if result.router else "")
    )
    if result.loss_after > result.loss_before:
        note(f"{name} does worse than the base on its own held-out text: give more text or --epochs, or remove it")
    return None


@app.command()
@reports("name")
@from_config(GrowConfig)
def grow(
    context: typer.Context,
    store: StorePath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of a module of kind peer.", show_default=False)],
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
    """Append experts to a learned module of kind peer, train new ones on new text, or take the last step back.

    What the module has learned keeps its bits. Without --data it answers as before until the new experts are trained;
    without --experts those are trained that were appended before. Each is the module's next version, and the one before
    stays, so that nothing is asked. Run a training again to go on after Ctrl-C or a kill.

    Examples:

        growlm grow brain law --experts +4096 --data statutes-2027/

        growlm grow brain law --experts +4096

        growlm grow brain law --data statutes-2027/ --epochs 3

        growlm grow brain law --undo
    """
    from growlm.store import Store
    from growlm.training import grow as growth

    given = _given(context, config).items()
    used = ("seed", "device")  # without training too
    trains = [f"--{field.replace('_', '-')}" for field, value in given if field not in used and value is not None]
    if undo:
        asked = {"--experts": experts, "--data": data, "--restart": restart}
        _refuse_beside("--undo", *(option for option, value in asked.items() if value), *trains)
        result = growth.take_back(Store.open(store), name, device=config.device)
    else:
        if experts is not None and not data:
            _refuse_beside("--experts without --data", *trains, *(["--restart"] if restart else []))
        result = growth.grow(Store.open(store), name, experts, data or (), config, restart=restart)
    if as_json:
        return print_json(result.to_json())
    line = f"{name} version {result.version}: {result.experts_before:,} -> {result.experts:,} experts"
    if result.loss_before is not None and result.loss_after is not None:
        line += (
            f"; held-out loss {result.loss_before:.3f} -> {result.loss_after:.3f} after {result.tokens:,} tokens in "
            f"{result.seconds:,.0f} s ({result.tokens_per_second:,.0f} tokens/s)"
            + (f"; router version {result.router}" if result.router else "")
        )
    elif result.experts_open < result.experts:
        line += f", {result.experts - result.experts_open:,} of them not trained: it answers as before"
    print(line)
    if result.loss_before is not None and result.loss_after is not None and result.loss_after > result.loss_before:
        note(f"{name} does worse on the new held-out text than before: give more text or --epochs, or --undo")
    return None


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
    """Show which router a store has; change it, train it, or roll it back.

    Run a training again to go on after Ctrl-C or a kill. Settings that are not given are those of the newest version.

    Examples:

        growlm router brain

        growlm router brain --kind product-key

        growlm router brain --kind transformer --router-layers 4

        growlm router brain --remove-version 3
    """
    from growlm.router import load_router
    from growlm.store import ROUTER_INDEX, Store
    from growlm.training.router import describe_router, last_config, train_router

    given = _given(context, config)
    if kind != "transformer":
        what = f"--kind {kind}" if kind else "this command without --kind transformer"
        trains = [f"--{field.replace('_', '-')}" for field, value in given.items() if value is not None]
        _refuse_beside(what, *trains, *(["--restart"] if restart else []))
    opened = Store.open(store)
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
    print(f"{found['kind']}: chooses among {found['knows']} of {plural(found['modules'], 'module')}")
    if found["unknown"]:
        cure = f"; growlm router {store} --kind transformer trains anew" if found["kind"] == "transformer" else ""
        print(f"never chosen: {', '.join(found['unknown'][:10])}{cure}")
    if found["outdated"]:
        print(f"chosen by the text of an earlier version: {', '.join(found['outdated'][:10])}")
    for version in found["versions"]:
        accuracy = "no text held out" if version["accuracy"] is None else f"{version['accuracy']:.1%} on held-out text"
        print(
            f"  transformer version {version['version']}: {plural(version['modules'], 'module')}, "
            f"{format_size(version['bytes'])}, {accuracy}"
        )
    return None


@app.command()
@reports("out")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for base, store and report.")] = Path("demo-out"),
    minutes: Annotated[
        float, typer.Option("--minutes", help="In which it ends: it measures this machine, and does as much as fits.")
    ] = 10.0,
    fast: Annotated[
        bool, typer.Option("--fast", help="A small base and little text, as much on any machine: a minute or two.")
    ] = False,
    device: Device = "auto",
    precision: Annotated[
        str, typer.Option("--precision", metavar="auto|bfloat16|float32", help="Of training's matrix products.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Grow a model from text that is already on this machine: pretrain, learn three domains, evaluate, report.

    Exit status 1 if a module does not halve its domain's perplexity.

    Examples:

        growlm demo

        growlm demo --minutes 3

        growlm demo --fast
    """
    from growlm.demo.run import demo as run

    result = run(out, fast=fast, minutes=minutes, device=device, precision=precision)
    if as_json:
        print_json(result.to_json())
    else:
        print("\n".join(result.lines()))
    if result.not_halved:
        raise typer.Exit(1)


def _refuse_beside(what: str, *others: str) -> None:
    """
    Raises:
        ConfigError: there are others, which would be of no effect.
    """
    if others:
        raise ConfigError(f"{what} trains nothing, so that {others[0]} is of no effect; leave out one of them")


def _given(context: typer.Context, config: Any) -> dict[str, Any]:
    """Those fields of a config that were spelled out on the command line."""
    sources = {f.name: context.get_parameter_source(f.name) for f in fields(config)}
    given = {name: getattr(config, name) for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    # A number of tokens that was settled earlier would make --epochs of no effect.
    return given if "epochs" not in given else {"tokens": None, **given}


@contextmanager
def _undone_on_failure(folder: Path, made: Sequence[Path]) -> Iterator[None]:
    """If what follows fails, takes away what was put into a folder that was empty or not there.

    Args:
        made: of the folder and those above it those that were not there before, the deepest first.
    """
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for path in list(folder.iterdir()):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            for path in made:
                path.rmdir()
        raise
