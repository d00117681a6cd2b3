"""Workers in simulated time: a backend whose clock moves only while the dispatcher waits."""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count

from bitgenome.common.steps import Step
from workers.pool.backend import Event, Finished, Lost, Ready
from workers.pool.base import Task

Seconds = Callable[[Task, int, int], float]  # of a task, on a worker, in its nth attempt
START_S = 2.0


@dataclass(frozen=True)
class Named:
    """A task that only has a name, and fails by itself if it has an ``error``."""

    label: str
    error: Exception | None = None
    work: float = 1.0

    def run(self, state: object) -> str:
        return self.label


@dataclass
class SimulatedBackend:
    """``room`` workers find a place; the others wait for it. ``seconds`` may be infinite: a task that hangs."""

    seconds: Seconds
    room: int = 1000
    now: float = 0.0
    alive: set[int] = field(default_factory=set)
    log: list[tuple[float, str, int]] = field(default_factory=list)  # (time, what, worker)

    def __post_init__(self) -> None:
        self._queue: list[tuple[float, int, Event]] = []
        self._order = count()
        self._free_at: dict[int, float] = {}
        self._attempts: dict[str, int] = {}
        self._unplaced: list[int] = []
        self._calls: dict[int, int] = {}

    def clock(self) -> float:
        return self.now

    def at(self, when: float, event: Event) -> None:
        heapq.heappush(self._queue, (when, next(self._order), event))

    def start(self, worker: int) -> None:
        self.log.append((self.now, "start", worker))
        self._unplaced.append(worker)
        self._place()

    def make_room(self, more: int) -> None:
        self.room += more
        self._place()

    def _place(self) -> None:
        while self._unplaced and len(self.alive) < self.room:
            worker = self._unplaced.pop(0)
            self.alive.add(worker)
            self.at(self.now + START_S, Ready(worker))

    def kill(self, worker: int, when: float) -> None:
        """Its node goes at ``when``."""
        self.at(when, Lost(worker, "its node went"))

    def check(self, worker: int) -> None:
        self.at(self.now, Ready(worker) if worker in self.alive else Lost(worker, "gone"))

    def submit(self, worker: int, call: int, task: Task) -> None:
        attempt = self._attempts[task.label] = self._attempts.get(task.label, 0) + 1
        self.log.append((self.now, task.label, worker))
        if worker not in self.alive:
            self.at(self.now, Lost(worker, "gone"))
            return
        began = max(self.now, self._free_at.get(worker, 0.0))
        seconds = self.seconds(task, worker, attempt)
        self._free_at[worker] = began + seconds
        self._calls[call] = worker
        error = getattr(task, "error", None)
        self.at(began + seconds, Finished(call, None if error else f"{task.label} done", error, seconds))

    def wait(self, timeout: float) -> list[Event]:
        if not self._queue or self._queue[0][0] > self.now + timeout:
            self.now += timeout
            return []
        when, _, event = heapq.heappop(self._queue)
        self.now = max(self.now, when)
        if isinstance(event, Lost):
            self.alive.discard(event.worker)
        elif self._of(event) not in self.alive:
            return []
        return [event]

    def _of(self, event: Event) -> int:
        return self._calls[event.call] if isinstance(event, Finished) else event.worker

    def steps(self, labels: Mapping[int, str]) -> list[Step]:
        return []

    def stop(self, worker: int) -> None:
        self.log.append((self.now, "stop", worker))
        self.alive.discard(worker)
        self._unplaced = [other for other in self._unplaced if other != worker]
        self._place()

    def capacity(self) -> int | None:
        return self.room

    def close(self) -> None:
        self.alive.clear()

    def needs(self) -> str:
        return "1 CPU"

    def times(self, what: str) -> int:
        return sum(1 for _, found, _ in self.log if found == what)
