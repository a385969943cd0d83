"""Job process: a command that ends with the server that began it, however that one ends.

`python -m growlm.server.job_process learn STORE ...` is `growlm learn STORE ...`, interrupted as by Ctrl-C once its
standard input ends: the server holds the other end, and the system closes it for a server that was killed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from growlm.cli.main import main

_LEAVES = 15.0  # seconds in which it may keep what it has come to


def _end_with_server() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(_LEAVES)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_server, name="growlm-server-watch", daemon=True).start()
    main()
