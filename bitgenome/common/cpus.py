"""Counts the CPU cores that this process may use."""

import os
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # CPU time of this container: microseconds (or "max") per period


def usable_cpus(quota: Path = CPU_QUOTA) -> int:
    """Return the number of CPU cores that this process may use, at least 1.

    The process's affinity and the container's CPU quota bound it, not just the machine. ``quota`` is the cgroup file
    cpu.max.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        microseconds, period = quota.read_text(encoding="ascii").split()
        return max(1, min(cores, int(microseconds) // int(period)))
    except (OSError, ValueError):  # no container, or a container without a quota
        return cores
