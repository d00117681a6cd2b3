"""One Ray cluster for several runs, each a process of its own: joined, or started and ended by this process."""

from workers.cluster.open_pool import close_cluster, join_cluster, placement_of
from workers.cluster.settings import WorkerSettings


class SharedCluster:
    """The cluster of ``settings.ray``. Raises ClusterError if it is not there or does not let this user in."""

    def __init__(self, settings: WorkerSettings):
        join_cluster(settings)
        import ray  # noqa: PLC0415 - only now: joining sets what it reads when it is imported

        self.address: str = ray.get_runtime_context().gcs_address

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which a process with ``workers.ray: auto`` joins; the token is in this process's own."""
        return {"RAY_ADDRESS": self.address}

    def room(self, settings: WorkerSettings) -> int:
        """Workers of that kind that fit on the nodes that are there, taken or not, at least 1."""
        from workers.cluster.ray_cluster import nodes  # noqa: PLC0415

        return max(1, placement_of(settings).room(nodes()) or 0)

    def close(self) -> None:
        close_cluster()


def fair_share(room: int, most: int | None, position: int, runs: int) -> int:
    """Workers that one of ``runs`` may hold where ``room`` of them fit, the oldest at ``position`` 0; at least 1.

    ``most`` bounds it (``workers.max``). Where less fits than that, the newest run may ask for the rest, so that a
    cluster that scales up is asked to; on any other one it cannot take the place of a run that keeps to its share.
    """
    each, over = divmod(room, runs)
    share = max(1, each + (position < over))
    if most is None:
        return share
    if position == runs - 1:
        share += max(0, most - room)
    return min(share, most)
