"""Command line: one command per verb, each in its file under `commands/`. Parses, calls, prints; computes nothing.

Results go to stdout, progress to stderr; errors take one line and exit with status 1. A command's file imports what is
heavy inside the command, so that `--help` is quick.
"""

from growlm.cli import commands  # noqa: F401  registers every verb
from growlm.cli.app import app
from growlm.cli.main import main

__all__ = ["app", "main"]
