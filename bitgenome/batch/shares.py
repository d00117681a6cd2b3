"""Divides a batch's cluster: how many runs go at a time, and how many workers each of them may hold."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bitgenome.batch.config import BatchRun
from bitgenome.common.cpus import usable_cpus
from bitgenome.storage.worker_limit import withdraw_limit, write_limit
from workers.cluster.shared_cluster import SharedCluster, fair_share


@dataclass
class Shares:
    """Divides the cluster among the runs of the batch ``batch``.

    Without a ``cluster`` every run is one process, and there is nothing to divide.
    """

    batch: str
    cluster: SharedCluster | None
    most: int | None  # runs at a time
    _given: dict[Path, int] = field(default_factory=dict)  # workers by run directory

    def runs_at_a_time(self, runs: Sequence[BatchRun]) -> int:
        """Return how many of ``runs`` may go at a time.

        Each run needs a worker, and its driver is a process on this machine.
        """
        cpus, settings = usable_cpus(), [run.config.workers for run in runs]
        if self.cluster is None:
            return self.most or max(1, cpus // max(s.cpus_per_worker for s in settings))
        return min(self.most or cpus, *(self.cluster.room(s) for s in settings))

    def give(self, runs: Sequence[BatchRun]) -> None:
        """Divide the cluster's workers among ``runs``, the oldest first, and write each limit that has changed."""
        if self.cluster is None:
            return
        for position, run in enumerate(runs):
            settings = run.config.workers
            share = fair_share(self.cluster.room(settings), settings.max, position, len(runs))
            if self._given.get(run.directory) != share:
                run.directory.mkdir(parents=True, exist_ok=True)
                self._given[run.directory] = share
                write_limit(run.directory, share, self.batch)

    def take_back(self, run: Path) -> None:
        """Withdraw the limit of the run at ``run``, which has ended.

        Whoever continues it alone may hold any number of workers.
        """
        if self._given.pop(run, None) is not None:
            withdraw_limit(run, self.batch)

    def close(self) -> None:
        """Withdraw all limits."""
        for run in list(self._given):
            self.take_back(run)
