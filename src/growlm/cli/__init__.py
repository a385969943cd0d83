"""Command line: one command per verb. Parses, calls, prints; computes nothing.

Results go to stdout, progress to stderr; errors take one line and exit with status 1. A command's file imports what is
heavy inside the command, so that `--help` is quick.
"""

# Each registers its commands, in the order of `growlm --help`.
# isort: off
from growlm.cli import make, ask, measure, keep, surgery, doctor  # noqa: F401

# isort: on
from growlm.cli.app import app
from growlm.cli.main import main

__all__ = ["app", "main"]
