"""Every pool keeps the contract of workers.pool.base.Pool; the Ray pool survives its workers."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import ray

from bitgenome.common.steps import Step, heard_by
from tests.workers.pool.pool_tasks import Blocks, CountCalls, DieAlways, DieOnce, Fail, Sleep, SleepOnce, Threads
from tests.workers.pool.thread_backend import ThreadBackend
from workers.cluster.open_pool import open_pool
from workers.cluster.ray_cluster import Placement, connect
from workers.cluster.ray_pool import RayPool
from workers.cluster.settings import WorkerSettings
from workers.errors import ClusterError, TaskError, WorkersLostError
from workers.pool import dispatcher
from workers.pool.base import Pool, SerialPool
from workers.pool.dispatcher import Dispatcher
from workers.pool.scheduling import Elasticity, Patience


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

    def test_a_long_task_tells_how_far_it_is(self, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dispatcher, "STEPS_S", 0.1)
        heard: list[Sequence[Step]] = []
        with heard_by(heard.append):
            assert list(pool.map([Blocks(0.4)])) == [3]
        assert Step(0, 3, "block") in [step for running in heard for step in running]

    def test_a_pool_counts_what_it_did(self, pool: Pool) -> None:
        before, busy = pool.statistics.completed, pool.statistics.busy_seconds
        list(pool.map([Sleep(n, 0.05) for n in range(4)]))
        found = pool.statistics
        assert (found.completed - before, found.running, found.queued, found.retries) == (4, 0, 0, 0)
        assert 0.2 <= found.busy_seconds - busy < 2
        assert found.peak_memory_bytes > 10 * 2**20
        assert 1 <= found.workers <= pool.size


class TestThreadPool(PoolContract):
    @pytest.fixture(scope="class")
    def pool(self) -> Iterator[Pool]:
        with Dispatcher(ThreadBackend(threads=1), Elasticity(2, 2)) as pool:
            yield pool


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
        with RayPool(Placement(cpus=0.5), Elasticity(2, 2), Patience(max_retries=1), run="contract") as pool:
            yield pool

    def test_a_lost_worker_is_replaced_and_its_task_retried(self, pool: Pool, tmp_path: Path) -> None:
        tasks = [Sleep(0, 0.0), DieOnce(tmp_path / "pids"), Sleep(2, 0.0), Sleep(3, 0.0)]
        assert list(pool.map(tasks)) == [0, 2, 2, 3]
        assert pool.statistics.retries == 1

    def test_a_task_that_keeps_killing_its_worker_ends_the_map(self, pool: Pool) -> None:
        with pytest.raises(WorkersLostError, match="die-always lost its worker 2 times"):
            list(pool.map([DieAlways()]))

    def test_a_straggler_is_finished_by_another_worker(self, pool: Pool, tmp_path: Path) -> None:
        started = time.monotonic()
        tasks = [*(Sleep(n, 0.1) for n in range(6)), SleepOnce(tmp_path / "started", 15.0)]
        assert list(pool.map(tasks)) == [0, 1, 2, 3, 4, 5, 2]
        assert pool.statistics.speculations >= 1 and time.monotonic() - started < 10

    def test_workers_bear_the_name_of_their_run(self, pool: Pool) -> None:
        list(pool.map([Sleep(0, 0.0)]))
        names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        assert any(name.startswith("bitgenome:contract:worker-") for name in names)

    def test_a_task_longer_than_the_deadline_costs_its_worker(self, local_ray: None, tmp_path: Path) -> None:
        with RayPool(Placement(cpus=0), Elasticity(1, 1), Patience(deadline_s=0.5), threads=0) as pool:
            assert list(pool.map([Sleep(0, 0.0), SleepOnce(tmp_path / "started", 60.0)])) == [0, 2]
            assert pool.statistics.retries == 1

    @pytest.mark.parametrize(
        ("placement", "workers", "message"),
        [
            (Placement(1), 9999, r"expected room for 9999 workers of 1 CPU each, found \d+ CPU on 1 nodes, which hold"),
            (
                Placement(1, gpus=0.5),
                1,
                r"1 CPU and 0.5 GPU each, .* 0 GPU on 1 nodes, which hold 0: lower what a worker",
            ),
            (Placement(1, resources={"tpu": 2}), 1, r"found \d+ CPU, 0 tpu on 1 nodes"),
        ],
    )
    def test_a_cluster_too_small_is_refused_with_what_would_do(
        self, local_ray: None, placement: Placement, workers: int, message: str
    ) -> None:
        with pytest.raises(ClusterError, match=message):
            RayPool(placement, Elasticity(workers))

    def test_of_an_elastic_pool_only_the_least_number_must_fit(self, local_ray: None) -> None:
        with RayPool(Placement(0.5), Elasticity(1, 9999), threads=0) as pool:
            assert list(pool.map([Sleep(n, 0.0) for n in range(4)])) == [0, 1, 2, 3]


def test_off_means_this_process() -> None:
    assert isinstance(open_pool(WorkerSettings(ray="off")), SerialPool)
