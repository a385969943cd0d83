"""Commands that ask a store: which module, an answer, a conversation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from growlm.cli.app import app
from growlm.cli.options import (
    Device,
    ExpertsOn,
    Json,
    MaxNewTokens,
    Memory,
    ModuleChoice,
    RowCache,
    Seed,
    StorePath,
    Strict,
    TopP,
)
from growlm.cli.output import name_of, note, print_json, print_stream, reports
from growlm.errors import GrowlmError
from growlm.progress import phase, reporting
from growlm.units import format_size

_CHAT_HELP = "/module NAME (or several), /module base, /module auto, /new, /quit"


@app.command()
@reports("store")
def route(
    store: StorePath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", show_default=False)],
    memory: Memory = None,
    device: Device = "auto",
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Say which module the router would choose for a prompt.

    Example:

        growlm route brain "What does aspirin inhibit?"
    """
    with _engine(store, memory, device, strict=strict) as engine:
        answer = engine.route(prompt)
    if as_json:
        return print_json({"module": answer.module, "scores": answer.scores})
    print(answer.module or "none of the modules")
    for name, score in list(answer.scores.items())[:10]:
        print(f"  {score:6.1%}  {name}")
    return None


@app.command()
def generate(
    store: StorePath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", show_default=False)],
    module: ModuleChoice = None,
    memory: Memory = None,
    device: Device = "auto",
    experts_on: ExpertsOn = "memory",
    row_cache: RowCache = None,
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
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Answer a prompt with the module that the router chooses, or with those that are named, as it is written.

    Examples:

        growlm generate brain "What does aspirin inhibit?" --memory 2GB

        growlm generate brain "Article 1." --module law --temperature 0.8 --top-p 0.95 --seed 7

        growlm generate brain "Der Mieter" --module german --module law

        growlm generate brain "The patient sued the hospital because" --mix 2

        growlm generate brain "Once upon a time" --module tales --memory 1GB --experts-on disk --row-cache 200MB
    """
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    wanted = _modules(module)
    with _engine(store, memory, device, experts_on, row_cache, strict) as engine:
        if as_json:
            with reporting(name_of(store)), phase("answering"):
                answer = engine.generate(prompt, module=wanted, mix=mix, reroute=reroute, **sampling)
            return print_json(answer.to_json())
        pieces = engine.stream(prompt, module=wanted, mix=mix, reroute=reroute, **sampling)
        result = print_stream(pieces, name_of(store))
    writers = result.module or "base"
    if result.mixture:
        writers = ", ".join(f"{name} {share:.0%}" for name, share in result.mixture.items())
    elif len(result.changes) > 1:
        writers = ", ".join(f"{name or 'base'} from token {at}" for at, name in result.changes)
    note(
        f"[{writers}; {format_size(result.resident_bytes)} of weights in memory"
        f"{'; loaded ' + ', '.join(result.loaded) if result.loaded else ''}]"
    )
    return None


@app.command()
def chat(
    store: StorePath,
    module: ModuleChoice = None,
    memory: Memory = None,
    device: Device = "auto",
    experts_on: ExpertsOn = "memory",
    row_cache: RowCache = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    strict: Strict = False,
) -> None:
    """Talk to a store. Every turn is routed anew; /module NAME fixes one, /module auto undoes it, /new begins anew.

    Example:

        growlm chat brain --memory 2GB
    """
    from growlm.engine.chat import Chat

    with _engine(store, memory, device, experts_on, row_cache, strict) as engine:
        talk = Chat(engine, _modules(module), max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        note(_CHAT_HELP)
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
                    talk.choose(_modules(line.split()[1:]))
                elif line.startswith("/"):
                    note(_CHAT_HELP)
                elif line:
                    turn += 1
                    result = print_stream(talk.say(line, seed=seed + turn), name_of(store))
                    note(f"[{result.module or 'base'}]")
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                note("\n[stopped]")  # this answer, not the conversation
            except GrowlmError as error:
                failed = True
                note(f"error: {error}")


def _engine(
    store: Path,
    memory: str | None,
    device: str,
    experts_on: str = "memory",
    row_cache: str | None = None,
    strict: bool = False,
) -> Any:
    with reporting(name_of(store)):
        from growlm.engine import Engine
        from growlm.store import Store

        return Engine(
            Store.open(store), memory=memory, device=device, experts_on=experts_on, row_cache=row_cache, strict=strict
        )


def _modules(names: list[str] | None) -> list[str | None] | str:
    return [None if name == "base" else name for name in names] if names else "auto"
