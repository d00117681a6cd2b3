"""The interface of a backend, which holds the workers of a dispatcher, and the events that it reports."""

from collections.abc import Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from bitgenome.common.steps import Step
from workers.pool.base import Task


@dataclass(frozen=True)
class Ready:
    """Says that a worker answered: it can take tasks."""

    worker: int


@dataclass(frozen=True)
class Finished:
    """Says that a call ended: with ``result``, or with the ``error`` that its task raised by itself."""

    call: int
    result: Any = None
    error: Exception | None = None
    seconds: float = 0.0  # time that the task took in its worker
    peak_memory_bytes: int = 0  # largest memory of the worker so far


@dataclass(frozen=True)
class Lost:
    """Says that a worker is gone, with whatever it ran: its process, its node or its memory failed."""

    worker: int
    reason: str


Event = Ready | Finished | Lost


def waiting_events(events: "SimpleQueue[Event]", timeout: float) -> list[Event]:
    """Return all events that ``events`` holds, as soon as it holds any; [] after ``timeout`` seconds without one."""
    try:
        found = [events.get(timeout=timeout)]
    except Empty:
        return []
    while not events.empty():
        found.append(events.get())
    return found


class Backend(Protocol):
    """A backend holds workers by number, and never uses a number again; nothing but ``wait`` takes long."""

    def start(self, worker: int) -> None:
        """Begin to start a worker: Ready or Lost follows, once there is room for it."""

    def check(self, worker: int) -> None:
        """Ask whether a worker is still there: Ready or Lost follows."""

    def submit(self, worker: int, call: int, task: Task) -> None:
        """Run ``task`` after what the worker already has: Finished or Lost follows."""

    def wait(self, timeout: float) -> list[Event]:
        """Return the events since the last call; [] after ``timeout`` seconds without any."""

    def steps(self, labels: Mapping[int, str]) -> list[Step]:
        """Return the last steps that the tasks of workers told; ``labels`` are those of the tasks, by worker."""

    def stop(self, worker: int) -> None:
        """End a worker, whatever it does. Events of it may still come, and mean nothing."""

    def capacity(self) -> int | None:
        """Return how many workers there is room for, including those that are there; None if unknown."""

    def close(self) -> None:
        """End all workers."""

    def needs(self) -> str:
        """Return what a worker needs, for messages."""
