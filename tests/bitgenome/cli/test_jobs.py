"""Runs as jobs of a real Ray cluster that asks for its token: submitted, read, stopped, resumed; secrets stay out."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from ray.job_submission import JobDetails

from bitgenome.cli.jobs import environment_of, job_settings, resources_of
from bitgenome.common.errors import UserError
from tests.bitgenome.conftest import Finished, Runs, call_here
from tests.conftest import REPOSITORY, free_ports, let_ray_read_environment
from workers.cluster.jobs import CONFIG_VARIABLE, Jobs, Submission
from workers.errors import ClusterError

SECRETS = {
    "RAY_AUTH_TOKEN": "token-that-nobody-may-read-3f1b9c",
    "HF_TOKEN": "hf_that_nobody_may_read_8d2e",
    "AWS_SECRET_ACCESS_KEY": "aws-that-nobody-may-read-77ac",
}
JOB = {"healing": {"enabled": "off"}, "workers": {"ray": "auto", "count": 1}}  # the evaluations of the run ``base``


@dataclass(frozen=True)
class Head:
    """A Ray head with a dashboard on loopback, and the command line of its user."""

    address: str
    logs: Path

    def call(self, *arguments: str | Path, **environment: str) -> Finished:
        """The command line, in this process, where Ray is imported already."""
        with self.as_user(**environment):
            return call_here(*arguments, "--address", self.address)

    @contextmanager
    def as_user(self, **environment: str) -> Iterator[pytest.MonkeyPatch]:
        """With the environment of the cluster's user, and what is set in it meanwhile forgotten."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ({"RAY_API_SERVER_ADDRESS": ""} | SECRETS | environment).items():
                patch.setenv(name, value)
            patch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
            yield patch
        let_ray_read_environment()  # the tests behind this one are of another user

    def details(self, job: str) -> JobDetails:
        with self.as_user():
            return Jobs(self.address)._details(job)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    port, dashboard, client, agent = free_ports(4)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    unset = {"RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"}
    environment = {name: value for name, value in os.environ.items() if name not in unset} | SECRETS
    environment["RAY_JOB_STOP_WAIT_TIME_S"] = "15"  # of 3 by default: other tests may hold every core meanwhile
    environment |= {"PATH": path, "COLUMNS": "160", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    logs = Path(tempfile.mkdtemp(prefix="ray-"))  # names of its sockets have room for little
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--port={port}", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        "--object-store-memory=100000000", f"--temp-dir={logs}",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=environment | {"RAY_AUTH_MODE": "token"}, cwd=REPOSITORY, stdout=subprocess.DEVNULL
    )
    started = Head(f"http://127.0.0.1:{dashboard}", logs)
    try:
        wait_until(lambda: started.call("logs", "nobody").stderr.startswith("error: expected a job"), 120)
        yield started
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        process.send_signal(signal.SIGTERM)
        for member in psutil.wait_procs(family, timeout=20)[1]:
            member.kill()
        shutil.rmtree(logs, ignore_errors=True)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def resumed(head: Head, runs: Runs, finished: Finished) -> Finished:
    """The run ``job``: submitted, submitted again while it runs, stopped in its search, submitted to its end."""
    config = runs.write("job", **JOB)
    first = head.call("submit", config)
    assert first.stdout.startswith("submitted job-attempt1;"), first.stderr
    again = head.call("submit", config)
    assert again.returncode == 2 and again.stderr.count("\n") == 1
    assert re.search(r"expected no running job of job, found job-attempt1 \((pending|running)\): ", again.stderr)
    threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    left = head.call("logs", "job", "--follow")  # Ctrl-C leaves the log, and the job goes on
    assert left.returncode == 130, left.stderr
    log = runs.storage / "job" / "evaluations.jsonl"
    wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") >= 3, 300)
    stopped = head.call("stop", "job")
    assert stopped.stdout.startswith("job-attempt1 stopped; bitgenome submit continues it"), stopped.stderr
    assert not (runs.storage / "job" / "best.json").exists()
    return head.call("submit", config, "--wait")


def test_a_job_that_was_stopped_and_submitted_again_ends_as_the_undisturbed_run(resumed: Finished, runs: Runs) -> None:
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.startswith("submitted job-attempt2;") and "Held-out test text" in resumed.stdout
    assert runs.evaluations("job") == runs.evaluations("base")
    assert runs.best("job")["winner"]["genome"] == runs.best("base")["winner"]["genome"]


def test_a_stopped_job_ends_by_itself_within_rays_grace_time(resumed: Finished, head: Head) -> None:
    log = head.call("logs", "job-attempt1").stdout
    assert "interrupted; nothing is lost. Continue with: bitgenome resume" in log.replace("\n", " ")
    (supervisor,) = head.logs.glob("session_2*/logs/jobs/supervisor-job-attempt1.log")
    assert "terminated gracefully" in supervisor.read_text()


def test_a_job_that_has_ended_cannot_be_stopped_and_its_log_can_be_read(resumed: Finished, head: Head) -> None:
    refused = head.call("stop", "job")
    assert refused.returncode == 2 and "expected a running job, found job-attempt2 to have succeeded" in refused.stderr
    assert "Held-out test text" in head.call("logs", "job", "--follow").stdout


def test_a_users_mistake_ends_the_job_with_the_exit_code_of_the_command_line(head: Head, runs: Runs) -> None:
    done = head.call("submit", runs.write("lost", **JOB, model="./nowhere"), "--wait")
    assert done.returncode == 2
    assert "error: expected a Hugging Face model folder or id, found no folder at ./nowhere" in done.stdout


