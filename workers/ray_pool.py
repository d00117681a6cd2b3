"""The Ray pool: one warm actor a worker, results in submission order, lost workers replaced and their task retried."""

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from search.errors import UserError
from workers.errors import ClusterError, TaskError, WorkersLostError
from workers.pool import Pool, PoolStatistics, Task, run_task
from workers.worker_logs import worker_logs

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0


@ray.remote
class Worker:
    """A process that keeps its tasks' state warm."""

    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        self._state: dict[Any, Any] = {}

    def run(self, task: Task) -> Any:
        return run_task(task, self._state)


def connect(address: str) -> None:
    """Join the Ray cluster at ``address``, or start one on this machine for "local".

    ``workers.cluster_access`` has found it to be there and to let this user in. Raises ClusterError if Ray cannot.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    handler = signal.getsignal(signal.SIGTERM)
    local = {"include_dashboard": True, "dashboard_host": "127.0.0.1"} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, job_config=worker_logs(), **local)
    except (ConnectionError, RayError, RuntimeError) as error:
        raise ClusterError(f"expected a Ray cluster at {address}, found {error}") from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # ray.init installs one of its own


def cluster_resources() -> dict[str, float]:
    """CPUs and GPUs of the connected cluster."""
    return {str(name): float(value) for name, value in ray.cluster_resources().items()}


class RayPool(Pool):
    """``size`` actors with ``cpus_per_worker`` threads and ``gpus_per_worker`` GPUs each.

    A worker that is lost is replaced, and its task runs again, up to ``max_retries`` times a task; a worker gets tasks
    once it has answered. Raises ClusterError if the cluster has not the resources for ``size`` workers, and from
    ``map`` if none of them can be placed within ``START_TIMEOUT_S``.
    """

    def __init__(self, size: int, cpus_per_worker: int = 1, gpus_per_worker: float = 0.0, max_retries: int = 3):
        self.size = size
        self.statistics = PoolStatistics(workers=size)
        self.max_retries = max_retries
        self._threads = cpus_per_worker
        self._options = {"num_cpus": cpus_per_worker, "num_gpus": gpus_per_worker}
        self._check_resources(cpus_per_worker, gpus_per_worker)
        self._actors: list[Any] = [None] * size
        self._starting: dict[Any, int] = {}  # reference that answers when the worker does -> worker
        for worker in range(size):
            self._start(worker)

    def _check_resources(self, cpus: int, gpus: float) -> None:
        have = cluster_resources()
        for kind, each in (("CPU", cpus), ("GPU", gpus)):
            if each * self.size > have.get(kind, 0):
                fits = int(have.get(kind, 0) // each)
                remedy = f"set workers.count to at most {fits}" if fits else f"lower workers.{kind.lower()}s_per_worker"
                raise ClusterError(
                    f"expected {each * self.size:g} {kind}s for {self.size} workers of {each:g}, found "
                    f"{have.get(kind, 0):g} in the cluster: {remedy}"
                )

    def _start(self, worker: int) -> None:
        actor = Worker.options(**self._options).remote(self._threads)  # type: ignore[attr-defined]
        self._actors[worker] = actor
        self._starting[actor.__ray_ready__.remote()] = worker

    def _wait(self, running: Sequence[Any]) -> Any:
        """The next reference that is ready, a task's or a starting worker's."""
        timeout = None if running else START_TIMEOUT_S
        ready, _ = ray.wait([*running, *self._starting], num_returns=1, timeout=timeout)
        if not ready:
            raise ClusterError(
                f"expected room for a worker of {self._options}, found none within {START_TIMEOUT_S:g} s"
            )
        return ready[0]

    def map(self, tasks: Sequence[Task]) -> Iterator[Any]:
        pending = deque(range(len(tasks)))
        running: dict[Any, tuple[int, int]] = {}  # reference -> (task, worker)
        idle = deque(worker for worker in range(self.size) if worker not in self._starting.values())
        losses = [0] * len(tasks)
        done: dict[int, Any] = {}
        try:
            for wanted in range(len(tasks)):
                while wanted not in done:
                    while pending and idle:
                        task, worker = pending.popleft(), idle.popleft()
                        call = self._actors[worker].run.options(name=tasks[task].label)
                        running[call.remote(tasks[task])] = (task, worker)
                    ready = self._wait(list(running))
                    if ready in self._starting:  # one that died meanwhile shows in its first task
                        idle.append(self._starting.pop(ready))
                        continue
                    task, worker = running.pop(ready)
                    try:
                        done[task] = ray.get(ready)
                    except RayTaskError as error:
                        done[task] = task_error(tasks[task], error)
                    except RayError as error:  # the worker, its node or its memory
                        losses[task] += 1
                        self._replace(worker, tasks[task], losses[task], error)
                        pending.appendleft(task)
                        continue
                    idle.append(worker)
                result = done.pop(wanted)
                if isinstance(result, TaskError | UserError):
                    raise result
                yield result
        finally:
            for reference in running:
                ray.cancel(reference)

    def _replace(self, worker: int, task: Task, losses: int, error: Exception) -> None:
        if losses > self.max_retries:
            raise WorkersLostError(f"{task.label} lost its worker {losses} times, last by {error}") from None
        log.warning("lost worker %d while it ran %s; starting another (retry %d)", worker, task.label, losses)
        self._start(worker)

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()


def task_error(task: Task, error: RayTaskError) -> TaskError | UserError:
    """The error that the worker raised, without Ray's wrapping."""
    if isinstance(error.cause, TaskError | UserError):
        return error.cause
    return TaskError(task.label, f"{error}".strip().rpartition("\n")[2])
