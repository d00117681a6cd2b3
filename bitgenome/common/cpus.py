"""Counts the CPU cores that this process may use."""

import os
from pathlib import Path

from bitgenome.common.cgroups import MEMBERSHIPS, MOUNT, cpu_quotas


def usable_cpus(mount: Path = MOUNT, memberships: Path = MEMBERSHIPS) -> int:
    """Return the number of CPU cores that this process may use, at least 1.

    Its affinity and the CPU quotas of its control groups bound it, not just the machine: a pod of 4 CPUs on a node of
    128 has 4.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([cores, *cpu_quotas(mount, memberships)])))
