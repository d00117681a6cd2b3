"""Runs on a local S3 server: killed, the disk wiped, resumed elsewhere; and storage that cannot be used."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
import yaml

from bitgenome.common import layout
from bitgenome.observe.run_status import RunReader
from bitgenome.storage.lease import Lease, LeaseHeldError
from tests.bitgenome.cli.test_bad_input import refusal
from tests.bitgenome.conftest import Runs, call_here
from tests.bitgenome.observe.test_status import driven, said
from tests.conftest import REPOSITORY
from workers.storage.folders import open_folder

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""
BUCKET = "genomes"


@dataclass(frozen=True)
class Machine:
    """The command line on a machine with a disk of its own."""

    cache: Path
    runs: Runs

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "BITGENOME_CACHE": str(self.cache), "COLUMNS": "160"}

    def start(self, *arguments: str | Path) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self.runs.command(*arguments), stdout=pipe, stderr=pipe, text=True, env=self.environment, cwd=REPOSITORY
        )

    def call(self, *arguments: str | Path) -> tuple[int, str]:
        """Exit code and what it said on stderr."""
        process = self.start(*arguments)
        _, said = process.communicate()
        return process.returncode, said


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """URL of an empty bucket on a server of its own process; s3fs finds it through the environment."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", process.stdout.readline().strip())
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield f"s3://{BUCKET}"
    process.kill()
    process.communicate()


def killed_behind(sentence: str, driver: "subprocess.Popen[str]") -> None:
    """kill -9 as soon as the driver has said so."""
    assert driver.stderr is not None
    said = []
    for line in driver.stderr:
        said.append(line)
        if sentence in line:
            break
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert driver.returncode == -signal.SIGKILL, "".join(said)


def test_a_run_killed_and_its_disk_wiped_ends_elsewhere_as_if_undisturbed(
    s3: str, little: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, name = f"{s3}/runs", "killed-on-s3"
    config = yaml.safe_load((little / "little.yaml").read_text())
    config |= {"name": name, "healing": {"enabled": True, "steps": 2, "batch_tokens": 64}, "llamacpp_mix": "off"}
    for place, changes in (("here", {}), ("s3", {"storage_path": url, "workers": {"ray": "local", "count": 1}})):
        (little / f"{place}.yaml").write_text(yaml.safe_dump({**config, **changes}))
    undisturbed = call_here("run", little / "here.yaml")
    assert undisturbed.returncode == 0, undisturbed.stderr
    fsspec.filesystem("s3").put(str(little / "shared"), f"{BUCKET}/runs/", recursive=True)  # as an earlier run left it
    machine, elsewhere = Machine(tmp_path / "disk", Runs(little)), Machine(tmp_path / "other disk", Runs(little))
    killed_behind("generation 1: ", machine.start("run", little / "s3.yaml"))
    shutil.rmtree(machine.cache)
    code, said = elsewhere.call("resume", f"{url}/{name}")
    assert code == 0, said
    monkeypatch.setenv("BITGENOME_CACHE", str(machine.cache))  # a third disk, as this one was wiped
    exported = call_here("export", f"{url}/{name}")
    assert exported.returncode == 0, exported.stderr
    mirror = Runs(next(machine.cache.glob(f"*/{name}")).parent)
    assert mirror.evaluations(name) == Runs(little).evaluations(name)
    (gguf,) = mirror.storage.glob(f"{name}/*bpw.gguf")
    assert gguf.read_bytes() == (little / name / gguf.name).read_bytes()
    assert open_folder(f"{url}/{name}").read(gguf.name) == gguf.read_bytes()


def test_status_reads_runs_on_s3_and_who_drives_them(
    s3: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3}/watched"
    with driven(runs, url, tmp_path / "disk") as run:
        found = json.loads(said(capsys, monkeypatch, "--storage", url, "--json"))
        assert (found["path"], found["state"], found["evaluations"]) == (run.location, "running", 3)
        leases = open_folder(f"{run.location}/{layout.LEASE}")
        (name,) = leases.sizes()
        mine = leases.read(name) or b""
        leases.write(name, json.dumps(json.loads(mine) | {"machine": "another"}).encode())
        assert RunReader(run.location).read().state == "running", "its last beat is young"
        leases.write(name, mine)
    assert RunReader(run.location).read().state == "finished"


Refused = Callable[[str], str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, runs: Runs, tmp_path: Path) -> Refused:
    """What the command line says to a run on that storage; it must be one sentence with exit code 2."""
    monkeypatch.setenv("BITGENOME_CACHE", str(tmp_path / "disk"))

    def call(location: str) -> str:
        config = runs.write("refused", storage_path=location, workers={"ray": "off"})
        return refusal(capsys, monkeypatch, "run", config)

    return call


def test_a_second_driver_is_refused_by_the_lease_on_s3_and_touches_nothing(s3: str, refused: Refused) -> None:
    with Lease(f"{s3}/leased/refused", "the run"):
        assert f"found process {os.getpid()} on" in refused(f"{s3}/leased")
    assert open_folder(f"{s3}/leased").sizes() == {}


def test_of_threads_that_race_for_a_lease_on_s3_one_gets_it(s3: str) -> None:
    folder = open_folder(f"{s3}/race")
    wins: list[bool] = []
    threads = [threading.Thread(target=lambda: wins.append(folder.create("claim", os.urandom(8)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == [False] * 5 + [True]
    with Lease(f"{s3}/held", "the bank"), pytest.raises(LeaseHeldError, match="the bank"):
        Lease(f"{s3}/held", "the bank").__enter__()


@pytest.mark.parametrize(
    ("location", "sentence"),
    [
        ("s3://no-such-bucket/runs", "no such bucket"),
        ("s3://key:secret@genomes/runs", "without a password"),
        ("s4://genomes/runs", "Protocol not known: s4"),
        ("gs://genomes/runs", "install gcsfs"),
        ("/proc/nowhere", "No such file or directory"),
    ],
)
def test_storage_that_cannot_be_used_is_one_sentence(location: str, sentence: str, s3: str, refused: Refused) -> None:
    said = refused(location)
    assert sentence in said and "secret" not in said


def test_wrong_credentials_are_one_sentence_and_leave_storage_alone(s3: str, refused: Refused) -> None:
    with only_known_keys():
        assert "AWS Access Key Id you provided does not exist" in refused(f"{s3}/denied")
    assert open_folder(f"{s3}/denied").sizes() == {}


@contextmanager
def only_known_keys() -> Iterator[None]:
    """The server checks credentials as AWS does; it knows none."""
    set_free_requests(b"0")
    try:
        yield
    finally:
        set_free_requests(b"inf")


def set_free_requests(count: bytes) -> None:
    """How many the server answers before it asks who is asking."""
    url = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
    urllib.request.urlopen(urllib.request.Request(url, count, {"Content-Type": "text/plain"})).close()
