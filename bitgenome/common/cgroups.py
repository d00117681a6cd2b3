"""Reads what control groups allow this process: of processors and of memory, in version 2 and in version 1.

A limit of any group above the process's own holds too. Inside a container the own group is usually the root of what is
mounted, whatever path /proc names.
"""

from collections.abc import Iterator
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
MEMBERSHIPS = Path("/proc/self/cgroup")  # lines "number:controllers:path"; version 2 names no controllers


def group_folders(controller: str, mount: Path = MOUNT, memberships: Path = MEMBERSHIPS) -> Iterator[Path]:
    """Yield the folders of this process's groups that ``controller`` may have, from its own up to the root."""
    lines = memberships.read_text(encoding="utf-8").splitlines() if memberships.is_file() else []
    own = {name: path for _, names, path in (line.split(":", 2) for line in lines) for name in names.split(",")}
    for root, path in ((mount, own.get("", "/")), (mount / controller, own.get(controller, "/"))):
        place = Path() if ".." in path else Path(path).relative_to("/")
        yield from (root / place, *(root / parent for parent in place.parents))


def cpu_quotas(mount: Path = MOUNT, memberships: Path = MEMBERSHIPS) -> list[float]:
    """Return the processors that each limited group may use: its CPU time over the period in which it may take that."""
    found = []
    for folder in group_folders("cpu", mount, memberships):
        both = words(folder / "cpu.max") or words(folder / "cpu.cfs_quota_us") + words(folder / "cpu.cfs_period_us")
        if len(both) == 2 and both[0].isdigit() and int(both[1]) > 0:  # "max" and -1 are no limits
            found.append(int(both[0]) / int(both[1]))
    return found


def memory_left(mount: Path = MOUNT, memberships: Path = MEMBERSHIPS) -> list[int]:
    """Return the bytes that each limited group leaves. Pages of files not in use are free: the system drops them first.

    Version 1 writes "no limit" as a number, larger than any machine.
    """
    found = []
    for folder in group_folders("memory", mount, memberships):
        for limit, used, unused in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            if (value := words(folder / limit)) and value[0].isdigit():
                counts = words(folder / "memory.stat")
                statistics = dict(zip(counts[::2], counts[1::2], strict=True))
                found.append(int(value[0]) - int(words(folder / used)[0]) + int(statistics.get(unused, 0)))
    return found


def words(file: Path) -> list[str]:
    """Return the words of a file, none if it cannot be read."""
    try:
        return file.read_text(encoding="ascii").split()
    except OSError:
        return []
