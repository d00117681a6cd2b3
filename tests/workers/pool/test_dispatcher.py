"""The dispatcher in simulated time: who runs what, and when."""

import math
import random
from collections.abc import Sequence

import pytest

from tests.workers.pool.simulated_backend import START_S, Named, SimulatedBackend
from workers.errors import ClusterError, TaskError, WorkersLostError
from workers.pool.backend import Event, Lost
from workers.pool.base import Task, work_of
from workers.pool.dispatcher import Dispatcher
from workers.pool.scheduling import AHEAD, Elasticity, Patience


def tasks(count: int) -> list[Named]:
    return [Named(f"t{n}") for n in range(count)]


def results(count: int) -> list[str]:
    return [f"t{n} done" for n in range(count)]


def pool_over(
    backend: SimulatedBackend, least: int = 1, most: int | None = None, patience: Patience | None = None
) -> Dispatcher:
    return Dispatcher(backend, Elasticity(least, most, idle_release_s=60.0), patience, backend.clock)


def slow(*names: str, factor: float = 10.0, once: bool = True) -> SimulatedBackend:
    """Tasks of one second, but those of ``names`` take ``factor`` as long, if ``once`` only the first time."""
    return SimulatedBackend(
        lambda task, worker, attempt: factor if task.label in names and (attempt == 1 or not once) else 1.0
    )


def test_results_come_in_the_order_of_the_tasks_whoever_is_first() -> None:
    backend = SimulatedBackend(lambda task, worker, attempt: 1.0 + hash(task.label) % 7)
    assert list(pool_over(backend, most=4).map(tasks(40))) == results(40)


def test_as_many_workers_start_as_there_are_tasks_for() -> None:
    backend = slow()
    pool = pool_over(backend, least=2, most=8)
    assert backend.times("start") == 2
    list(pool.map(tasks(5)))
    assert backend.times("start") == 5
    list(pool.map(tasks(50)))
    assert backend.times("start") == 8


def test_without_a_maximum_the_room_there_is_decides() -> None:
    backend = slow()
    backend.room = 3
    pool = pool_over(backend)
    results = pool.map(tasks(100))
    next(results)
    assert (pool.size, pool.statistics.workers) == (3, 3)
    backend.make_room(4)
    list(results)
    assert (pool.size, pool.statistics.workers) == (7, 7)


def test_workers_that_find_a_place_late_are_used_at_once() -> None:
    backend = slow()
    backend.room = 1
    running = pool_over(backend, most=4).map(tasks(100))
    next(running)
    backend.make_room(3)
    list(running)
    assert backend.now < START_S + 1 + START_S + 100 / 4 + 1


def test_a_straggler_is_sent_out_a_second_time_and_the_first_answer_counts() -> None:
    backend = slow("t3", factor=1000.0)
    pool = pool_over(backend, most=4)
    assert list(pool.map(tasks(20))) == results(20)
    assert (backend.times("t3"), pool.statistics.speculations, pool.statistics.completed) == (2, 1, 20)
    assert backend.now < 20


def test_a_large_task_is_no_straggler_for_taking_long_and_a_small_one_is_for_taking_as_long() -> None:
    def seconds(task: Task, worker: int, attempt: int) -> float:
        return {"large 3": 18.0, "small 5": 10.0 if attempt == 1 else 1.0}.get(task.label, work_of(task))

    large = [Named(f"large {n}", work=10.0) for n in range(4)]
    small = [Named(f"small {n}") for n in range(12)]
    backend = SimulatedBackend(seconds)
    pool = pool_over(backend, most=4)
    list(pool.map([*large, *small]))
    assert (backend.times("small 5"), pool.statistics.speculations) == (2, 1)


def test_a_straggler_has_one_more_chance_and_no_third_worker() -> None:
    backend = slow("t0", factor=30.0, once=False)
    assert list(pool_over(backend, most=4).map(tasks(8))) == results(8)
    assert backend.times("t0") == 2


