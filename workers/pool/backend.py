"""What a dispatcher needs of the machinery that holds its workers, and the events that this tells it."""

from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from workers.pool.base import Task


@dataclass(frozen=True)
class Ready:
    """A worker answered: it can take tasks."""

    worker: int


@dataclass(frozen=True)
class Finished:
    """A call came to its end: ``result``, or the ``error`` that its task raised by itself."""

    call: int
    result: Any = None
    error: Exception | None = None
    seconds: float = 0.0  # that the task took in its worker
    peak_memory_bytes: int = 0  # of the worker so far


@dataclass(frozen=True)
class Lost:
    """A worker is gone, with whatever it ran: its process, its node or its memory."""

    worker: int
    reason: str


Event = Ready | Finished | Lost


def waiting_events(events: "SimpleQueue[Event]", timeout: float) -> list[Event]:
    """All that ``events`` holds, once it holds any; [] after ``timeout`` seconds without."""
    try:
        found = [events.get(timeout=timeout)]
    except Empty:
        return []
    while not events.empty():
        found.append(events.get())
    return found


class Backend(Protocol):
    """Holds workers by number; a number is never used again. Nothing but ``wait`` takes long."""

    def start(self, worker: int) -> None:
        """Begin to start it: Ready or Lost follows, once there is room for it."""

    def check(self, worker: int) -> None:
        """Ask whether it is still there: Ready or Lost follows."""

    def submit(self, worker: int, call: int, task: Task) -> None:
        """Run ``task`` behind what the worker already has: Finished or Lost follows."""

    def wait(self, timeout: float) -> list[Event]:
        """What happened since the last time; [] after ``timeout`` seconds without any event."""

    def stop(self, worker: int) -> None:
        """End it, whatever it does. Its events may still come, and say nothing."""

    def capacity(self) -> int | None:
        """How many workers there is room for, those there are included; None: unknown."""

    def close(self) -> None:
        """End all workers."""

    def needs(self) -> str:
        """What a worker needs, for messages."""
