"""Workers as threads of this process: a backend for tests and for measuring the driver without a cluster."""

import threading
from collections.abc import Mapping
from functools import partial
from queue import SimpleQueue
from typing import Any

from bitgenome.common.steps import Step
from workers.cluster.ray_worker import Worker
from workers.pool.backend import Event, Finished, Ready, waiting_events
from workers.pool.base import Task

Queue = SimpleQueue[tuple[int, Task] | None]


class ThreadBackend:
    """Threads cannot be ended: one that is stopped ends after what it has."""

    def __init__(self, threads: int = 0) -> None:
        self._threads = threads
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._queues: dict[int, Queue] = {}
        self._steps: dict[int, tuple[str, Step]] = {}

    def start(self, worker: int) -> None:
        self._queues[worker] = SimpleQueue()
        threading.Thread(target=self._serve, args=(worker, self._queues[worker]), daemon=True).start()

    def _serve(self, worker: int, queue: Queue) -> None:
        process = Worker(self._threads, partial(self._note, worker))
        self._events.put(Ready(worker))
        while (order := queue.get()) is not None:
            call, task = order
            try:
                found = Finished(call, *_parts(process.run(task)))
            except Exception as error:
                found = Finished(call, error=error)
            self._events.put(found)

    def check(self, worker: int) -> None:
        self._events.put(Ready(worker))

    def submit(self, worker: int, call: int, task: Task) -> None:
        self._queues[worker].put((call, task))

    def wait(self, timeout: float) -> list[Event]:
        return waiting_events(self._events, timeout)

    def _note(self, worker: int, label: str, step: Step) -> None:
        self._steps[worker] = label, step

    def steps(self, labels: Mapping[int, str]) -> list[Step]:
        found = [(label, self._steps.get(worker, ("", None))) for worker, label in labels.items()]
        return [step for label, (of, step) in found if step and label == of]

    def stop(self, worker: int) -> None:
        self._queues.pop(worker).put(None)

    def capacity(self) -> int | None:
        return None

    def close(self) -> None:
        for worker in list(self._queues):
            self.stop(worker)

    def needs(self) -> str:
        return "a thread"


def _parts(answer: tuple[Any, float, int]) -> tuple[Any, None, float, int]:
    result, seconds, memory = answer
    return result, None, seconds, memory
