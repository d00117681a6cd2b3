"""Tasks for the pools' contract tests."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitgenome.common.steps import steps


@dataclass(frozen=True)
class Sleep:
    """Sleep, then return the number; later tasks may finish first."""

    number: int
    seconds: float

    @property
    def label(self) -> str:
        return f"sleep[{self.number}]"

    def run(self, state: dict[Any, Any]) -> int:
        time.sleep(self.seconds)
        return self.number


@dataclass(frozen=True)
class Blocks:
    """Go through three blocks, a pause before each."""

    seconds: float
    label: str = "blocks"

    def run(self, state: dict[Any, Any]) -> int:
        for _ in steps(range(3), 3, "block"):
            time.sleep(self.seconds)
        return 3


@dataclass(frozen=True)
class SleepOnce:
    """Take ``seconds`` the first time, and none from then on; return how often it was started."""

    marker: Path
    seconds: float
    label: str = "sleep-once"

    def run(self, state: dict[Any, Any]) -> int:
        with self.marker.open("a") as stream:
            stream.write(".")
        times = len(self.marker.read_text())
        time.sleep(self.seconds if times == 1 else 0.0)
        return times


@dataclass(frozen=True)
class Fail:
    label: str

    def run(self, state: dict[Any, Any]) -> None:
        raise FloatingPointError("logits are not finite: genome [1, 2]")


@dataclass(frozen=True)
class CountCalls:
    """How many tasks of this kind its worker has run before."""

    label: str = "count"

    def run(self, state: dict[Any, Any]) -> int:
        state["calls"] = state.get("calls", 0) + 1
        return int(state["calls"])


@dataclass(frozen=True)
class Threads:
    label: str = "threads"

    def run(self, state: dict[Any, Any]) -> int:
        return torch.get_num_threads()


@dataclass(frozen=True)
class DieOnce:
    """Kill the own process, unless that has happened before; return the number of processes that ran the task."""

    marker: Path
    label: str = "die-once"

    def run(self, state: dict[Any, Any]) -> int:
        with self.marker.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        pids = self.marker.read_text().split()
        if len(pids) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return len(set(pids))


@dataclass(frozen=True)
class DieAlways:
    label: str = "die-always"

    def run(self, state: dict[Any, Any]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
