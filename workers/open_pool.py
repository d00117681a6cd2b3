"""The pool that a configuration asks for."""

import os
from dataclasses import dataclass

from workers.cluster_access import admitted_address
from workers.pool import Pool, SerialPool


@dataclass(frozen=True)
class WorkerSettings:
    """``ray``: auto, local, HOST:PORT, or off for this process alone; ``count`` None is as many as the machine has."""

    ray: str = "auto"
    count: int | None = None
    cpus_per_worker: int = 1
    gpus_per_worker: float | None = None  # None: 1 where there are GPUs, else 0
    max_retries: int = 3
    insecure: bool = False  # join another machine's cluster that asks for no token


def open_pool(settings: WorkerSettings) -> Pool:
    """Raises ClusterError (one sentence) if the cluster is not there or too small."""
    if settings.ray == "off":
        return SerialPool(settings.cpus_per_worker)
    address = admitted_address(settings.ray, settings.insecure)
    from workers.ray_pool import RayPool, cluster_resources, connect  # noqa: PLC0415 - ray takes seconds to import

    connect(address)
    have = cluster_resources()
    gpus_each = settings.gpus_per_worker
    if gpus_each is None:
        gpus_each = 1.0 if have.get("GPU") else 0.0
    by_cpu = int(have.get("CPU", os.cpu_count() or 1) // settings.cpus_per_worker)
    by_gpu = int(have.get("GPU", 0) // gpus_each) if gpus_each else by_cpu
    count = settings.count or max(1, min(by_cpu, by_gpu))
    return RayPool(count, settings.cpus_per_worker, gpus_each, settings.max_retries)


def close_cluster() -> None:
    """Leave the cluster; one that this process started ends with it."""
    import sys  # noqa: PLC0415

    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
