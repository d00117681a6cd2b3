"""The only place that names accelerators, and what a worker may take of a machine."""

import ctypes
import resource
from pathlib import Path

import psutil
import torch

from bitgenome.common.cpus import usable_cpus
from bitgenome.common.host_memory import peak_host_memory

ACCELERATOR_SHARE = 0.9  # of an accelerator's free memory; the rest is fragments
HOST_SHARE = 0.7  # of the host's free memory, divided among workers by their threads; the rest is everybody else's
CGROUP_FILES = (  # limit and usage, version 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def best_device() -> torch.device:
    """cuda where there is one, else cpu. Not mps yet: it has no float64, which Hessians are factored in."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_type(compute: str, device: torch.device) -> torch.dtype:
    """Type that blocks multiply in; ``auto`` is float32 on a CPU, and bfloat16 on accelerators that have it."""
    if compute == "auto":
        fast = device.type != "cpu" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    found: torch.dtype = getattr(torch, compute)
    return found


def worker_memory(device: torch.device) -> int:
    """Bytes that this process may take on ``device``: of an accelerator what is free, of a host its threads' share."""
    if device.type != "cpu":
        return int(ACCELERATOR_SHARE * torch.cuda.mem_get_info(device)[0])
    return host_share(torch.get_num_threads())


def host_share(threads: int) -> int:
    """Bytes of the host's free memory for a worker of ``threads`` threads."""
    return int(HOST_SHARE * free_host_memory() * min(1.0, threads / usable_cpus()))


def free_host_memory() -> int:
    """Bytes that the machine, this container and this process's own limits (ulimit -v, -d) leave."""
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
    """Bytes that this process has held at most: of the accelerator where there is one, else of the host."""
    if best_device().type != "cpu":
        return int(torch.cuda.max_memory_allocated())
    return peak_host_memory()


def release_memory() -> None:
    """Give what allocators hold in reserve back: torch's to the device, the C library's (glibc) to the system."""
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
