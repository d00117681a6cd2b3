"""Where tasks run: the contract that every pool keeps, and the serial pool.

A task is a small picklable object with a ``label`` and ``run(state)``; ``state`` is its worker's own dict, in which
tasks keep what is worth keeping warm (a loaded model, a mapped bank).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from search.errors import UserError
from workers.errors import TaskError


class Task(Protocol):
    @property
    def label(self) -> str:
        """Short name for progress, dashboards and errors."""

    def run(self, state: dict[Any, Any]) -> Any:
        """The work; must not depend on what other tasks left in ``state``, except for speed."""


class Pool(ABC):
    """Runs tasks; a context manager that closes itself."""

    size: int

    @abstractmethod
    def map(self, tasks: Sequence[Task]) -> Iterator[Any]:
        """Results in the order of the tasks, each as soon as it and its predecessors are done.

        Raises TaskError or UserError for the first task in order that failed by itself, WorkersLostError for machines
        that were lost too often.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the workers back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_task(task: Task, state: dict[Any, Any]) -> Any:
    """Run one task; its own exceptions become TaskError, users' errors and interrupts pass."""
    try:
        return task.run(state)
    except UserError:
        raise
    except Exception as error:
        raise TaskError(task.label, f"{type(error).__name__}: {error}") from error


class SerialPool(Pool):
    """Runs every task in this process, with as many threads as one worker of a larger pool would have."""

    size = 1

    def __init__(self, cpus_per_worker: int = 1):
        self._threads = cpus_per_worker
        self._state: dict[Any, Any] = {}

    def map(self, tasks: Sequence[Task]) -> Iterator[Any]:
        for task in tasks:
            before = torch.get_num_threads()
            torch.set_num_threads(self._threads)
            try:
                result = run_task(task, self._state)
            finally:
                torch.set_num_threads(before)
            yield result

    def close(self) -> None:
        self._state.clear()
