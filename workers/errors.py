"""Errors of pools, clusters and jobs."""

from bitgenome.common.errors import UserError


class ClusterError(UserError):
    """Raised if the Ray cluster cannot serve."""


class TaskError(RuntimeError):
    """Raised if a task failed by itself: running it again would fail again."""

    def __init__(self, label: str, reason: str):
        super().__init__(f"{label} failed: {reason}")
        self.label = label
        self.reason = reason

    def __reduce__(self) -> tuple[type["TaskError"], tuple[str, str]]:
        return TaskError, (self.label, self.reason)


class WorkersLostError(RuntimeError):
    """Raised if a task's worker was lost more often than the pool retries."""


class JobError(UserError):
    """Raised if a job of the cluster is not there, not in the state that was asked for, or not accepted."""
