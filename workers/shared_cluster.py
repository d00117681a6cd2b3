"""One Ray cluster for several runs, each a process of its own: joined, or started and ended by this process."""

from workers.open_pool import WorkerSettings, close_cluster, join_cluster, placement_of


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
        """Workers of that kind that the cluster can hold, taken or not, at least 1.

        That is ``settings.max`` where there is less room: a cluster that scales up does so when it is asked.
        """
        from workers.ray_cluster import nodes  # noqa: PLC0415

        return max(1, settings.max or 0, placement_of(settings).room(nodes()) or 0)

    def close(self) -> None:
        close_cluster()