def test_a_worker_that_never_comes_back_is_replaced() -> None:
    backend = slow("t5", factor=math.inf)
    pool = pool_over(backend, least=4, most=4)
    assert list(pool.map(tasks(20))) == results(20)
    assert list(pool.map(tasks(200))) == results(200)
    assert (backend.times("stop"), backend.times("start"), pool.statistics.workers) == (1, 5, 4)


def test_a_worker_that_still_loads_is_not_stopped_for_being_slower_than_the_warm() -> None:
    backend = SimulatedBackend(lambda task, worker, attempt: 500.0 if worker == 4 and task.label == "t3" else 1.0)
    pool = pool_over(backend, least=4, most=4)
    assert list(pool.map(tasks(200))) == results(200)
    assert pool.statistics.speculations == 1 and backend.times("stop") == 0


@pytest.mark.parametrize(("hangs", "lost_after"), [("t1", 10.0), ("t0", 10.0 + 200.0)])
def test_after_twice_the_deadline_a_worker_counts_as_lost_and_in_its_first_task_later(
    hangs: str, lost_after: float
) -> None:
    backend = slow(hangs, factor=math.inf)
    pool = pool_over(backend, least=1, most=1, patience=Patience(deadline_s=5.0, loading_s=200.0))
    assert list(pool.map(tasks(3))) == results(3)
    assert (pool.statistics.retries, backend.times("stop")) == (1, 1)
    assert 0 <= backend.now - (START_S + lost_after + START_S + 3) < 2


def test_a_task_that_always_outlives_the_deadline_ends_the_map() -> None:
    backend = slow("t0", factor=math.inf, once=False)
    pool = pool_over(backend, most=2, patience=Patience(deadline_s=5.0, loading_s=30.0, max_retries=2))
    with pytest.raises(WorkersLostError, match=r"t0 lost its worker \d times, last by no answer within 40.0 s"):
        list(pool.map(tasks(2)))


def test_tasks_of_lost_workers_run_again_and_the_workers_are_replaced() -> None:
    backend = slow()
    pool = pool_over(backend, least=4, most=4)
    for worker in (2, 3):
        backend.kill(worker, START_S + 2.5)
    assert list(pool.map(tasks(40))) == results(40)
    assert (pool.statistics.retries, pool.statistics.workers, pool.statistics.completed) == (2, 4, 40)


def test_tasks_of_lost_workers_run_in_order_on_the_few_that_are_left() -> None:
    class Shrinking(SimulatedBackend):
        def wait(self, timeout: float) -> list[Event]:
            events = super().wait(timeout)
            if any(isinstance(event, Lost) for event in events):
                self.room = 2
            assert self.now < 2000, "it waits for a task that nobody works on"
            return events

    backend = Shrinking(lambda task, worker, attempt: 1000.0 if task.label == "t0" and attempt == 1 else 1.0, room=8)
    for worker in range(1, 7):  # the one at work on t0 first
        backend.kill(worker, START_S + 2.5 + worker / 1000)
    assert list(pool_over(backend).map(tasks(60))) == results(60)


def test_a_node_that_goes_while_its_workers_are_idle_costs_a_task_one_retry_at_most() -> None:
    backend = slow()
    pool = pool_over(backend, least=8, most=8, patience=Patience(max_retries=1))
    list(pool.map(tasks(8)))
    backend.alive -= set(range(1, 7))  # six of eight, and nobody was told
    assert list(pool.map(tasks(8))) == results(8)


def test_a_task_that_loses_every_worker_ends_the_map_with_its_name() -> None:
    class Deadly(SimulatedBackend):
        def submit(self, worker, call, task):  # type: ignore[no-untyped-def]
            super().submit(worker, call, task)
            if task.label == "t1":
                self.kill(worker, self.now + 0.5)

    pool = pool_over(Deadly(lambda task, worker, attempt: 1.0), most=3)
    running = pool.map(tasks(3))
    assert next(running) == "t0 done"
    with pytest.raises(WorkersLostError, match="t1 lost its worker 4 times, last by its node went"):
        next(running)


