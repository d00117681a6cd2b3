"""The scheduling core of a pool: which worker runs which task, and when.

It does not depend on Ray; a Backend holds the workers.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any, Literal

from bitgenome.common.steps import tell
from workers.errors import ClusterError, WorkersLostError
from workers.pool.backend import Backend, Event, Finished, Lost
from workers.pool.base import Pool, PoolStatistics, Task, work_of
from workers.pool.scheduling import AHEAD, Durations, Elasticity, Patience, wanted_workers

log = logging.getLogger(__name__)

RESIZE_S = 1.0  # seconds between two checks of the limit and of the room for workers
STEPS_S = 5.0  # seconds between two looks at how far the tasks are
FAILED_STARTS = 8  # tolerated in a row, plus one for each worker held


@dataclass(eq=False)
class _Worker:
    """Holds the state of one worker."""

    number: int
    since: float  # when it was started, fell idle, or began the first of its calls
    state: Literal["starting", "ready", "checked"] = "starting"
    warm: bool = False  # it has finished a task
    calls: "deque[_Call]" = field(default_factory=deque)


@dataclass(eq=False)
class _Call:
    """A call is one task sent to one worker."""

    number: int
    job: "_Job"
    task: int
    worker: _Worker


class _Job:
    """A job is one map: its tasks, and what became of them."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.pending = list(range(len(tasks)))  # a heap: tasks of lost workers come back in any order
        self.unanswered = set(self.pending)
        self.done: dict[int, Finished | WorkersLostError] = {}  # answered, not yet yielded
        self.attempts: Counter[int] = Counter()  # calls of each task that are on workers
        self.losses: Counter[int] = Counter()
        self.speculated: set[int] = set()
        self.durations = Durations()

    def answer(self, task: int, answer: Finished | WorkersLostError) -> None:
        self.unanswered.remove(task)
        self.done[task] = answer

    def take(self, task: int) -> Any:
        """Return the result of an answered task, or raise the error that it ended in."""
        answer = self.done.pop(task)
        if isinstance(answer, WorkersLostError):
            raise answer
        if answer.error is not None:
            raise answer.error
        return answer.result

    def close(self) -> None:
        """Forget the tasks that are not done, and the answers that were not yielded."""
        self.pending.clear()
        self.unanswered.clear()
        self.done.clear()


