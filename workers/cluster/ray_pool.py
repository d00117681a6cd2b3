"""The Ray pool: a dispatcher whose workers are long-lived Ray actors, one each."""

import logging
from collections.abc import Mapping
from functools import partial
from queue import SimpleQueue
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError, RayTaskError

from bitgenome.common.errors import UserError
from bitgenome.common.steps import Step
from workers.cluster.ray_cluster import Placement, check_own_node, check_room, nodes
from workers.cluster.ray_steps import StepWriter, forget_steps, read_step
from workers.cluster.ray_worker import Worker
from workers.errors import TaskError
from workers.pool.backend import Event, Finished, Lost, Ready, waiting_events
from workers.pool.base import Task
from workers.pool.dispatcher import Dispatcher
from workers.pool.scheduling import Elasticity, Patience

log = logging.getLogger(__name__)


class RayBackend:
    """Holds actors named ``bitgenome:<run>:worker-<number>``, in a namespace of their own.

    Starting one raises ClusterError if the driver's own node is gone.
    """

    def __init__(self, run: str, placement: Placement, threads: int) -> None:
        self._run, self._placement, self._threads = run, placement, threads
        self._namespace = f"bitgenome-{run}-{uuid4().hex[:8]}"
        self._actors: dict[int, Any] = {}
        self._events: SimpleQueue[Event] = SimpleQueue()

    def start(self, worker: int) -> None:
        check_own_node()
        name = f"bitgenome:{self._run}:worker-{worker}"
        actor = ray.remote(Worker).options(name=name, namespace=self._namespace, **self._placement.options())
        self._actors[worker] = actor.remote(self._threads, StepWriter(self._key(worker)), self._placement.gpus)
        self.check(worker)

    def check(self, worker: int) -> None:
        answer = self._actors[worker].__ray_ready__.remote()
        answer.future().add_done_callback(partial(self._ready, worker))

    def submit(self, worker: int, call: int, task: Task) -> None:
        answer = self._actors[worker].run.options(name=task.label).remote(task)
        answer.future().add_done_callback(partial(self._answered, worker, call, task.label))

    def wait(self, timeout: float) -> list[Event]:
        return waiting_events(self._events, timeout)

    def steps(self, labels: Mapping[int, str]) -> list[Step]:
        found = [read_step(self._key(worker), label) for worker, label in labels.items()]
        return [step for step in found if step]

    def stop(self, worker: int) -> None:
        ray.kill(self._actors.pop(worker))
        forget_steps(self._key(worker))

    def capacity(self) -> int | None:
        return self._placement.room(nodes())

    def close(self) -> None:
        for worker in list(self._actors):
            self.stop(worker)

    def needs(self) -> str:
        return str(self._placement)

    def _key(self, worker: int) -> str:
        """Return the key under which a worker writes its steps."""
        return f"{self._namespace}:{worker}"

    def _ready(self, worker: int, answer: Any) -> None:
        try:
            answer.result()
        except Exception as error:
            self._events.put(Lost(worker, first_line(error)))
        else:
            self._events.put(Ready(worker))

    def _answered(self, worker: int, call: int, label: str, answer: Any) -> None:
        try:
            result, seconds, memory = answer.result()
        except RayTaskError as error:
            self._events.put(Finished(call, error=task_error(label, error)))
        except RayError as error:  # the worker, its node or its memory
            self._events.put(Lost(worker, first_line(error)))
        except Exception as error:  # an answer that cannot be read
            self._events.put(Finished(call, error=TaskError(label, f"{type(error).__name__}: {error}")))
        else:
            self._events.put(Finished(call, result, None, seconds, memory))


class RayPool(Dispatcher):
    """Runs tasks on workers of ``placement`` that compute with ``threads`` threads each; ``run`` names them.

    Raises ClusterError if the cluster has no room for ``elasticity.minimum`` of them.
    """

    def __init__(
        self,
        placement: Placement | None = None,
        elasticity: Elasticity | None = None,
        patience: Patience | None = None,
        *,
        threads: int = 1,
        run: str = "pool",
    ) -> None:
        placement, elasticity = placement or Placement(), elasticity or Elasticity()
        check_room(placement, elasticity.minimum)
        super().__init__(RayBackend(run, placement, threads), elasticity, patience)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return f"{error}".strip().partition("\n")[0] or type(error).__name__


def task_error(label: str, error: RayTaskError) -> TaskError | UserError:
    """Return the error that the worker raised, without Ray's wrapping."""
    if isinstance(error.cause, TaskError | UserError):
        return error.cause
    return TaskError(label, f"{error}".strip().rpartition("\n")[2])
