"""The pool that a configuration asks for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workers.cluster.access import admitted_address
from workers.pool.base import Pool, SerialPool
from workers.pool.scheduling import Elasticity, Patience

if TYPE_CHECKING:
    from workers.cluster.ray_cluster import Placement


@dataclass(frozen=True)
class WorkerSettings:
    """``ray``: auto, local, HOST:PORT, or off for this process alone. ``count`` workers, or ``min`` to ``max`` of them.

    Without ``count`` and ``max`` there are as many as the cluster has room for. Seconds: ``deadline`` of a task,
    ``idle_release`` and ``start_timeout`` of a worker.
    """

    ray: str = "auto"
    count: int | None = None
    min: int | None = None
    max: int | None = None
    cpus_per_worker: int = 1
    gpus_per_worker: float | None = None  # None: 1 where there are GPUs, else 0
    resources: Mapping[str, float] = field(default_factory=dict)
    deadline: float | None = None
    straggler_factor: float = Patience.straggler_factor
    max_retries: int = Patience.max_retries
    idle_release: float = Elasticity.idle_release_s
    start_timeout: float = Elasticity.start_timeout_s
    insecure: bool = False  # join another machine's cluster that asks for no token

    @property
    def elasticity(self) -> Elasticity:
        least = 1 if self.min is None else self.min
        return Elasticity(self.count or least, self.count or self.max, self.idle_release, self.start_timeout)

    @property
    def patience(self) -> Patience:
        return Patience(self.straggler_factor, self.deadline, self.start_timeout, self.max_retries)


def open_pool(settings: WorkerSettings, run: str = "pool") -> Pool:
    """Workers are named after ``run``. Raises ClusterError (one sentence) if the cluster is not there or too small."""
    if settings.ray == "off":
        return SerialPool(settings.cpus_per_worker)
    join_cluster(settings)
    from workers.cluster.ray_pool import RayPool  # noqa: PLC0415 - ray takes seconds to import

    placement = placement_of(settings)
    return RayPool(placement, settings.elasticity, settings.patience, threads=settings.cpus_per_worker, run=run)


def join_cluster(settings: WorkerSettings) -> None:
    """Join the cluster of ``settings``, or start one. Raises ClusterError if it is not there or does not let us in."""
    address = admitted_address(settings.ray, settings.insecure)
    from workers.cluster.ray_cluster import connect  # noqa: PLC0415 - only now, see admitted_address

    connect(address)


def placement_of(settings: WorkerSettings) -> "Placement":
    """What a worker takes of the cluster that was joined."""
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
