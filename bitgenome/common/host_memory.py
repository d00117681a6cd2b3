"""What this process takes of the host's memory; imports nothing heavy."""

import resource
import sys

UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of getrusage(2)


def peak_host_memory() -> int:
    """Bytes that this process has held at most."""
    return UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
