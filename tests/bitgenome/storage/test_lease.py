"""One owner at a time, whoever dies, sleeps or has a wrong clock."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from bitgenome.common import layout
from bitgenome.storage.lease import Claim, Lease, LeaseHeldError, LeaseLostError
from tests.conftest import REPOSITORY

TTL = 1.2  # seconds, of owners that tests wait for

BUILD = """
import sys, time
from pathlib import Path
from bitgenome.storage.shared import build_once
from bitgenome.config.storage import StoredSection
folder, built, log = map(Path, sys.argv[1:4])
def build():
    with log.open("a") as stream:
        stream.write("built\\n")
    time.sleep(0.3)
    built.touch()
build_once(StoredSection(), folder, "the bank", built.exists, build)
"""
WRITE = """
import signal, sys, time
from pathlib import Path
from bitgenome.storage.lease import Lease
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
log = Path(sys.argv[2])
with Lease(Path(sys.argv[1]), "the run", ttl=float(sys.argv[3])) as lease:
    while True:
        lease.check()
        with log.open("a") as stream:
            stream.write("line\\n")
        time.sleep(0.01)
"""
HOLD_ELSEWHERE = """
import sys, time
import bitgenome.storage.lease as leases
leases.this_machine = lambda: "another machine"
offset = float(sys.argv[2])
leases.since_start = lambda: time.monotonic() + offset
with leases.Lease(sys.argv[1], "the run", ttl=float(sys.argv[3])):
    print("mine", flush=True)
    time.sleep(60)
"""


class Processes:
    """Python processes that end with the test."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[str]] = []

    def start(self, script: str, *arguments: object) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", script, *map(str, arguments)]
        pipe = subprocess.PIPE
        self.started.append(subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=pipe, stderr=pipe))
        return self.started[-1]


@pytest.fixture
def processes() -> Iterator[Processes]:
    found = Processes()
    yield found
    for process in found.started:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def claim_of(folder: Path) -> Claim:
    return Claim(**json.loads(max((folder / layout.LEASE).glob("*.json")).read_bytes()))


def test_of_processes_that_race_exactly_one_builds(tmp_path: Path, processes: Processes) -> None:
    racers = [processes.start(BUILD, tmp_path / "bank", tmp_path / "built", tmp_path / "log") for _ in range(2)]
    for racer in racers:
        _, said = racer.communicate(timeout=60)
        assert racer.returncode == 0, said
    assert (tmp_path / "log").read_text() == "built\n"


def test_the_lease_of_a_killed_process_is_taken_over_at_once(tmp_path: Path, processes: Processes) -> None:
    log = tmp_path / "log"
    owner = processes.start(WRITE, tmp_path, log, 60)
    wait_for(log.exists)
    with pytest.raises(LeaseHeldError, match=f"found process {owner.pid} on .* at work on it"), Lease(tmp_path, "it"):
        pass
    owner.kill()
    owner.wait()
    started = time.monotonic()
    with Lease(tmp_path, "it") as lease:
        lease.check()
    assert time.monotonic() - started < 1


def test_an_owner_that_slept_too_long_stops_before_it_writes(tmp_path: Path, processes: Processes) -> None:
    log = tmp_path / "log"
    owner = processes.start(WRITE, tmp_path, log, TTL)
    wait_for(log.exists)
    owner.send_signal(signal.SIGSTOP)
    with Lease(tmp_path, "the run", wait=True, ttl=TTL):
        time.sleep(0.1)
        written = log.read_bytes()
        owner.send_signal(signal.SIGCONT)
        _, said = owner.communicate(timeout=20)
    assert log.read_bytes() == written
    assert "LeaseLostError: expected the run to stay this process's own, found process" in said
    assert f"found process {os.getpid()} on" in said


@pytest.mark.parametrize("offset", [-3600.0, 3600.0])
def test_clocks_an_hour_apart_change_nothing(offset: float, tmp_path: Path, processes: Processes) -> None:
    owner = processes.start(HOLD_ELSEWHERE, tmp_path, offset, TTL)
    assert owner.stdout is not None and owner.stdout.readline() == "mine\n"
    with pytest.raises(LeaseHeldError, match=f"process {owner.pid}"), Lease(tmp_path, "the run", ttl=TTL):
        pass
    owner.kill()
    owner.wait()
    started = time.monotonic()
    with Lease(tmp_path, "the run", ttl=TTL):  # its process cannot be seen from here, so only silence tells
        assert TTL / 2 < time.monotonic() - started < 10 * TTL


def test_a_process_number_used_again_does_not_hold_a_lease(tmp_path: Path) -> None:
    with Lease(tmp_path, "the run"):
        held = claim_of(tmp_path)
    stale = replace(held, started=held.started - 100.0, owner="of before", released=False)
    (tmp_path / layout.LEASE / "000000009.json").write_bytes(stale.to_bytes())
    with Lease(tmp_path, "the run"):
        assert claim_of(tmp_path).owner != "of before"


def test_a_clock_that_is_set_does_not_end_the_lease_of_a_living_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease(tmp_path, "the run"):
        create_time = psutil.Process().create_time()  # counts from the start of the machine, by its clock
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: create_time + 1)
        with pytest.raises(LeaseHeldError, match="expected the run to be nobody else's"):
            Lease(tmp_path, "the run").__enter__()


def test_a_lease_whose_folder_is_removed_is_lost(tmp_path: Path) -> None:
    with pytest.raises(LeaseLostError, match="its lease removed"), Lease(tmp_path, "the run", ttl=0.2) as lease:
        for file in (tmp_path / layout.LEASE).iterdir():
            file.unlink()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            lease.check()


def test_what_was_released_is_free_at_once_and_leaves_one_small_file(tmp_path: Path) -> None:
    for _ in range(3):
        with Lease(tmp_path, "the run"):
            pass
    (file,) = (tmp_path / layout.LEASE).iterdir()
    assert claim_of(tmp_path).released and file.name == "000000003.json"
