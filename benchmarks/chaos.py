"""Workers, nodes and drivers killed at random moments of live runs: do they end as the undisturbed one, and how late?

A Ray cluster of several nodes on this machine serves one undisturbed run and ``--rounds`` disturbed ones, which share
its bank. In each, at moments drawn from the undisturbed run's duration, a worker process is killed, a node is taken
away (another joins soon after), and the driver is killed and started again. Fails if an evaluation is lost or counted
twice, or a file differs by one byte.

    OMP_NUM_THREADS=1 python -m benchmarks.chaos [--rounds 20] [--kills worker node driver] [--seed 0]
"""

import argparse
import hashlib
import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console
from rich.table import Table

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # before ray is imported, and for all children
os.environ["RAY_health_check_period_ms"] = "500"  # noqa: SIM112 - Ray reads it so
os.environ["RAY_health_check_failure_threshold"] = "4"  # noqa: SIM112

from ray.cluster_utils import Cluster

REPOSITORY = Path(__file__).parents[1]
MODEL = REPOSITORY / "models" / "stdlib-6m"
NODES = 2  # beside the head, which computes nothing
KILLS = ("worker", "node", "driver")
SERVICES = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")  # a node dies with its agents
JOIN_S = 1.0  # after a node went, until another joins
SETTINGS: dict[str, Any] = {
    "model": str(MODEL),
    "budget": {"bits_per_weight": 3.5},
    "levels": ["W2", "W3", "W4", "W6"],
    "text": {
        "splits": str(MODEL / "splits.json"),
        "window": 256,
        "tokens": {"calibration": 8192, "sensitivity": 512, "search": 1024, "validation": 1024, "test": 4096},
    },
    "search": {"population": 12, "generations": 5, "validation_candidates": 2},
    "healing": {"enabled": "off"},
}
QUICK: dict[str, Any] = SETTINGS | {  # less of everything, for tests
    "levels": ["W2", "W4"],
    "text": {
        "splits": str(MODEL / "splits.json"),
        "window": 64,
        "tokens": {"calibration": 1024, "sensitivity": 128, "search": 256, "validation": 128, "test": 256},
    },
}


class ChaosError(AssertionError):
    """A disturbed run did not end as the undisturbed one."""


@dataclass
class Nodes:
    """A cluster whose nodes come and go."""

    cluster: Cluster = field(
        default_factory=lambda: Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
    )
    nodes: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        for _ in range(NODES):
            self.join()

    def join(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1))

    def lose(self, rng: random.Random) -> None:
        """A node and all that runs on it are gone at once; another joins a moment later."""
        self.cluster.remove_node(self.nodes.pop(rng.randrange(len(self.nodes))), allow_graceful=False)
        time.sleep(JOIN_S)
        self.join()

    def workers(self) -> list[psutil.Process]:
        """Processes of actors at work on any node."""
        return [process for process in psutil.Process().children(recursive=True) if is_worker(process)]


def is_worker(process: psutil.Process) -> bool:
    try:
        line = " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
    return line.startswith("ray::") and not line.startswith(SERVICES)


