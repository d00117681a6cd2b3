"""A container's quota counts, not its node's: of processors and of memory, in both versions, in any group above."""

import os
from pathlib import Path

import pytest

from bitgenome.common.cgroups import memory_left
from bitgenome.common.cpus import usable_cpus

GIB = 1 << 30
CORES = len(os.sched_getaffinity(0))


def machine(folder: Path, memberships: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A mount of control groups with some files, and the process's line in /proc."""
    for name, text in files.items():
        file = folder / "mount" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "cgroup").write_text(memberships)
    return folder / "mount", folder / "cgroup"


@pytest.mark.parametrize(
    ("memberships", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, CORES),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/pod/app\n", {"pod/app/cpu.max": "max 100000\n", "pod/cpu.max": "150000 100000\n"}, 1),
        ("4:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ("4:cpu,cpuacct:/docker/x\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, CORES),
        ("0::/../outside\n", {"cpu.max": "100000 100000\n"}, 1),
        ("", {}, CORES),
    ],
)
def test_processors_are_those_of_the_quota(
    tmp_path: Path, memberships: str, files: dict[str, str], expected: int
) -> None:
    assert usable_cpus(*machine(tmp_path, memberships, files)) == expected


@pytest.mark.parametrize(
    ("memberships", "folder", "names"),
    [
        ("0::/\n", "", ("memory.max", "memory.current", "inactive_file")),
        ("0::/pod/app\n", "pod", ("memory.max", "memory.current", "inactive_file")),
        ("5:memory:/a\n", "memory/a", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ],
)
def test_memory_is_what_the_group_leaves_with_its_unused_pages(
    tmp_path: Path, memberships: str, folder: str, names: tuple[str, str, str]
) -> None:
    limit, used, unused = names
    files = {limit: str(16 * GIB), used: str(5 * GIB), "memory.stat": f"anon 1\n{unused} {GIB}\n"}
    placed = {str(Path(folder) / name): text for name, text in files.items()}
    assert memory_left(*machine(tmp_path, memberships, placed)) == [12 * GIB]
