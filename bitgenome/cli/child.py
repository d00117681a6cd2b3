"""Runs the command line as ``python -m bitgenome.cli.child PID ARGUMENTS``, and ends it once process PID is gone.

It is for processes that another one starts and watches: a parent that is killed cannot end them itself.
"""

import os
import signal
import sys
import threading
import time

from bitgenome.batch.children import GRACE_S
from bitgenome.cli.main import main

LOOK_EVERY_S = 1.0


def watch(parent: int) -> None:
    """Send this process SIGTERM once ``parent`` is not its parent any more.

    SIGKILL follows GRACE_S seconds later if it still runs.
    """
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=watch, args=(int(sys.argv.pop(1)),), name="parent", daemon=True).start()
    main()
