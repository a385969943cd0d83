"""growlm chat."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from growlm.cli.app import app
from growlm.cli.asking import module_names, none_because, open_engine, require_looks
from growlm.cli.options import (
    Device,
    ExpertsOn,
    MaxNewTokens,
    Memory,
    ModuleChoice,
    RowCache,
    SecondLook,
    Seed,
    StorePath,
    Strict,
    TopP,
)
from growlm.cli.output import name_of, note, print_stream
from growlm.errors import GrowlmError

_CHAT_HELP = "/module NAME (or several), /module base, /module auto, /new, /quit"


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
    second_look: SecondLook = False,
    strict: Strict = False,
) -> None:
    """Talk to a store. Every turn is routed anew; /module NAME fixes one, /module auto undoes it, /new begins anew.

    Example:

        growlm chat brain --memory 2GB
    """
    wanted = module_names(module)
    require_looks(second_look, module=wanted != ["auto"])
    with open_engine(store, memory, device, experts_on, row_cache, strict, wanted, second_look=second_look) as engine:
        from growlm.engine.chat import Chat

        talk = Chat(engine, wanted, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
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
                elif line == "/module":
                    note(f"give one or several of {', '.join(engine.store.modules) or 'none, the store is empty'}")
                elif line.split()[:1] == ["/module"]:
                    talk.choose(module_names(line.split()[1:]))
                elif line.startswith("/"):
                    note(f"{line.split()[0]}: no such command; there are {_CHAT_HELP}")
                elif line:
                    turn += 1
                    result = print_stream(talk.say(line, seed=seed + turn), name_of(store))
                    why = f": {none_because(result.refused)}" if result.refused else ""
                    note(f"[{result.module or 'base'}{why}]")
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                note("\n[stopped]")  # this answer, not the conversation
            except GrowlmError as error:
                failed = True
                note(f"error: {error}")
