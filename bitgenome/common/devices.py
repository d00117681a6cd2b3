"""Chooses the compute device and measures the memory that a worker may use; no other module names accelerators."""

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from bitgenome.common.cgroups import memory_left
from bitgenome.common.cpus import usable_cpus
from bitgenome.common.host_memory import peak_host_memory

ACCELERATOR_SHARE = 0.9  # of an accelerator's free memory; the rest is left for fragmentation
# Of one temporary of a computation in chunks. A kernel that reads and writes so much takes several times as long as its
# launch (50 us at 2.5 TB/s, of 5 to 10), and the dozen temporaries that are alive at once take less than a gigabyte.
ACCELERATOR_CHUNK = 64 << 20
HOST_SHARE = 0.7  # of the host's free memory, divided among workers by their threads; the rest is for other processes

if usable_cpus() < torch.get_num_threads():  # which knows the affinity, but no quota
    torch.set_num_threads(usable_cpus())

_shares: dict[str, float] = {}  # of this process, where it shares the machine with other workers


@contextmanager
def all_cores() -> Iterator[None]:
    """Let PyTorch use all cores of this process's share inside the context."""
    threads = torch.get_num_threads()
    torch.set_num_threads(usable_cpus())
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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


def chunk_bytes(device: torch.device, on_cpu: int) -> int:
    """Return the most bytes of one temporary of a computation in chunks, whose results do not depend on the chunks.

    A CPU is fastest where temporaries stay in its cache, which ``on_cpu`` says; an accelerator where kernels are few.
    """
    return on_cpu if device.type == "cpu" else ACCELERATOR_CHUNK


def take_share(accelerator: float) -> None:
    """Let this process use no more than the share ``accelerator`` (0 to 1) of its accelerator's memory."""
    _shares["accelerator"] = accelerator


def worker_memory(device: torch.device, share: float | None = None) -> int:
    """Return the bytes that this process may use on ``device``.

    On an accelerator that is the ``accelerator_share`` of ``share``, by default of what ``take_share`` was called with;
    on a CPU the ``host_share`` of this process's threads.
    """
    if device.type == "cpu":
        return host_share(torch.get_num_threads())
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # this process's own cache
    return accelerator_share(free + unused, total, _shares.get("accelerator", 1.0) if share is None else share)


def accelerator_share(free: int, total: int, share: float) -> int:
    """Return the bytes that a worker with the share ``share`` of an accelerator may use.

    They are ACCELERATOR_SHARE of its part of the ``total`` bytes, and never more than that of the ``free`` ones.
    """
    return int(ACCELERATOR_SHARE * min(free, share * total))


def host_share(threads: int) -> int:
    """Return the bytes of the host's free memory that a worker of ``threads`` threads may use."""
    return int(HOST_SHARE * free_host_memory() * min(1.0, threads / usable_cpus()))


def free_host_memory() -> int:
    """Return the bytes that the machine, the container and this process's own limits (ulimit -v, -d) leave free."""
    free = [psutil.virtual_memory().available]
    free += memory_left()
    process = psutil.Process().memory_info()
    for kind, taken in ((resource.RLIMIT_AS, process.vms), (resource.RLIMIT_DATA, process.rss)):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            free.append(soft - taken)
    return max(0, min(free))


def machine() -> dict[str, Any]:
    """Return torch's version, its accelerators by name and bytes, the cores, and the host's memory in bytes."""
    seen = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "torch": str(torch.__version__),
        "accelerators": [{"name": one.name, "bytes": one.total_memory} for one in seen],
        "cores": usable_cpus(),
        "free_bytes": free_host_memory(),
        "total_bytes": psutil.virtual_memory().total,
    }


def peak_memory() -> int:
    """Return the most bytes that this process has held: on the accelerator if there is one, else on the host."""
    if best_device().type != "cpu":
        return int(torch.cuda.max_memory_allocated())
    return peak_host_memory()


def release_memory() -> None:
    """Give back memory that allocators hold in reserve: torch's to the device, glibc's to the system."""
    if best_device().type != "cpu":  # not just available: Apple's is no device of ours, and has no such function
        torch.accelerator.memory.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
