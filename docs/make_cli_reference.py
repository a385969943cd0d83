"""Writes docs/cli.md from the command line's own help, so that the two cannot differ.

    python docs/make_cli_reference.py           write docs/cli.md
    python docs/make_cli_reference.py --check   exit with status 1 if docs/cli.md is not what would be written

The help is laid out for a width that is given here: the terminal, its width and its colours have no say.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from growlm.cli import app

WIDTH = 100
REFERENCE = Path(__file__).with_name("cli.md")
_HEAD = """\
# Command line

What `growlm --help` and `growlm COMMAND --help` print. Written by `docs/make_cli_reference.py`: change the help in
`src/growlm/cli/`, or the docstrings in `training/config.py`, `modules/shapes.py` or `evaluation/config.py`, and run it
again.
"""


def helps(command: Any, name: str, parent: Any = None) -> Iterator[tuple[str, str]]:
    """(command path, its help) of a command and of all commands below it, in the order of its help."""
    context = command.context_class(
        command, info_name=name, parent=parent, terminal_width=WIDTH, **command.context_settings
    )
    yield context.command_path, command.get_help(context)
    for child in getattr(command, "commands", {}).values():
        if not child.hidden:
            yield from helps(child, child.name, context)


def reference() -> str:
    """The whole of docs/cli.md."""
    found = list(helps(typer.main.get_command(app), "growlm"))
    links = [f"- [`{path}`](#{path.replace(' ', '-')})" for path, _ in found]
    parts = [_HEAD, "\n".join(links) + "\n"]
    for path, text in found:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text)  # no colours, whatever the terminal is said to be
        lines = "\n".join(line.rstrip() for line in plain.strip().splitlines())
        parts.append(f"## {path}\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/cli.md from the command line's own help.")
    parser.add_argument("--check", action="store_true", help="Write nothing; exit with status 1 if it is stale.")
    check = parser.parse_args().check
    text = reference()
    if not check:
        REFERENCE.write_text(text, encoding="utf-8", newline="\n")
        return 0
    if not REFERENCE.is_file() or REFERENCE.read_text(encoding="utf-8") != text:
        print("docs/cli.md is not what the help says; run python docs/make_cli_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
