"""Measures and frees host memory of this process; imports nothing heavy."""

import gc
import resource
import sys
from typing import Any

UNIT = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss, see getrusage(2)


def peak_host_memory() -> int:
    """Return the most bytes of host memory that this process has held (peak resident set)."""
    return UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def close_all(warm: dict[Any, Any]) -> None:
    """Close the objects of ``warm`` that have a method ``close``, empty it, and collect what refers to itself."""
    while warm:
        close = getattr(warm.popitem()[1], "close", None)
        if close is not None:
            close()
        del close  # it refers to its object
    gc.collect()
