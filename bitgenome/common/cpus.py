"""How many processors this process may use."""

import os
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of this container: microseconds and their period, or "max"


def usable_cpus(quota: Path = CPU_QUOTA) -> int:
    """Cores that this process may use: of its affinity and its container's quota, not all that the machine has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        microseconds, period = quota.read_text(encoding="ascii").split()
        return max(1, min(cores, int(microseconds) // int(period)))
    except (OSError, ValueError):  # no container, or one without a quota
        return cores
