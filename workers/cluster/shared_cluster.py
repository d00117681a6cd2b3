"""A Ray cluster that several runs share, each a process of its own: joined, or started and ended by this process."""

from workers.cluster.open_pool import close_cluster, join_cluster, placement_of
from workers.cluster.settings import WorkerSettings


class SharedCluster:
    """Joins or starts the cluster of ``settings.ray``, for the runs of this process to share.

    Raises ClusterError if it is not there or does not let this user in.
    """

    def __init__(self, settings: WorkerSettings):
        join_cluster(settings)
        import ray  # noqa: PLC0415 - only now: joining sets what it reads when it is imported

        self.address: str = ray.get_runtime_context().gcs_address

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which a process with ``workers.ray: auto`` joins; the token is in this process's own already."""
        return {"RAY_ADDRESS": self.address}

    def room(self, settings: WorkerSettings) -> int:
        """Return how many workers of ``settings`` fit on the nodes that are there, taken or not; at least 1."""
        from workers.cluster.ray_cluster import nodes  # noqa: PLC0415

        return max(1, placement_of(settings).room(nodes()) or 0)

    def close(self) -> None:
        """Leave the cluster; one that this process started ends with it."""
        close_cluster()


def fair_share(room: int, most: int | None, position: int, runs: int) -> int:
    """Return how many workers one of ``runs`` runs may hold if ``room`` of them fit; at least 1.

    ``position`` is the run's rank by age, 0 for the oldest. ``most`` bounds the share (``workers.max``). If less than
    that fits, the newest run may ask for the rest, so that a cluster that scales up is asked to; on any other cluster
    it cannot take workers from a run that keeps to its share.
    """
    each, over = divmod(room, runs)
    share = max(1, each + (position < over))
    if most is None:
        return share
    if position == runs - 1:
        share += max(0, most - room)
    return min(share, most)
