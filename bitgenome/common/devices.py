"""Chooses the compute device and measures the memory that a worker may use; no other module names accelerators."""

import ctypes
import resource
from pathlib import Path

import psutil
import torch

from bitgenome.common.cpus import usable_cpus
from bitgenome.common.host_memory import peak_host_memory

ACCELERATOR_SHARE = 0.9  # of an accelerator's free memory; the rest is left for fragmentation
HOST_SHARE = 0.7  # of the host's free memory, divided among workers by their threads; the rest is for other processes
CGROUP_FILES = (  # limit and usage, cgroup version 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def best_device() -> torch.device:
    """Return the cuda device if there is one, else the cpu.

    mps is not used because it has no float64, in which Hessians are factored.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Return the name of an accelerator, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def compute_type(compute: str, device: torch.device) -> torch.dtype:
    """Return the type in which blocks multiply; ``compute`` is the name of a torch type, or ``auto``.

    ``auto`` is float32 on a CPU, and bfloat16 on accelerators that support it natively.
    """
    if compute == "auto":
        fast = device.type != "cpu" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    found: torch.dtype = getattr(torch, compute)
    return found


def worker_memory(device: torch.device) -> int:
    """Return the bytes that this process may use on ``device``.

    On an accelerator that is ACCELERATOR_SHARE of the free memory, on a CPU the ``host_share`` of this process's
    threads.
    """
    if device.type != "cpu":
        return int(ACCELERATOR_SHARE * torch.cuda.mem_get_info(device)[0])
    return host_share(torch.get_num_threads())


def host_share(threads: int) -> int:
    """Return the bytes of the host's free memory that a worker of ``threads`` threads may use."""
    return int(HOST_SHARE * free_host_memory() * min(1.0, threads / usable_cpus()))


def free_host_memory() -> int:
    """Return the bytes that the machine, the container and this process's own limits (ulimit -v, -d) leave free."""
    free = [psutil.virtual_memory().available]
    for limit, used in CGROUP_FILES:
        if Path(limit).is_file() and (value := Path(limit).read_text().strip()).isdigit():
            free.append(int(value) - int(Path(used).read_text()))
    process = psutil.Process().memory_info()
    for kind, taken in ((resource.RLIMIT_AS, process.vms), (resource.RLIMIT_DATA, process.rss)):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            free.append(soft - taken)
    return max(0, min(free))


def peak_memory() -> int:
    """Return the most bytes that this process has held: on the accelerator if there is one, else on the host."""
    if best_device().type != "cpu":
        return int(torch.cuda.max_memory_allocated())
    return peak_host_memory()


def release_memory() -> None:
    """Give back memory that allocators hold in reserve: torch's to the device, glibc's to the system."""
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
