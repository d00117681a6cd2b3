"""kill -9 at a random moment, a lost worker, Ctrl-C: the same run in the end."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.bitgenome.conftest import Finished, Runs, call_here
from tests.conftest import REPOSITORY


def default_interrupts() -> None:
    """A shell's job behind & ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(runs: Runs, *arguments: str | Path) -> subprocess.Popen[str]:
    environment = dict(os.environ)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        runs.command(*arguments),
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=environment,
        cwd=REPOSITORY,
        preexec_fn=default_interrupts,  # noqa: PLW1509 - the tests start no threads
    )


def wait_for_lines(path: Path, lines: int, driver: "subprocess.Popen[str]") -> None:
    """Until the file has that many lines or the driver ends."""
    while driver.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < lines):
        time.sleep(0.02)


def stop_in_search(runs: Runs, config: Path, stop: signal.Signals) -> None:
    """Interrupt a run once it has evaluated something, and see that it says how to continue."""
    driver = start(runs, "run", config)
    wait_for_lines(runs.storage / config.stem / "evaluations.jsonl", 2, driver)
    driver.send_signal(stop)
    _, log = driver.communicate(timeout=60)
    assert driver.returncode == 130, log
    assert f"bitgenome resume {runs.storage / config.stem}" in log
    assert "Traceback" not in log


def test_a_run_interrupted_and_then_killed_ends_as_if_undisturbed(runs: Runs, finished: Finished) -> None:
    rng = random.Random(20261121)
    config = runs.write("killed", workers={"ray": "off"}, healing={"enabled": "off"})
    stop_in_search(runs, config, signal.SIGINT)
    log = runs.storage / "killed" / "evaluations.jsonl"
    driver = start(runs, "resume", runs.storage / "killed")
    wait_for_lines(log, log.read_bytes().count(b"\n") + rng.randrange(1, 6), driver)
    time.sleep(rng.random() / 4)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    resumed = call_here("resume", runs.storage / "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert runs.evaluations("killed") == runs.evaluations("base")
    assert runs.best("killed")["winner"]["genome"] == runs.best("base")["winner"]["genome"]
    killed, base = ((runs.storage / name / "generations.jsonl").read_bytes() for name in ("killed", "base"))
    assert killed == base


@pytest.mark.long  # in seconds, and in one process: tests/search/loop/test_loop.py
def test_a_ladder_of_new_text_killed_on_two_workers_ends_as_undisturbed_in_one_process(runs: Runs) -> None:
    changes = {"search": {"ladder": [0, 256], "refresh": 1}, "healing": {"enabled": "off"}}
    calm = runs.call("run", runs.write("calm-ladder", **changes, workers={"ray": "off"}))
    assert calm.returncode == 0, calm.stderr
    log = runs.storage / "killed-ladder" / "evaluations.jsonl"
    driver = start(runs, "run", runs.write("killed-ladder", **changes))
    wait_for_lines(log, 20, driver)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    resumed = runs.call("resume", runs.storage / "killed-ladder")
    assert resumed.returncode == 0, resumed.stderr
    assert len({evaluation["draw"] for evaluation in runs.evaluations("calm-ladder")}) == 4  # three texts, and none
    assert runs.evaluations("killed-ladder") == runs.evaluations("calm-ladder")
    assert runs.best("killed-ladder")["validation"] == runs.best("calm-ladder")["validation"]


@pytest.mark.long  # a round of chaos (test_chaos.py) kills a worker too
def test_a_worker_killed_in_the_middle_changes_nothing(runs: Runs, finished: Finished) -> None:
    patient = {"straggler_factor": 1000.0}  # or another worker may have the victim's task already
    driver = start(runs, "run", runs.write("bereaved", healing={"enabled": "off"}, workers=patient))
    wait_for_lines(runs.storage / "bereaved" / "evaluations.jsonl", 3, driver)
    victims: list[psutil.Process] = []
    while not victims:
        processes = psutil.Process(driver.pid).children(recursive=True)
        victims = [p for p in processes if " ".join(p.cmdline()).startswith("ray::eval")]
    victims[0].kill()
    _, log = driver.communicate()
    assert driver.returncode == 0, log
    assert "lost worker" in log
    assert runs.evaluations("bereaved") == runs.evaluations("base")


@pytest.mark.long  # stopped jobs get it too (tests/bitgenome/cli/test_jobs.py)
def test_a_terminated_run_says_how_to_continue(runs: Runs, finished: Finished) -> None:
    stop_in_search(runs, runs.write("terminated", workers={"ray": "off"}), signal.SIGTERM)