class Dispatcher(Pool):
    """Runs tasks on as many workers as there are tasks for, within ``elasticity`` and ``limit``, all of them busy.

    Results come in the order of the tasks. At most AHEAD tasks per worker are sent ahead of the next result to be
    yielded. A straggler is sent to an idle worker a second time and the first answer counts, because answers do not
    depend on workers. Tasks of a lost worker run again, at most ``patience.max_retries`` times each; a task that fails
    by itself does not. ``map`` raises ClusterError if there is no worker at all for ``elasticity.start_timeout_s``
    seconds, or if none can start. ``clock`` returns seconds.
    """

    def __init__(
        self,
        backend: Backend,
        elasticity: Elasticity | None = None,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.elasticity = elasticity or Elasticity()
        self.patience = patience or Patience()
        self.statistics = PoolStatistics()
        self._backend, self._clock = backend, clock
        self._numbers = count(1)  # of workers
        self._call_numbers = count(1)
        self._workers: dict[int, _Worker] = {}
        self._calls: dict[int, _Call] = {}
        self._starting: dict[int, _Worker] = {}
        self._idle: dict[int, _Worker] = {}  # the longest idle first
        self._single: dict[int, _Worker] = {}  # workers with one call
        self._failed_starts = 0
        self._most = self.elasticity.ceiling(self.limit(), None)  # workers that may be held, whatever room there is
        self._last_alive = self._next_tick = self._next_resize = self._next_steps = clock()
        self._start(min(self.elasticity.minimum, self._ceiling()))

    @property
    def size(self) -> int:  # type: ignore[override]
        """Number of workers that there may be at present, whether or not they are there."""
        return self._ceiling()

    def _ceiling(self) -> int:
        room = self._backend.capacity() if self.elasticity.maximum is None else None
        return self.elasticity.ceiling(self.limit(), room)

    def map(self, tasks: Sequence[Task]) -> Iterator[Any]:
        job = _Job(tasks)
        self._last_alive = self._next_tick = self._next_resize = self._clock()
        self._next_steps = self._clock() + STEPS_S
        try:
            for wanted in range(len(tasks)):
                while wanted in job.unanswered:
                    self._step(job, wanted)
                yield job.take(wanted)
        finally:
            job.close()
            self._count(job)

    def close(self) -> None:
        for group in (self._workers, self._calls, self._starting, self._idle, self._single):
            group.clear()
        self._backend.close()
        self._count()

    def _step(self, job: _Job, wanted: int) -> None:
        """Send the tasks that can be sent, look after the workers when it is time, and take in the events."""
        self._send_out(job, wanted)
        if self._clock() >= self._next_tick:
            self._look_after(job)
            self._next_tick = self._clock() + job.durations.tick
        if self._clock() >= self._next_steps:
            self._tell_steps(job)
        self._count(job)
        for event in self._backend.wait(max(0.0, min(self._next_tick, self._next_steps) - self._clock())):
            self._take_in(event)

    def _tell_steps(self, job: _Job) -> None:
        """Pass on how far the tasks on workers are, and let the next look wait."""
        begun = [worker.calls[0] for worker in self._workers.values() if worker.calls]
        tell(self._backend.steps({call.worker.number: job.tasks[call.task].label for call in begun if call.job is job}))
        self._next_steps = self._clock() + STEPS_S

    def _send_out(self, job: _Job, wanted: int) -> None:
        last = wanted + AHEAD * max(1, len(self._workers))
        pipelined = job.durations.calls_per_worker > 1
        while job.pending and job.pending[0] < last:
            free = self._idle or (self._single if pipelined else {})
            if not free:
                return
            self._send(job, heappop(job.pending), next(iter(free.values())))

    def _send(self, job: _Job, task: int, worker: _Worker) -> None:
        if not worker.calls:
            worker.since = self._clock()
        call = _Call(next(self._call_numbers), job, task, worker)
        worker.calls.append(call)
        self._calls[call.number] = call
        job.attempts[task] += 1
        self._sort_in(worker)
        self._backend.submit(worker.number, call.number, job.tasks[task])

    def _sort_in(self, worker: _Worker) -> None:
        """Update ``_starting``, ``_idle`` and ``_single`` for one worker."""
        for group in (self._starting, self._idle, self._single):
            group.pop(worker.number, None)
        if worker.state == "starting":
            self._starting[worker.number] = worker
        elif worker.state == "ready" and not worker.calls:
            self._idle[worker.number] = worker
        elif worker.state == "ready" and len(worker.calls) == 1:
            self._single[worker.number] = worker

    def _take_in(self, event: Event) -> None:
        if isinstance(event, Finished):
            if call := self._calls.pop(event.call, None):
                self._finish(call, event)
        elif worker := self._workers.get(event.worker):
            if isinstance(event, Lost):
                self._lose(worker, event.reason)
            else:
                self._failed_starts = 0
                worker.state, worker.since = "ready", self._clock()
                self._sort_in(worker)

    def _finish(self, call: _Call, event: Finished) -> None:
        worker, job, statistics = call.worker, call.job, self.statistics
        worker.calls.remove(call)
        worker.since, worker.warm = self._clock(), True
        self._sort_in(worker)
        if not worker.calls and len(self._workers) > self._most:
            self._drop(worker)
        job.attempts[call.task] -= 1
        statistics.peak_memory_bytes = max(statistics.peak_memory_bytes, event.peak_memory_bytes)
        if call.task in job.unanswered:
            job.answer(call.task, event)
            if event.error is None:
                job.durations.add(event.seconds, work_of(job.tasks[call.task]))
            statistics.completed += 1
            statistics.busy_seconds += event.seconds

    def _lose(self, worker: _Worker, reason: str) -> None:
        """Drop a lost worker and put its tasks back in the queue, unless another worker has them too.

        Idle workers may be gone with it, so all of them are checked.
        """
        self._drop(worker)
        if worker.state == "starting":
            self._failed_starts += 1
            if self._failed_starts > FAILED_STARTS + len(self._workers):
                raise ClusterError(f"expected a worker of {self._backend.needs()} to start, found {reason}")
        for place, call in reversed(list(enumerate(worker.calls))):
            self._lose_call(call, reason, ran=place == 0)
        for other in list(self._idle.values()):
            other.state = "checked"
            self._sort_in(other)
            self._backend.check(other.number)
        if worker.state != "starting":
            self._next_resize = self._next_tick = self._clock()

    def _lose_call(self, call: _Call, reason: str, ran: bool) -> None:
        """Put the task of a lost call back in the queue, or answer it with an error once its retries are used up.

        ``ran`` says whether the task had begun, which counts as a loss.
        """
        job, label = call.job, call.job.tasks[call.task].label
        job.attempts[call.task] -= 1
        if call.task not in job.unanswered or job.attempts[call.task]:
            return
        job.losses[call.task] += ran
        losses = job.losses[call.task]
        if losses > self.patience.max_retries:
            job.answer(call.task, WorkersLostError(f"{label} lost its worker {losses} times, last by {reason}"))
            return
        log.warning("lost worker %d with %s (retry %d): %s", call.worker.number, label, losses, reason)
        heappush(job.pending, call.task)
        self.statistics.retries += 1

    def _look_after(self, job: _Job) -> None:
        now = self._clock()
        if now >= self._next_resize:
            self._resize(job)
            self._next_resize = now + RESIZE_S
        if len(self._starting) < len(self._workers):
            self._last_alive = now
        elif now - self._last_alive > self.elasticity.start_timeout_s:
            raise ClusterError(
                f"expected room for a worker of {self._backend.needs()}, found none within "
                f"{self.elasticity.start_timeout_s:g} s"
            )
        self._speculate(job)
        self._give_up_on_silent()

    def _resize(self, job: _Job) -> None:
        self._most = self.elasticity.ceiling(self.limit(), None)
        wanted = wanted_workers(len(job.unanswered), self.elasticity.minimum, self._ceiling())
        latest = self._clock() - self.elasticity.idle_release_s
        for worker in [*self._starting.values(), *self._idle.values()]:
            held = len(self._workers)
            if held > self._most or (held > wanted and worker.since <= latest):
                self._drop(worker)
        self._start(wanted - len(self._workers))

    def _start(self, more: int) -> None:
        for number in (next(self._numbers) for _ in range(more)):
            self._workers[number] = self._starting[number] = _Worker(number, self._clock())
            self._backend.start(number)

    def _drop(self, worker: _Worker) -> None:
        for group in (self._workers, self._starting, self._idle, self._single):
            group.pop(worker.number, None)
        for call in worker.calls:
            self._calls.pop(call.number, None)
        self._backend.stop(worker.number)

    def _speculate(self, job: _Job) -> None:
        """Send stragglers that no other worker has to idle workers."""
        if not self._idle:
            return
        now = self._clock()
        calls = (call for call in self._calls.values() if call.job is job)
        late = [call for call in calls if now - call.worker.since > self._straggler_after(call)]
        for call in sorted(late, key=lambda call: call.worker.since):
            if self._idle and call.task in job.unanswered and call.task not in job.speculated:
                job.speculated.add(call.task)
                self.statistics.speculations += 1
                log.info("%s takes long on worker %d: sent out again", job.tasks[call.task].label, call.worker.number)
                self._send(job, call.task, next(iter(self._idle.values())))

    def _straggler_after(self, call: _Call) -> float:
        return self.patience.straggler_after(call.job.durations, work_of(call.job.tasks[call.task]))

    def _give_up_on_silent(self) -> None:
        """Replace workers that have outlived the deadline, or work too long on what nobody waits for."""
        for worker in [worker for worker in self._workers.values() if worker.calls]:
            call = worker.calls[0]
            superseded = call.task not in call.job.unanswered
            most = self.patience.gives_up_after(self._straggler_after(call), superseded, worker.warm)
            if self._clock() - worker.since > most:
                self._lose(worker, f"no answer within {most:.1f} s")

    def _count(self, job: _Job | None = None) -> None:
        self.statistics.starting = len(self._starting)
        self.statistics.workers = len(self._workers) - len(self._starting)
        self.statistics.running = len(self._calls)
        self.statistics.queued = len(job.pending) if job else 0
