"""The actor that runs tasks on a Ray cluster."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from bitgenome.common.steps import Step, heard_by
from workers.pool.base import Task, peak_memory_bytes, run_task, set_threads


class Worker:
    """A worker runs tasks and keeps their state warm.

    It computes with ``threads`` threads, and takes the share ``gpus`` of an accelerator's memory if that is below 1.
    With 0 threads it does not load PyTorch by itself. ``tell`` takes a task's label and the last step that it told.
    """

    def __init__(self, threads: int, tell: Callable[[str, Step], None], gpus: float = 0.0) -> None:
        if threads:
            set_threads(threads)
        if threads and 0 < gpus < 1:
            from bitgenome.common.devices import take_share  # noqa: PLC0415 - loads PyTorch

            take_share(gpus)
        self._state: dict[Any, Any] = {}
        self._tell = tell

    def run(self, task: Task) -> tuple[Any, float, int]:
        """Return the task's result, the seconds it took, and the most bytes that this worker has held."""
        started = time.perf_counter()

        def hear(running: Sequence[Step]) -> None:
            self._tell(task.label, running[-1])

        with heard_by(hear):
            result = run_task(task, self._state)
        return result, time.perf_counter() - started, peak_memory_bytes()
