"""A real Prometheus scrapes a live run through Ray's own list of nodes, and the dashboard knows its actors by name."""

import json
import math
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.bitgenome.conftest import Finished, Runs
from tests.conftest import REPOSITORY, free_ports
from workers.cluster.worker_logs import LOG_JSON

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="no prometheus here"),
]
NAME = "watched"
GENERATIONS = 12  # a second of search at least: rates want samples before and after
TINY = {  # how good the result is matters to nobody here
    "levels": ["W2", "W4"],
    "text": {"tokens": {"calibration": 2048, "sensitivity": 256, "search": 256, "validation": 512, "test": 512}},
    "search": {"generations": GENERATIONS},
    "healing": {"enabled": "off"},
}
DISCOVERY = "prom_metrics_service_discovery.json"
DASHBOARD = json.loads((REPOSITORY / "docker/grafana/dashboards/bitgenome.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


@dataclass(frozen=True)
class Live:
    """A finished run, and the Prometheus and Ray dashboard that watched it."""

    finished: Finished
    storage: Path
    session: Path  # of Ray
    address: str  # of the cluster
    token: str
    prometheus: str
    dashboard: str
    started: float
    ended: float

    def lines(self, file: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.storage / NAME / file).read_text().splitlines()]

    def values(self, expression: str) -> list[float]:
        """What a panel shows while the run is live: every finite sample, oldest first."""
        for variable in ("run", "model", "strategy"):
            expression = expression.replace(f"${variable}", ".*")
        query = {"query": expression.replace("$__rate_interval", "20s"), "step": "1"}
        query |= {"start": f"{self.started:.0f}", "end": f"{self.ended:.0f}"}
        answer = get(f"{self.prometheus}/api/v1/query_range?{urllib.parse.urlencode(query)}")
        samples = [float(value) for series in answer["data"]["result"] for _, value in series["values"]]
        return [sample for sample in samples if math.isfinite(sample)]

    def ray(self, path: str) -> Any:
        return get(f"{self.dashboard}{path}", self.token)


def get(url: str, token: str | None = None) -> Any:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def wait_for(what: str, ready: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"no {what} within {seconds:g} s"
        time.sleep(0.2)


def answers(url: str, token: str | None = None) -> bool:
    try:
        get(url, token)
    except urllib.error.HTTPError as error:
        return error.code == 200
    except (OSError, ValueError):
        return False
    return True


def prometheus_config(folder: Path) -> Path:
    """The shipped configuration, with this session's list of nodes and a shorter interval."""
    config = yaml.safe_load((REPOSITORY / "docker/prometheus/prometheus.yml").read_text())
    assert config["scrape_configs"][0]["file_sd_configs"][0]["files"] == [f"/tmp/ray/{DISCOVERY}"]
    config["global"]["scrape_interval"] = "1s"
    config["scrape_configs"][0]["file_sd_configs"] = [{"files": [str(folder / DISCOVERY)], "refresh_interval": "1s"}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def live(runs: Runs) -> Iterator[Live]:
    folder = Path(tempfile.mkdtemp(prefix="bg-", dir="/tmp"))  # Ray's sockets want a short path
    gcs, dashboard, client, metrics, agent, port = free_ports(6)
    token = secrets.token_hex(32)
    environment = {
        **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_metrics_report_interval_ms": "1000",
        "RAY_USAGE_STATS_ENABLED": "0", "COLUMNS": "160",
    }  # fmt: skip
    head = [
        Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={gcs}",
        "--node-ip-address=127.0.0.1", "--include-dashboard=true", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}", "--min-worker-port=0",
        "--max-worker-port=0", f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}",
    ]  # fmt: skip
    scraper = [
        "prometheus", f"--config.file={prometheus_config(folder)}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    started = []
    try:
        with (folder / "head.log").open("w") as log, (folder / "prometheus.log").open("w") as other:
            started.append(subprocess.Popen(head, env=environment, stdout=log, stderr=log))
            started.append(subprocess.Popen(scraper, stdout=other, stderr=other))
        wait_for("dashboard", lambda: answers(f"http://127.0.0.1:{dashboard}/api/jobs/", token))
        wait_for("list of nodes", (folder / DISCOVERY).exists)
        begin = time.time()
        path = runs.write(NAME, workers={"ray": f"127.0.0.1:{gcs}", "count": 2}, **TINY)
        finished = subprocess.run(
            runs.command("--log-json", "run", path),
            capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr
        places = (f"http://127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
        session = folder / "session_latest"
        yield Live(finished, runs.storage, session, f"127.0.0.1:{gcs}", token, *places, begin, time.time())
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(timeout=90)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_panel_shows_data_of_a_live_run(live: Live, expression: str) -> None:
    assert live.values(expression), f"no data for {expression}"


def test_published_figures_are_those_of_the_run_directory(live: Live) -> None:
    evaluations = [line for line in live.lines("evaluations.jsonl") if line["tokens"]]
    generations = live.lines("generations.jsonl")
    assert live.values("ray_bitgenome_evaluations_total")[-1] == len(evaluations)
    assert live.values("ray_bitgenome_evaluation_seconds_count")[-1] == len(evaluations)
    assert live.values("ray_bitgenome_tokens_scored_total")[-1] == sum(line["tokens"] for line in evaluations)
    assert live.values("ray_bitgenome_generation")[-1] == len(generations) == GENERATIONS
    assert live.values("ray_bitgenome_best_loss")[-1] == pytest.approx(generations[-1]["best_loss"])
    assert max(live.values("ray_bitgenome_workers")) == 2
    assert max(live.values("ray_bitgenome_device_memory_bytes")) > 100 * 2**20


def test_labels_are_run_model_and_strategy(live: Live) -> None:
    chosen = f'ray_bitgenome_workers{{run="{NAME}", model="stdlib-6m", strategy="genetic"}}'
    assert live.values(chosen) == live.values("ray_bitgenome_workers") != []


def test_the_dashboard_names_actors_tasks_and_the_job(live: Live) -> None:
    actors = {actor["name"] for actor in live.ray("/api/v0/actors")["data"]["result"]["result"]}
    assert {f"bitgenome:{NAME}:worker-{number}" for number in (1, 2)} <= actors
    tasks = {task["name"] for task in live.ray("/api/v0/tasks?limit=10000")["data"]["result"]["result"]}
    assert {f"eval[g{GENERATIONS} search 1/", "eval[validation 1/"} <= {name.partition("/")[0] + "/" for name in tasks}
    jobs = live.ray("/api/jobs/")
    assert [(job["type"], job["status"]) for job in jobs] == [("DRIVER", "SUCCEEDED")], jobs


def test_the_dashboard_answers_nobody_without_the_token(live: Live) -> None:
    for path in ("/api/jobs/", "/api/v0/actors"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(f"{live.dashboard}{path}")


def test_the_driver_logs_nothing_but_json_with_run_and_generation(live: Live) -> None:
    records = [json.loads(line) for line in live.finished.stderr.splitlines() if line.startswith("{")]
    generations = {record["generation"] for record in records if record["run"] == NAME}
    assert {*range(1, GENERATIONS + 1)} <= generations
    assert [line for line in live.finished.stderr.splitlines() if not line.startswith("{")] == []


def test_workers_log_json_that_names_run_and_generation(live: Live) -> None:
    driver = [sys.executable, "-m", "tests.workers.cluster.logged_task", live.address, "logged"]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": live.token, LOG_JSON: "1"}
    subprocess.run(driver, env=environment, cwd=REPOSITORY, check=True, capture_output=True)
    logs = [path.read_text() for path in (live.session / "logs").glob("worker-*.err")]
    (line,) = [line for text in logs for line in text.splitlines() if "said by a worker" in line]
    record = json.loads(line)
    assert (record["message"], record["levelname"]) == ("said by a worker", "WARNING")
    assert (record["actor_name"], record["task_name"]) == ("bitgenome:logged:worker-1", "eval[g7 search 1/1]")
