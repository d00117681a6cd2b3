"""How a batch divides its cluster: no more runs than fit, workers evenly, and nothing left behind."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml

from bitgenome.batch.batch import START_TIMEOUT_S, Batch, make_directory, settings_of
from bitgenome.batch.config import BatchRun, load_batch
from bitgenome.batch.shares import Shares
from bitgenome.batch.state import RunState, Stage
from bitgenome.common import layout
from bitgenome.common.cpus import usable_cpus
from bitgenome.storage.worker_limit import write_limit
from tests.bitgenome.batch.test_config import write
from tests.conftest import let_ray_read_environment
from workers.cluster.access import use_token
from workers.cluster.settings import WorkerSettings
from workers.cluster.shared_cluster import SharedCluster, fair_share

ON_RAY = {"ray": "local", "max": 8, "cpus_per_worker": 4}


@pytest.fixture(scope="module")
def cluster() -> Iterator[SharedCluster]:
    """16 CPUs by Ray's count."""
    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")  # of this cluster only
        use_token()
        ray.init("local", num_cpus=16, include_dashboard=False, log_to_driver=False)
        yield SharedCluster(WorkerSettings(ray="local"))
        ray.shutdown()
    let_ray_read_environment()


def runs_on(path: Path, workers: dict[str, Any]) -> list[BatchRun]:
    file = write(path, matrix={"search.seed": [0, 1, 2]})
    settings = yaml.safe_load(file.read_text())
    settings["base"]["workers"] = workers
    file.write_text(yaml.safe_dump(settings))
    return load_batch([file])


@pytest.fixture
def runs(tmp_path: Path) -> list[BatchRun]:
    return runs_on(tmp_path, ON_RAY)


def limits(runs: list[BatchRun]) -> list[int | None]:
    files = [run.directory / layout.WORKER_LIMIT for run in runs]
    return [json.loads(file.read_text())["most"] if file.is_file() else None for file in files]


@pytest.mark.parametrize(
    ("room", "most", "shares"),
    [
        (4, None, [2, 1, 1]),
        (4, 8, [2, 1, 5]),  # the newest asks for what max has room for beyond the four
        (2, None, [1, 1, 1]),
        (16, 3, [3, 3, 3]),
        (16, None, [6, 5, 5]),
    ],
)
def test_workers_are_shared_evenly_and_only_the_newest_asks_for_more_than_fits(
    room: int, most: int | None, shares: list[int]
) -> None:
    assert [fair_share(room, most, place, 3) for place in range(3)] == shares


def test_a_lone_run_may_ask_for_all_that_max_says() -> None:
    assert fair_share(4, 8, 0, 1) == 8
    assert fair_share(4, None, 0, 1) == 4


def test_as_many_runs_go_at_a_time_as_the_cluster_has_workers_for(
    cluster: SharedCluster, runs: list[BatchRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster.room(runs[0].config.workers) == 4, "max says 8, and 4 fit"
    assert Shares("six", cluster, 100).runs_at_a_time(runs) == 4
    assert Shares("six", cluster, 2).runs_at_a_time(runs) == 2
    assert Shares("six", cluster, None).runs_at_a_time(runs) == min(4, usable_cpus())


def test_a_share_is_taken_back_and_a_limit_of_a_person_stays(cluster: SharedCluster, runs: list[BatchRun]) -> None:
    shares = Shares("six", cluster, None)
    runs[1].directory.mkdir(parents=True)
    write_limit(runs[1].directory, 7)
    shares.give(runs[:1])
    assert limits(runs) == [8, 7, None]
    shares.give(runs)
    assert limits(runs) == [2, 7, 5]
    shares.take_back(runs[2].directory)
    assert limits(runs) == [2, 7, None]
    shares.close()
    assert limits(runs) == [None, 7, None]


def test_an_interrupted_batch_leaves_no_limit_to_its_runs(
    cluster: SharedCluster, runs: list[BatchRun], tmp_path: Path
) -> None:
    path = tmp_path / "batch-six"
    make_directory(runs, path)
    states = [RunState(run, path / layout.LOGS / f"{run.name}.log") for run in runs]
    seen = []

    def changed(state: RunState) -> None:
        seen.append((state.stage, limits(runs)[0]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Batch(path, states, Shares("six", cluster, None), changed).run()
    assert seen == [(Stage.PREPARING, 8)]
    assert limits(runs) == [None] * 3
    assert not any(str(path / layout.CONFIGS) in " ".join(child.cmdline()) for child in psutil.Process().children())


def test_a_run_waits_longer_for_its_workers_than_alone_unless_its_file_says_how_long(tmp_path: Path) -> None:
    assert settings_of(runs_on(tmp_path, ON_RAY)[0])["workers"]["start_timeout"] == START_TIMEOUT_S > 3600
    told = runs_on(tmp_path, {**ON_RAY, "start_timeout": 300})
    assert settings_of(told[0])["workers"]["start_timeout"] == 300


def test_cpus_are_those_that_this_process_may_use() -> None:
    one = min(os.sched_getaffinity(0))
    code = "import os; from bitgenome.common.cpus import usable_cpus as u; os.sched_setaffinity(0, {%d}); print(u())"
    said = subprocess.run([sys.executable, "-c", code % one], capture_output=True, text=True, check=True).stdout
    assert said == "1\n"
