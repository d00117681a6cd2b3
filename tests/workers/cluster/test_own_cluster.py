"""A cluster that nobody has named is taken only if this user has started it, by ray start."""

import getpass
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import free_ports
from workers.cluster.access import admitted_address
from workers.cluster.own_cluster import Dashboard, check_own, dashboards, own_cluster
from workers.errors import ClusterError

Start = Callable[..., str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process with the command line of a Ray dashboard, and returns the dashboard's address."""
    processes = []

    def begin(port: int, folder: str, started: str | None) -> str:
        (tmp_path / folder).mkdir()
        if started:
            (tmp_path / folder / "ray_current_cluster").write_text(started)
        options = [f"--port={port}", f"--temp-dir={tmp_path / folder}", "--gcs-address=127.0.0.1:1"]
        command = [sys.executable, "-c", "import time; time.sleep(60)", "ray/dashboard/dashboard.py", *options]
        processes.append(subprocess.Popen(command))
        deadline = time.monotonic() + 10
        while not any(f"{tmp_path / folder}" in found.options.get("temp-dir", "") for found in dashboards()):
            assert time.monotonic() < deadline
        return f"http://127.0.0.1:{port}"

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def test_a_cluster_by_ray_start_is_taken_and_one_that_a_run_started_for_itself_is_not(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, other = free_ports(2)
    check_own(start(port, "own", "127.0.0.1:1"))
    with pytest.raises(ClusterError, match="found one that a run has started for itself: start one, or name one"):
        check_own(start(other, "of-a-run", None))
    with pytest.raises(ClusterError, match="found 2 that may be there"):
        check_own(start(port, "same-port", "127.0.0.1:1"))
    with pytest.raises(ClusterError, match="found none of yours"):
        check_own("http://127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ClusterError, match="expected one cluster .* for RAY_ADDRESS=auto, found [2-9]: name it"):
        admitted_address("auto")
    monkeypatch.setattr(getpass, "getuser", lambda: "somebody-else")
    with pytest.raises(ClusterError, match=f"found that of the user {dashboards()[0].user}"):
        check_own(f"http://127.0.0.1:{other}")
    with pytest.raises(ClusterError, match="found 0"):
        own_cluster()


def test_a_cluster_whose_options_are_not_known_is_not_taken() -> None:
    assert not Dashboard("me", {"gcs-address": "127.0.0.1:1"}).by_ray_start
