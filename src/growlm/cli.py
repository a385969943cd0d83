"""Command line: one command per verb. Parses, calls, prints; computes nothing.

Results go to stdout, progress to stderr; errors take one line and exit with status 1.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from growlm import __version__
from growlm.cli_options import (
    DataPaths,
    Json,
    MaxNewTokens,
    Memory,
    ModuleChoice,
    Seed,
    StorePath,
    TopP,
    Yes,
    from_config,
    spread,
)
from growlm.errors import ConfigError, GrowlmError
from growlm.evaluation.config import EvalConfig
from growlm.training.config import LearnConfig, PretrainConfig, RouterConfig
from growlm.units import format_count, format_size

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
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


# Typer brings a click of its own or uses the installed one: take the base class from what it raises.
ClickError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


@app.command()
@from_config(PretrainConfig)
def pretrain(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the checkpoint.", show_default=False)],
    data: DataPaths,
    config: Any,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew instead of resuming.")] = False,
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
        return _print_json(result.to_json())
    print(
        f"{out}: {format_count(result.parameters)} parameters, vocabulary {result.vocab_size:,}; held-out loss "
        f"{result.loss_before:.3f} -> {result.loss_after:.3f} after {result.tokens:,} tokens "
        f"({result.tokens_per_second:,.0f} tokens/s)"
    )
    return None


@app.command()
def new(
    store: StorePath,
    base: Annotated[str, typer.Option("--base", help="Checkpoint folder, or a hub id.", show_default=False)],
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto.")] = "auto",
    router: Annotated[
        str, typer.Option("--router", help="gaussian (grows domain by domain) or transformer (trained on kept text).")
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
            help="General text, from which the router learns what belongs to no module. By default the held-out text "
            "beside the base, or else text that the base writes.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a store for a base model.

    Examples:

        growlm new brain --base base/

        growlm new brain --base Qwen/Qwen2.5-0.5B --dtype bfloat16 --general news.jsonl

        growlm new brain --base base/ --router transformer --keep-samples 2MB
    """
    from growlm.store import Store

    missing = [path for path in (store.expanduser(), *store.expanduser().parents) if not path.exists()]
    made = Store.create(store, base, dtype=dtype, router=router, keep_samples=keep_samples)
    if general:
        from growlm.training.general import describe_general

        with _undone_on_failure(made.path, missing):
            describe_general(made, made.load_base(), made.load_tokenizer(), general)
    if as_json:
        return _print_json(made.manifest.model_dump())
    print(f"{store}: made for {base} ({made.manifest.dtype}, {format_size(made.base_bytes())})")
    return None


