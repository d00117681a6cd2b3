"""Functions that open the pool that a configuration asks for, and join or leave its cluster."""

from typing import TYPE_CHECKING

from workers.cluster.access import admitted_address
from workers.cluster.settings import WorkerSettings
from workers.pool.base import Pool, SerialPool

if TYPE_CHECKING:
    from workers.cluster.ray_cluster import Placement


def open_pool(settings: WorkerSettings, run: str = "pool") -> Pool:
    """Return the pool of ``settings``, whose workers are named after ``run``.

    Raises ClusterError (one sentence) if the cluster is not there or too small.
    """
    if settings.ray == "off":
        return SerialPool(settings.cpus_per_worker)
    address = join_cluster(settings)
    from workers.cluster.ray_pool import RayPool  # noqa: PLC0415 - ray takes seconds to import

    placement = placement_of(settings)
    pool = RayPool(placement, settings.elasticity, settings.patience, threads=settings.cpus_per_worker, run=run)
    pool.one_machine = address == "local"
    return pool


def join_cluster(settings: WorkerSettings) -> str:
    """Join the cluster of ``settings``, or start one, and return its address: "local" for one that was started.

    Raises ClusterError if it is not there or refuses this user.
    """
    address = admitted_address(settings.ray, settings.insecure)
    from workers.cluster.ray_cluster import connect  # noqa: PLC0415 - only now, see admitted_address

    connect(address)
    return address


def placement_of(settings: WorkerSettings) -> "Placement":
    """Return what a worker takes of the cluster that was joined."""
    from workers.cluster.ray_cluster import Placement, has_accelerators  # noqa: PLC0415

    gpus = settings.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if has_accelerators() else 0.0
    return Placement(settings.cpus_per_worker, gpus, settings.resources)


def close_cluster() -> None:
    """Leave the cluster; one that this process started ends with it."""
    import sys  # noqa: PLC0415

    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