def test_a_task_that_fails_by_itself_is_not_tried_again() -> None:
    backend = slow()
    pool = pool_over(backend, most=2)
    with pytest.raises(TaskError, match="t1 failed: not finite"):
        list(pool.map([Named("t0"), Named("t1", TaskError("t1", "not finite")), Named("t2")]))
    assert backend.times("t1") == 1
    assert list(pool.map(tasks(4))) == results(4)


def test_what_an_abandoned_map_left_running_does_not_disturb_the_next() -> None:
    backend = slow("t1", "t2", factor=5.0)
    pool = pool_over(backend, least=3, most=3)
    running = pool.map(tasks(9))
    next(running)
    running.close()
    assert list(pool.map(tasks(9))) == results(9)


def test_results_that_wait_to_be_taken_are_bounded() -> None:
    backend = slow("t0", factor=1000.0, once=False)
    pool = pool_over(backend, most=4)
    assert next(pool.map(tasks(500))) == "t0 done"
    assert pool.statistics.completed <= 4 * AHEAD


def test_the_limit_shrinks_and_grows_a_pool_that_works() -> None:
    backend = slow()
    pool = pool_over(backend, most=8)
    seen = []
    for number, _ in enumerate(pool.map(tasks(300))):
        seen.append(pool.statistics.workers)
        pool.limit = lambda number=number: 2 if 100 <= number < 200 else None  # type: ignore[misc]
    assert (seen[99], min(seen[120:199]), max(seen[120:199]), seen[-1]) == (8, 2, 2, 8)
    assert pool.statistics.retries == 0


def test_idle_workers_go_back_and_the_least_number_stays() -> None:
    backend = slow("t0", factor=600.0, once=False)
    pool = pool_over(backend, least=2, most=6)
    list(pool.map(tasks(12)))
    assert pool.statistics.workers == 2 and backend.times("stop") == 4


def test_no_room_for_any_worker_is_an_error_after_a_while() -> None:
    backend = slow()
    pool = pool_over(backend, most=2)
    backend.room = 0
    backend.alive.clear()
    with pytest.raises(ClusterError, match=r"expected room for a worker of 1 CPU, found none within 300 s"):
        list(pool.map(tasks(2)))


def test_workers_that_never_start_are_an_error() -> None:
    class Broken(SimulatedBackend):
        def start(self, worker):  # type: ignore[no-untyped-def]
            self.kill(worker, self.now + 1)

    with pytest.raises(ClusterError, match="expected a worker of 1 CPU to start, found its node went"):
        list(pool_over(Broken(lambda task, worker, attempt: 1.0), most=2).map(tasks(2)))


def test_short_tasks_are_sent_ahead_and_long_ones_are_not() -> None:
    def most_waiting(seconds: float) -> int:
        pool = pool_over(SimulatedBackend(lambda task, worker, attempt: seconds), most=2)
        return max(pool.statistics.running for _ in pool.map(tasks(50)))

    assert (most_waiting(0.01), most_waiting(1.0)) == (4, 2)


def chaos(seed: int) -> Sequence[str]:
    """120 tasks of uneven length on workers of which one dies every few seconds, within a limit that changes."""
    rng = random.Random(seed)
    backend = SimulatedBackend(lambda task, worker, attempt: rng.choice((0.5, 1.0, 1.0, 12.0)))
    for moment in range(3, 60, 3):
        backend.kill(rng.randrange(1, 30), moment + rng.random())
    pool = pool_over(backend, most=8, patience=Patience(max_retries=10))
    pool.limit = lambda: rng.choice((None, 2, 5))
    return list(pool.map(tasks(120)))


@pytest.mark.parametrize("seed", range(10))
def test_whatever_happens_every_task_is_answered_once_and_in_order(seed: int) -> None:
    assert chaos(seed) == results(120)
