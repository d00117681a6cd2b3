"""The scheduling decisions of a dispatcher, as functions of numbers."""

import math
from bisect import insort
from dataclasses import dataclass
from statistics import median

FEWEST_FINISHED = 3  # finished tasks of a map before the others are compared with their median
LEAST_STRAGGLER_S = 1.0  # seconds; below it a second worker would cost more than it could save
PIPELINE_BELOW_S = 0.05  # median seconds of tasks that are over before the next could be sent
AHEAD = 8  # tasks per worker from the next result to be yielded to the last task sent: bounds results that wait
MOST_TICK_S, LEAST_TICK_S = 1.0, 0.02


@dataclass(frozen=True)
class Elasticity:
    """Settings of how many workers a dispatcher may hold, and when it gives some back.

    Without ``maximum`` it may hold as many as there is room for. ``idle_release_s`` is how long, in seconds, a worker
    beyond ``minimum`` may have nothing to do.
    """

    minimum: int = 1
    maximum: int | None = None
    idle_release_s: float = 300.0
    start_timeout_s: float = 300.0  # of the first worker of all

    def ceiling(self, limit: int | None, capacity: int | None) -> int:
        """Return the most workers allowed at present: at least one, or nothing would ever be done.

        ``limit`` is the pool's own limit, and ``capacity`` the room for workers, which counts if there is no
        ``maximum``.
        """
        room = self.maximum if self.maximum is not None else capacity
        return max(1, min(n for n in (room, limit, 2**31) if n is not None))


def wanted_workers(open_tasks: int, minimum: int, ceiling: int) -> int:
    """Return how many workers to hold with ``open_tasks`` tasks waiting or running."""
    return min(ceiling, max(minimum, open_tasks))


@dataclass(frozen=True)
class Patience:
    """Settings of when a task counts as a straggler, and a worker as lost.

    - ``straggler_factor`` is a multiple of the median time of the map's finished tasks, scaled by their work.
    - ``deadline_s`` holds for any task; a worker that has not answered after twice as long is lost.
    - ``loading_s`` is added to that in a worker's first task, which may load what the other workers have in memory.
    - ``max_retries`` holds for a task whose workers were lost.
    """

    straggler_factor: float = 2.0  # only idle workers take stragglers, so that being wrong costs nobody's time
    deadline_s: float | None = None
    loading_s: float = 300.0
    max_retries: int = 3

    def straggler_after(self, durations: "Durations", work: float = 1.0) -> float:
        """Return the seconds after which a task of ``work`` units is sent again; infinite while nothing is known."""
        found = [math.inf]
        if self.deadline_s is not None:
            found.append(self.deadline_s)
        if len(durations) >= FEWEST_FINISHED:
            found.append(max(LEAST_STRAGGLER_S, self.straggler_factor * durations.of_work * work))
        return min(found)

    def gives_up_after(self, straggler_after: float, superseded: bool, warm: bool) -> float:
        """Return the seconds after which a busy worker is replaced.

        A worker whose task is ``superseded``, because another has finished it, gets twice a straggler's time. A
        ``warm`` worker has finished a task before, and gets no time for loading.
        """
        limit = math.inf if self.deadline_s is None else 2 * self.deadline_s
        if superseded:
            limit = min(limit, 2 * straggler_after)
        return limit if warm else limit + self.loading_s


class Durations:
    """Collects the seconds of a map's finished tasks."""

    def __init__(self) -> None:
        self._sorted: list[float] = []
        self._of_work: list[float] = []  # the same, divided by the work of each

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, seconds: float, work: float = 1.0) -> None:
        """Add a task that took ``seconds`` for ``work`` units of work."""
        insort(self._sorted, seconds)
        insort(self._of_work, seconds / work)

    @property
    def of_work(self) -> float:
        """Median seconds per unit of work."""
        return median(self._of_work)

    @property
    def median(self) -> float:
        """Median seconds per task."""
        return median(self._sorted)

    @property
    def calls_per_worker(self) -> int:
        """Calls that a worker may have: 2 if tasks are so short that waiting for the next one would count, else 1."""
        return 2 if len(self) >= FEWEST_FINISHED and self.median < PIPELINE_BELOW_S else 1

    @property
    def tick(self) -> float:
        """Seconds between two checks for late tasks."""
        if len(self) < FEWEST_FINISHED:
            return MOST_TICK_S / 10
        return min(MOST_TICK_S, max(LEAST_TICK_S, self.median / 10))