def test_the_dashboard_shows_run_configuration_and_versions(resumed: Finished, head: Head) -> None:
    details = head.details("job-attempt2")
    assert details.metadata.keys() == {"run", "config_digest", "model", "strategy", "bitgenome"}
    assert details.metadata["run"] == "job" and details.metadata["strategy"] == "genetic"
    assert yaml.safe_load(details.runtime_env["env_vars"][CONFIG_VARIABLE])["name"] == "job"


def test_no_secret_of_user_or_cluster_is_in_a_run_a_log_or_a_jobs_record(
    resumed: Finished, head: Head, runs: Runs
) -> None:
    job_logs = [path for path in head.logs.rglob("logs/**/*") if path.is_file() and "job" in path.name]
    files = [path for path in (runs.storage / "job").rglob("*") if path.is_file()]
    assert len(files) > 8 and len(job_logs) > 2
    record = head.details("job-attempt2").model_dump_json()
    written = [record, resumed.stdout, resumed.stderr]
    for name, secret in SECRETS.items():
        assert not [path for path in [*files, *job_logs] if secret.encode() in path.read_bytes()], name
        assert not [text for text in written if secret in text], name


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [({"RAY_AUTH_TOKEN": "wrong"}, "found one that it refuses"), ({"RAY_AUTH_TOKEN": "", "HOME": "/"}, "found none")],
)
def test_a_wrong_and_a_missing_token_are_refused_in_one_sentence(
    environment: dict[str, str], sentence: str, head: Head, runs: Runs
) -> None:
    said = head.call("submit", runs.write("refused", **JOB), **environment)
    assert said.returncode == 2 and said.stderr.count("\n") == 1
    assert re.match(rf"error: expected the token of the cluster at {head.address} in RAY_AUTH_TOKEN.*, ", said.stderr)
    assert sentence in said.stderr


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("http://127.0.0.1:1", "expected the dashboard of a Ray cluster at http://127.0.0.1:1, found none"),
        ("127.0.0.1:8265", "expected the dashboard's address as http://HOST:PORT, found '127.0.0.1:8265'"),
        ("file:///etc/passwd", "expected the dashboard's address as http://HOST:PORT"),
    ],
)
def test_an_address_without_a_dashboard_is_refused_within_15_seconds(address: str, sentence: str) -> None:
    started = time.monotonic()
    with pytest.raises(ClusterError, match=re.escape(sentence)):
        Jobs(address)
    assert time.monotonic() - started < 15


def test_settings_reach_a_job_as_they_are_whatever_the_clusters_variables_hold() -> None:
    settings = json.dumps({"model": "/models/$HOME ${RAY_AUTH_TOKEN}"})
    variables = Submission("run", settings, {}, {"env_vars": {"A": "1"}}).environment["env_vars"]
    assert variables["A"] == "1" and "$" not in variables[CONFIG_VARIABLE]
    assert yaml.safe_load(variables[CONFIG_VARIABLE]) == json.loads(settings)


def test_paths_of_a_job_stay_those_of_the_cluster(runs: Runs) -> None:
    config = runs.write("paths", model="models/on-the-cluster", storage_path="runs")
    name, settings, metadata = job_settings(config, ["workers.ray=auto"], insecure=True)
    sent = json.loads(settings)
    assert (name, sent["model"], sent["storage_path"]) == ("paths", "models/on-the-cluster", "runs")
    assert sent["workers"]["insecure"] is True and metadata["model"] == "models/on-the-cluster"
    with pytest.raises(UserError, match="expected workers.ray: auto in a job, .* --set workers.ray=auto"):
        job_settings(config, ["workers.ray=local"], insecure=False)


def test_a_runtime_environment_comes_from_an_image_a_file_or_a_lock(tmp_path: Path) -> None:
    lock, file, wheel = tmp_path / "constraints.txt", tmp_path / "env.yaml", tmp_path / "bitgenome-1-py3-none-any.whl"
    lock.write_text("# pinned\nnumpy==2.0.0  # for all\n\nray==2.60.0\n")
    file.write_text("env_vars: {A: '1'}\n")
    wheel.touch()
    assert environment_of(None, None, None, None) == {}
    assert environment_of("registry/bitgenome:1", None, None, None) == {"image_uri": "registry/bitgenome:1"}
    assert environment_of(None, file, None, None) == {"env_vars": {"A": "1"}}
    file.write_text("env_vars:\npy_modules:\n")
    assert environment_of(None, file, None, wheel) == {"py_modules": [str(wheel)]}
    file.write_text("env_vars: [A]\n")
    with pytest.raises(UserError, match=r"expected env_vars as a mapping in .*env.yaml, found \['A'\]"):
        environment_of(None, file, None, None)
    installed = environment_of(None, None, lock, wheel)
    assert installed == {"pip": ["numpy==2.0.0", "ray==2.60.0"], "py_modules": [str(wheel)]}
    with pytest.raises(UserError, match="found both: give --image alone"):
        environment_of("image", file, None, None)
    with pytest.raises(UserError, match=r"expected a wheel \(\*.whl\), found none at nowhere.whl"):
        environment_of(None, None, None, Path("nowhere.whl"))


def test_entrypoint_resources_are_amounts_by_name() -> None:
    assert resources_of('{"head": 1}') == {"head": 1.0} and resources_of(None) == {}
    with pytest.raises(UserError, match="as JSON of amounts by name, found '\\[1\\]'"):
        resources_of("[1]")