@dataclass(frozen=True)
class Storage:
    """Runs of one configuration, told apart by their names."""

    path: Path
    address: str
    settings: dict[str, Any]

    def start(self, name: str, *overrides: str) -> "subprocess.Popen[str]":
        config = self.settings | {"name": name, "storage_path": str(self.path)}
        config["workers"] = {"ray": self.address, "min": 1, "max": NODES}
        file = self.path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [sys.executable, "-m", "bitgenome.cli", "run", str(file), *overrides]
        log = (self.path / f"{name}.log").open("a", encoding="utf-8")
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY)

    def log(self, name: str) -> str:
        """What the drivers of a run wrote."""
        return (self.path / f"{name}.log").read_text(encoding="utf-8")

    def evaluations(self, name: str) -> list[dict[str, Any]]:
        """In the order they were written, without the seconds they took."""
        lines = (self.path / name / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
        return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]

    def file_digest(self, name: str) -> str:
        best = json.loads((self.path / name / "best.json").read_text(encoding="utf-8"))
        return hashlib.sha256((self.path / name / best["gguf"]).read_bytes()).hexdigest()

    def check_same(self, name: str, calm: str) -> None:
        """Raise ChaosError unless both runs hold the same evaluations, each once, and the same bytes."""
        found, expected = self.evaluations(name), self.evaluations(calm)
        keys = [json.dumps([e["genome"], e["split"], e["tokens"], e["draw"]]) for e in found]
        if len(set(keys)) < len(keys):
            raise ChaosError(f"expected each evaluation once in {name}, found {len(keys) - len(set(keys))} again")
        if found != expected:
            raise ChaosError(f"expected the {len(expected)} evaluations of {calm} in {name}, found {len(found)}")
        if self.file_digest(name) != self.file_digest(calm):
            raise ChaosError(f"expected the file of {calm} in {name}, found other bytes")


def undisturbed(storage: Storage, name: str, *overrides: str) -> float:
    """Seconds of a run that is left alone."""
    started = time.monotonic()
    if storage.start(name, *overrides).wait():
        raise ChaosError(f"expected an undisturbed run, found a failure: {storage.log(name)}")
    return time.monotonic() - started


def disturbed(
    storage: Storage, nodes: Nodes, name: str, plan: Sequence[tuple[float, str]], rng: random.Random
) -> float:
    """Seconds of a run with a kill at each planned moment that it lives to see."""
    started = time.monotonic()
    driver = storage.start(name)

    def kill_worker() -> None:
        if workers := nodes.workers():
            rng.choice(workers).kill()

    def kill_driver() -> None:
        nonlocal driver
        driver.kill()
        driver.wait()
        driver = storage.start(name)

    strike: dict[str, Callable[[], None]] = {
        "worker": kill_worker, "node": lambda: nodes.lose(rng), "driver": kill_driver,
    }  # fmt: skip
    for moment, kind in plan:
        while driver.poll() is None and time.monotonic() - started < moment:
            time.sleep(0.02)
        if driver.poll() is None:
            strike[kind]()
    if code := driver.wait():
        raise ChaosError(f"expected {name} to end well, found exit code {code}: {storage.log(name)}")
    return time.monotonic() - started


def chaos(path: Path, settings: dict[str, Any], rounds: int, kills: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """A record a round: what was killed when, and seconds beyond the undisturbed run. Raises ChaosError."""
    rng = random.Random(seed)
    nodes = Nodes()
    try:
        storage = Storage(path, nodes.cluster.address, settings)
        undisturbed(storage, "first", "--set", "workers={ray: off}")  # makes the bank
        calm = undisturbed(storage, "calm")
        records = []
        for number in range(rounds):
            plan = sorted((rng.uniform(0.1, 0.95) * calm, kind) for kind in kills)
            seconds = disturbed(storage, nodes, f"round-{number}", plan, rng)
            storage.check_same(f"round-{number}", "calm")
            records.append({"kills": plan, "calm": calm, "seconds": seconds, "lost": seconds - calm})
        return records
    finally:
        nodes.cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kills", nargs="+", choices=KILLS, default=list(KILLS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smaller run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = QUICK if arguments.quick else SETTINGS
        records = chaos(Path(folder), settings, arguments.rounds, arguments.kills, arguments.seed)
    table = Table(title=f"{len(records)} rounds, undisturbed {records[0]['calm']:.1f} s: all ended with the same bytes")
    for column in ("round", "killed at (s)", "seconds", "lost"):
        table.add_column(column, justify="left" if column.startswith("killed") else "right")
    for number, record in enumerate(records):
        killed = ", ".join(f"{kind} {moment:.1f}" for moment, kind in record["kills"])
        table.add_row(str(number), killed, f"{record['seconds']:.1f}", f"{record['lost']:.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
