"""Job process: a command that ends with the server that began it.

`python -m growlm.server.job_process learn STORE ...` is `growlm learn STORE ...`, interrupted as by Ctrl-C once its
standard input ends.
"""

from growlm.cli.main import main
from growlm.following import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    main()
