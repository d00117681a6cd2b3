"""Evaluations that sleep: what the driver does beside them is real. Imports little, as it runs in many processes."""

import random
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from search.types import Evaluation, Fidelity, Genome

WINDOWS = 16  # of 512 tokens


@dataclass(frozen=True)
class Pace:
    """Seconds of an evaluation: normal around ``mean`` by ``variation`` of it; some straggle, wherever they run."""

    mean: float
    variation: float = 0.2
    stragglers: float = 0.0  # share of tasks
    times: float = 10.0  # as long, for a straggler

    def seconds(self, genomes: Sequence[Genome], luck: random.Random) -> float:
        """What a genome costs is its own; whether its worker straggles is ``luck``."""
        own = sum(max(0.1, random.Random(repr(genome)).gauss(1.0, self.variation)) for genome in genomes)
        return self.mean * own * (self.times if luck.random() < self.stragglers else 1.0)


@dataclass(frozen=True)
class SleepGenomes:
    """Pool task in the place of EvaluateGenomes; ``ballast`` is as large as the setup that travels with that."""

    ballast: Any
    table: tuple[tuple[float, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    pace: Pace
    genomes: tuple[Genome, ...]
    fidelity: Fidelity
    label: str
    generation: int = 0

    @property
    def work(self) -> int:
        return max(1, len(self.genomes))

    def run(self, state: dict[Any, Any]) -> tuple[list[Evaluation], float | None]:
        """Evaluations, and how long the worker waited for this task, if it ran one of the same generation before."""
        waited = time.monotonic() - state["ended"] if state.get("generation") == self.generation else None
        luck = state.setdefault("luck", random.Random())
        if self.pace.mean:
            time.sleep(self.pace.seconds(self.genomes, luck))
        found = [self._evaluation(genome) for genome in self.genomes]
        state |= {"generation": self.generation, "ended": time.monotonic()}
        return found, waited

    def _evaluation(self, genome: Genome) -> Evaluation:
        loss = _total(self.table, genome) * (1 + 0.01 * (zlib.crc32(repr(genome).encode()) / 2**32 - 0.5))
        windows = tuple(loss * (0.5 + (w + 0.5) / WINDOWS) for w in range(WINDOWS))
        size = int(_total(self.sizes, genome))
        return Evaluation(
            genome, loss, loss, loss, 1.0, loss, size, self.fidelity.split, self.fidelity.tokens, self.pace.mean,
            self.fidelity.draw, windows,
        )  # fmt: skip


def _total(values: Sequence[Sequence[float]], genome: Genome) -> float:
    return sum(row[choice] for row, choice in zip(values, genome, strict=True))
