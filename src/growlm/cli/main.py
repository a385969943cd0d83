"""Entry point: runs a command, and makes one line and an exit status of whatever goes wrong."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import typer

from growlm.cli.app import app
from growlm.cli.launching import GONE, STARTED, leave, of_several, other_rank
from growlm.cli.options import option, spread
from growlm.cli.output import note
from growlm.errors import GrowlmError, GrowlmWarning, Interrupted, RankError, settings_written

# Typer brings a click of its own or uses the installed one: take the base class from what it raises.
ClickError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
_INTERRUPTED = 130  # what shells say of a program that Ctrl-C has ended

# Commands that save as they go.
_RESUMED = ("pretrain", "learn", "finetune", "grow", "router", "demo")

# Commands that several processes share.
_TOGETHER = ("learn", "pretrain", "finetune")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: every error that a user or a file can cause becomes one line and a non-zero exit status."""
    if arguments is None and sys.argv[1:] and sys.argv[1] in _TOGETHER and of_several():
        leave(_status(_main))
    _main(arguments)


def _status(call: Callable[[], None]) -> int:
    """With which a process would exit that calls nothing else."""
    try:
        call()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _main(arguments: Sequence[str] | None = None) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    given = sys.argv[1:] if arguments is None else list(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("always", GrowlmWarning)
        warnings.showwarning = _noting(warnings.showwarning)
        with settings_written(option), _told_once():
            _run(given)


@contextmanager
def _told_once() -> Iterator[None]:
    """Has the first of several ranks alone print what was found."""
    if not other_rank():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def _noting(show: Callable[..., None]) -> Callable[..., None]:
    """Our own warnings are notes; those of others stay as they are."""

    def shown(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, GrowlmWarning):
            note(f"growlm: {message}")
        else:
            show(message, category, *where, **more)

    return shown


def _run(given: Sequence[str]) -> None:
    try:
        status = app(spread(given), prog_name="growlm", standalone_mode=False)
        if status == _INTERRUPTED:  # typer's own word for Ctrl-C
            raise KeyboardInterrupt
        sys.exit(status if isinstance(status, int) else 0)
    except ClickError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "growlm"
        if context and type(error).__name__ == "NoArgsIsHelpError":
            print(context.get_help())
        else:
            note(f"{command}: {' '.join(error.format_message().split()).rstrip('.')}; see {command} --help")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        note(f"growlm: interrupted{_after_interrupt(given)}")
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except RankError as error:
        if STARTED not in os.environ:  # else whoever has started the ranks knows which of them it was
            note(f"growlm: {error}")
        sys.exit(GONE)
    except GrowlmError as error:
        note(f"growlm: {other_rank()}{error}")
        sys.exit(_INTERRUPTED if isinstance(error, Interrupted) else 1)
    except RuntimeError as error:
        from growlm.base.placement import out_of_memory

        told = out_of_memory(error)
        if told is None:
            raise
        note(f"growlm: {told}")
        sys.exit(1)
    except OSError as error:
        where = Path(str(error.filename or "a file"))
        if where.name.startswith("."):  # one of ours, written beside what was asked for
            where = where.parent
        note(f"growlm: {where}: {error.strerror or error}; nothing was written there, choose another place or free it")
        sys.exit(1)


def _after_interrupt(given: Sequence[str]) -> str:
    """What to tell about what was saved."""
    if not given or given[0] not in _RESUMED:
        return ""
    if "--dry-run" in given:
        return "; nothing was changed"
    if given[0] == "grow" and not any(option.startswith("--data") for option in given):
        # It is there wholly or not at all, and once more would be another step.
        return "; growlm status tells whether the module has its next version already"
    return "; what was saved is kept: run the same command again to go on"
