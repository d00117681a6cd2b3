"""A pool on several Ray nodes: one that joins is used, and one that leaves is survived."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray.cluster_utils import Cluster

from tests.workers.pool.pool_tasks import Sleep
from workers.cluster.access import use_token
from workers.cluster.ray_cluster import Placement, connect
from workers.cluster.ray_pool import RayPool
from workers.errors import ClusterError
from workers.pool.scheduling import Elasticity

pytestmark = pytest.mark.cluster

HEALTH_CHECK = "RAY_health_check_period_ms"
WORKER = Placement(cpus=1, resources={"slot": 1})


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without slots; its address is that of the pools."""
    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HEALTH_CHECK, "500")
        patch.setenv("RAY_AUTH_MODE", "token")  # Ray keeps the mode of the first cluster that this process joined
        use_token()
        ensure_token_if_auth_enabled()  # made where this user has none yet
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            connect(cluster.address)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def add_node(cluster: Any, slots: int) -> Any:
    return cluster.add_node(num_cpus=slots, resources={"slot": slots})


def test_a_pool_takes_nodes_that_join_and_survives_one_that_goes(cluster: Any) -> None:
    first = add_node(cluster, 2)
    with RayPool(WORKER, Elasticity(1, None), threads=0, run="nodes") as pool:
        assert pool.size == 2
        results = pool.map([Sleep(n, 0.3) for n in range(100)])
        found = [next(results) for _ in range(4)]
        add_node(cluster, 2)
        while pool.statistics.workers < 4:
            found.append(next(results))
        cluster.remove_node(first, allow_graceful=False)
        found += results
        assert found == list(range(100))
        assert 1 <= pool.statistics.retries <= 2
        assert (pool.size, pool.statistics.workers) == (2, 2)


def test_a_pool_waits_for_its_first_node(cluster: Any, tmp_path: Path) -> None:
    far = Placement(cpus=1, resources={"far": 1})
    with RayPool(far, Elasticity(0, 2), threads=0, run="empty") as pool:
        started = time.monotonic()
        results = pool.map([Sleep(n, 0.0) for n in range(4)])
        cluster.add_node(num_cpus=1, resources={"far": 1})
        assert list(results) == [0, 1, 2, 3]
        assert time.monotonic() - started < 60


def test_a_driver_whose_own_node_is_gone_says_so_at_once(cluster: Any) -> None:
    """The last of this file, as the cluster has no head from then on."""
    add_node(cluster, 1)
    with RayPool(WORKER, Elasticity(1, 2), threads=0, run="headless") as pool:
        results = pool.map([Sleep(n, 0.3) for n in range(100)])
        assert next(results) == 0
        cluster.head_node.all_processes["raylet"][0].process.kill()
        started = time.monotonic()
        with pytest.raises(ClusterError, match="expected the Ray node that this driver is connected through to live"):
            list(results)
        assert time.monotonic() - started < 60
