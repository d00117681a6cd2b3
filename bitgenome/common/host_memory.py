"""Measures the host memory of this process; imports nothing heavy."""

import resource
import sys

UNIT = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss, see getrusage(2)


def peak_host_memory() -> int:
    """Return the most bytes of host memory that this process has held (peak resident set)."""
    return UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
