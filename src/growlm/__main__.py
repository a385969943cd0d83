"""`python -m growlm`, as the command `growlm`."""

from growlm.cli.main import main

main()
