"""Every pool keeps the contract of workers.pool.Pool; the Ray pool survives its workers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workers.pool_tasks import CountCalls, DieAlways, DieOnce, Fail, Sleep, Threads
from workers.errors import ClusterError, TaskError, WorkersLostError
from workers.open_pool import WorkerSettings, open_pool
from workers.pool import Pool, SerialPool
from workers.ray_pool import RayPool, connect


class PoolContract:
    """Inherit and provide ``pool``."""

    @pytest.fixture(scope="class")
    def pool(self) -> Iterator[Pool]:
        raise NotImplementedError

    def test_results_come_in_the_order_of_the_tasks(self, pool: Pool) -> None:
        tasks = [Sleep(n, 0.05 if n % 2 == 0 else 0.0) for n in range(8)]
        assert list(pool.map(tasks)) == list(range(8))

    def test_no_tasks_give_no_results(self, pool: Pool) -> None:
        assert list(pool.map([])) == []

    def test_a_failed_task_is_an_error_that_names_it(self, pool: Pool) -> None:
        results = pool.map([Sleep(0, 0.0), Fail("eval[g1/3]"), Sleep(2, 0.0)])
        assert next(results) == 0
        with pytest.raises(TaskError, match=r"eval\[g1/3\] failed: FloatingPointError: .*genome \[1, 2\]"):
            next(results)

    def test_a_pool_works_on_after_a_failed_task(self, pool: Pool) -> None:
        with pytest.raises(TaskError):
            list(pool.map([Fail("broken"), *[Sleep(n, 0.01) for n in range(4)]]))
        assert list(pool.map([Sleep(7, 0.0)])) == [7]

    def test_workers_stay_warm_between_maps(self, pool: Pool) -> None:
        counts = [*pool.map([CountCalls()] * 6), *pool.map([CountCalls()] * 6)]
        assert sum(counts) > 12 and max(counts) >= 12 // pool.size

    def test_workers_compute_with_the_threads_they_were_given(self, pool: Pool) -> None:
        assert set(pool.map([Threads()] * 3)) == {1}


class TestSerialPool(PoolContract):
    @pytest.fixture(scope="class")
    def pool(self) -> Iterator[Pool]:
        with SerialPool(cpus_per_worker=1) as pool:
            yield pool


@pytest.fixture(scope="module")
def local_ray() -> None:
    connect("local")


class TestRayPool(PoolContract):
    @pytest.fixture(scope="class")
    def pool(self, local_ray: None) -> Iterator[Pool]:
        with RayPool(2) as pool:
            yield pool

    def test_a_lost_worker_is_replaced_and_its_task_retried(self, pool: Pool, tmp_path: Path) -> None:
        tasks = [Sleep(0, 0.0), DieOnce(tmp_path / "pids"), Sleep(2, 0.0), Sleep(3, 0.0)]
        assert list(pool.map(tasks)) == [0, 2, 2, 3]

    def test_a_task_that_keeps_killing_its_worker_ends_the_map(self, pool: Pool) -> None:
        pool.max_retries = 1  # type: ignore[attr-defined]
        with pytest.raises(WorkersLostError, match="die-always lost its worker 2 times"):
            list(pool.map([DieAlways()]))

    def test_more_workers_than_the_cluster_holds_are_refused_with_the_remedy(self, local_ray: None) -> None:
        with pytest.raises(ClusterError, match=r"expected 9999 CPUs .* set workers.count to at most"):
            RayPool(9999)


def test_off_means_this_process() -> None:
    assert isinstance(open_pool(WorkerSettings(ray="off")), SerialPool)