@app.command()
@from_config(LearnConfig)
def learn(
    store: StorePath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the module.", show_default=False)],
    data: DataPaths,
    config: Any,
    update: Annotated[bool, typer.Option("--update", help="NAME exists: learn its next version.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew instead of resuming.")] = False,
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
        return _print_json(result.to_json())
    print(
        f"{name} version {result.version}: held-out loss {result.loss_before:.3f} -> {result.loss_after:.3f} after "
        f"{result.tokens:,} tokens in {result.seconds:,.0f} s ({result.tokens_per_second:,.0f} tokens/s)"
        + (f"; router version {result.router}" if result.router else "")
    )
    if result.loss_after > result.loss_before:
        _note(f"{name} does worse than the base on its own held-out text: give more text or --epochs, or remove it")
    return None


@app.command()
def route(
    store: StorePath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", show_default=False)],
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Say which module the router would choose for a prompt.

    Example:

        growlm route brain "What does aspirin inhibit?"
    """
    with _engine(store, memory) as engine:
        answer = engine.route(prompt)
    if as_json:
        return _print_json({"module": answer.module, "scores": answer.scores})
    print(answer.module or "none of the modules")
    for name, score in list(answer.scores.items())[:10]:
        print(f"  {score:6.1%}  {name}")
    return None


@app.command()
@from_config(RouterConfig)
def router(
    store: StorePath,
    config: Any,
    kind: Annotated[
        str | None,
        typer.Option("--kind", help="Change to gaussian, or train a transformer and change to it.", show_default=False),
    ] = None,
    remove_version: Annotated[
        int | None,
        typer.Option("--remove-version", help="Of the transformer: the newest, to roll back.", show_default=False),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin training anew instead of resuming.")] = False,
    as_json: Json = False,
) -> None:
    """Show which router a store has; change it, train it, or roll it back.

    Run a training again to go on after Ctrl-C or a kill.

    Examples:

        growlm router brain

        growlm router brain --kind transformer --router-layers 4

        growlm router brain --remove-version 3
    """
    from growlm.store import Store
    from growlm.training.router import describe_router, train_router

    opened = Store.open(store)
    if remove_version is not None:
        opened.remove_router_version(remove_version)
    if kind == "transformer":
        train_router(opened, config, restart=restart)
    if kind is not None:
        opened.set_router(kind)
    found = describe_router(opened)
    if as_json:
        return _print_json(found)
    print(f"{found['kind']}: chooses among {found['knows']} of {_plural(found['modules'], 'module')}")
    if found["unknown"]:
        cure = f"; growlm router {store} --kind transformer trains anew" if found["kind"] == "transformer" else ""
        print(f"never chosen: {', '.join(found['unknown'][:10])}{cure}")
    for version in found["versions"]:
        accuracy = "no text held out" if version["accuracy"] is None else f"{version['accuracy']:.1%} on held-out text"
        print(
            f"  transformer version {version['version']}: {_plural(version['modules'], 'module')}, "
            f"{format_size(version['bytes'])}, {accuracy}"
        )
    return None


@app.command()
def generate(
    store: StorePath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", show_default=False)],
    module: ModuleChoice = "auto",
    memory: Memory = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="0 keeps all.")] = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text that ends the answer; repeatable.")] = None,
    mix: Annotated[
        int, typer.Option("--mix", help="Let so many of the best modules write together, by how well each predicts.")
    ] = 1,
    reroute: Annotated[
        int, typer.Option("--reroute", help="Choose the module anew after every so many tokens; 0 chooses once.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Answer a prompt with the module that the router chooses, as it is written.

    Examples:

        growlm generate brain "What does aspirin inhibit?" --memory 2GB

        growlm generate brain "Article 1." --module law --temperature 0.8 --top-p 0.95 --seed 7

        growlm generate brain "The patient sued the hospital because" --mix 2
    """
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    with _engine(store, memory) as engine:
        if as_json:
            answer = engine.generate(prompt, module=_module(module), mix=mix, reroute=reroute, **sampling)
            return _print_json(answer.to_json())
        result = _print_stream(engine.stream(prompt, module=_module(module), mix=mix, reroute=reroute, **sampling))
    writers = result.module or "base"
    if result.mixture:
        writers = ", ".join(f"{name} {share:.0%}" for name, share in result.mixture.items())
    elif len(result.changes) > 1:
        writers = ", ".join(f"{name or 'base'} from token {at}" for at, name in result.changes)
    _note(
        f"[{writers}; {format_size(result.resident_bytes)} of weights in memory"
        f"{'; loaded ' + ', '.join(result.loaded) if result.loaded else ''}]"
    )
    return None


@app.command()
def chat(
    store: StorePath,
    module: ModuleChoice = "auto",
    memory: Memory = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
) -> None:
    """Talk to a store. Every turn is routed anew; /module NAME fixes one, /module auto undoes it, /new begins anew.

    Example:

        growlm chat brain --memory 2GB
    """
    from growlm.chat import Chat

    with _engine(store, memory) as engine:
        talk = Chat(engine, _module(module), max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        _note(_CHAT_HELP)
        turn, failed = 0, False
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                if failed and not sys.stdin.isatty():
                    raise typer.Exit(1) from None
                return
            try:
                if line in ("/quit", "/exit"):
                    return
                if line == "/new":
                    talk.reset()
                elif line.split()[:1] == ["/module"]:
                    talk.choose(_module(line.removeprefix("/module").strip() or "auto"))
                elif line.startswith("/"):
                    _note(_CHAT_HELP)
                elif line:
                    turn += 1
                    result = _print_stream(talk.say(line, seed=seed + turn))
                    _note(f"[{result.module or 'base'}]")
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                _note("\n[stopped]")  # this answer, not the conversation
            except GrowlmError as error:
                failed = True
                _note(f"error: {error}")


@app.command(name="eval")
@from_config(EvalConfig)
def evaluate(
    store: StorePath,
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="NAME=PATH...",
            help="Held-out text by module; none=PATH is text that belongs to no module.",
            show_default=False,
        ),
    ],
    config: Any,
    report: Annotated[Path | None, typer.Option("--report", help="Write a page with figures to this folder.")] = None,
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity, routing and forgetting on held-out text.

    Examples:

        growlm eval brain --data medicine=heldout.txt law=heldout2.txt --report report/

        growlm eval brain --data law=heldout2.txt none=news.txt --json
    """
    from growlm.evaluation import evaluate as run
    from growlm.store import Store

    paths: dict[str, list[str]] = {}
    for item in data:
        name, equals, path = item.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"--data {item!r}: write it as NAME=PATH, e.g. medicine=heldout.txt")
        paths.setdefault(name, []).append(path)
    if report is not None:
        from growlm.evaluation.report import check_folder, write_report

        check_folder(report)
    result = run(Store.open(store), dict(paths), config, memory=memory).to_json()
    if report is not None:
        page = write_report(result, report)
        _note(f"report: {page}")
    if as_json:
        return _print_json(result)
    from growlm.evaluation.summary import summary

    print("\n".join(summary(result)))
    return None


@app.command()
def status(store: StorePath, as_json: Json = False) -> None:
    """List a store's modules, their sizes, and what is active for a prompt.

    Example:

        growlm status brain
    """
    from growlm.store import Store

    found = Store.open(store).status()
    if as_json:
        return _print_json(found)
    print(f"base {found['base']}: {format_count(found['base_parameters'])} parameters")
    width = max((len(m["name"]) for m in found["modules"]), default=0)
    for m in found["modules"]:
        print(
            f"  {m['name']:<{width}}  version {m['version']}  {m['kind']}  {format_size(m['bytes']):>9}  "
            f"{format_count(m['parameters'])} parameters"
        )
    print(
        f"total {format_count(found['total_parameters'])} parameters, active at most "
        f"{format_count(found['active_parameters'])}"
    )
    return None


@app.command()
def verify(store: StorePath, as_json: Json = False) -> None:
    """Read every file of a store and name each that is not what it should be.

    Example:

        growlm verify brain
    """
    from growlm.store import Store

    opened = Store.open(store)
    problems = opened.verify()
    if as_json:
        _print_json({"ok": not problems, "problems": problems})
    elif not problems:
        print(f"{store}: {_plural(len(opened.modules), 'module')}, every file as it should be")
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
            _note("")  # ends the question's line
            raise ConfigError("interrupted; nothing was changed") from None
        if not sure:
            raise typer.Exit(1)
    opened.remove(name, version)
    if as_json:
        return _print_json({"removed": name, "version": current.version})
    print(f"removed {name}")
    return None


@app.command()
def export(
    store: StorePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the checkpoint.", show_default=False)],
    module: Annotated[str, typer.Option("--module", metavar="NAME", show_default=False)],
    version: Annotated[int | None, typer.Option("--version", help="By default the current one.")] = None,
    as_json: Json = False,
) -> None:
    """Write the base with one module as an ordinary transformers checkpoint, for any engine.

    Example:

        growlm export brain out/ --module medicine
    """
    from growlm.modules.export import export as run
    from growlm.store import Store

    path = run(Store.open(store), out, module, version=version)
    if as_json:
        return _print_json({"path": str(path), "module": module})
    print(f'{path}: base and {module}; load it with AutoModelForCausalLM.from_pretrained("{path}")')
    return None


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for base, store and report.")] = Path("demo-out"),
    fast: Annotated[bool, typer.Option("--fast", help="A smaller base and less text: under two minutes.")] = False,
    as_json: Json = False,
) -> None:
    """Grow a model from text that is already on this machine: pretrain, learn three domains, evaluate, report.

    Example:

        growlm demo --fast
    """
    from growlm.demo.run import demo as run

    result = run(out, fast=fast)
    if as_json:
        return _print_json(result.to_json())
    print("\n".join(result.lines()))
    return None


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version."""
    if as_json:
        return _print_json({"growlm": __version__})
    print(__version__)
    return None


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


def _engine(store: Path, memory: str | None) -> Any:
    from growlm.engine import Engine
    from growlm.store import Store

    return Engine(Store.open(store), memory=memory)


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _module(name: str) -> str | None:
    return None if name == "base" else name


def _print_stream(pieces: Any) -> Any:
    """Prints the texts as they come; returns what comes last. Reads to the end: only then has the stream finished."""
    result = None
    for piece in pieces:
        if isinstance(piece, str):
            print(piece, end="", flush=True)
        else:
            result = piece
    print(flush=True)
    assert result is not None
    return result


def _print_json(content: Any) -> None:
    # JSON has no nan: the loss of a module that diverged is null.
    plain = json.loads(json.dumps(content), parse_constant=lambda name: None)
    print(json.dumps(plain, ensure_ascii=False))


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_CHAT_HELP = "/module NAME, /module base, /module auto, /new, /quit"
_RESUMED = ("pretrain", "learn", "router", "demo")  # commands that save as they go


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: every error that a user or a file can cause becomes one line and a non-zero exit status."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = app(spread(given), prog_name="growlm", standalone_mode=False)
        if status == 130:  # typer's own word for Ctrl-C
            raise KeyboardInterrupt
        sys.exit(status if isinstance(status, int) else 0)
    except ClickError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "growlm"
        if context and type(error).__name__ == "NoArgsIsHelpError":
            print(context.get_help())
        else:
            _note(f"{command}: {' '.join(error.format_message().split()).rstrip('.')}; see {command} --help")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        saved = given and given[0] in _RESUMED
        _note(f"growlm: interrupted{'; what was saved is kept: run the same command again to go on' if saved else ''}")
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except GrowlmError as error:
        _note(f"growlm: {error}")
        sys.exit(1)
    except OSError as error:
        where = Path(str(error.filename or "a file"))
        if where.name.startswith("."):  # one of ours, written beside what was asked for
            where = where.parent
        _note(f"growlm: {where}: {error.strerror or error}; nothing was written there, choose another place or free it")
        sys.exit(1)
