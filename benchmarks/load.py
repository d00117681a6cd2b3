"""The driver under load: the real search, dispatcher, log and checkpoint over workers that only sleep.

    python -m benchmarks.load --workers 64 --seconds 5
    python -m benchmarks.load --pool ray --workers 56 --seconds 5
    python -m benchmarks.load --workers 8 --seconds 0 --population 256 --generations 391 --brood 1

``busy`` is the workers' time in first answers over all of their time: with the driver's own time between generations,
and within evaluation alone. CPU is the driver's: of its thread for threads as workers, of its process for Ray.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.sleeping import Pace, SleepGenomes
from bitgenome.run.search import divided
from search.allocation.seeds import seed_genomes
from search.loop.archive import EvaluationLog
from search.loop.checkpoint import Checkpoint
from search.loop.ladder import Ladder
from search.loop.search import Progress, run_search
from search.strategies.factory import make_strategy
from search.strategies.settings import GeneticSettings
from search.types import Evaluation, Fidelity, Genome
from tests.search.synthetic import middle_budget, random_table, transformer_space
from tests.workers.pool.thread_backend import ThreadBackend
from workers.pool.dispatcher import Dispatcher
from workers.pool.scheduling import Elasticity, Patience

CHECKPOINTS = 8  # of memory and CPU that are printed


@dataclass
class Load:
    """One search, and what was measured of it."""

    pool: Dispatcher
    pace: Pace
    layers: int
    population: int
    generations: int
    brood: int
    part: int | None  # genomes of a part; None: as the product divides them
    cpu_clock: Any
    waits: list[float] = field(default_factory=list)
    inside: float = 0.0  # seconds in evaluation
    generation: int = 0
    marks: list[tuple[int, float, int]] = field(default_factory=list)  # evaluations, driver's CPU seconds, RSS

    def run(self, folder: Path) -> dict[str, Any]:
        space = transformer_space(self.layers)
        table = random_table(space, 0)
        self._space, self._table = space, tuple(tuple(map(float, row)) for row in table.loss)
        self._sizes = tuple(tuple(map(int, row)) for row in space.sizes())
        budget = middle_budget(space)
        settings = GeneticSettings(population=self.population, generations=self.generations, brood=self.brood)
        seeds = seed_genomes(space, budget, [table])
        strategy = make_strategy("genetic", space, budget, tables=[table], seeds=seeds, settings=settings)
        list(self.pool.map([self._task((), "warm")] * (4 * self.pool.size)))  # every worker is there
        self.waits.clear()
        busy, started, cpu = self.pool.statistics.busy_seconds, time.monotonic(), self.cpu_clock()
        with closing(EvaluationLog(folder / "evaluations.jsonl")) as log:
            checkpoint = Checkpoint(folder / "checkpoint.json", "load")
            run_search(strategy, self._evaluate, log, Ladder((8192,)), checkpoint=checkpoint, on_progress=self._mark)
            count = len(log)
        wall, cpu = time.monotonic() - started, self.cpu_clock() - cpu
        busy = self.pool.statistics.busy_seconds - busy
        workers = self.pool.statistics.workers
        return {
            "workers": workers,
            "genes": len(space.genes),
            "evaluations": count,
            "wall_s": round(wall, 1),
            "driver_cpu_ms_per_evaluation": round(1e3 * cpu / count, 2),
            "busy": round(busy / (workers * wall), 3),
            "busy_in_evaluation": round(busy / (workers * self.inside), 3) if self.inside else None,
            "wait_ms_median": round(1e3 * statistics.median(self.waits), 2) if self.waits else None,
            "wait_ms_99th": round(1e3 * sorted(self.waits)[int(0.99 * len(self.waits))], 2) if self.waits else None,
            "speculations": self.pool.statistics.speculations,
            "retries": self.pool.statistics.retries,
            **self._growth(),
        }

    def _task(self, genomes: tuple[Genome, ...], label: str) -> SleepGenomes:
        fidelity = Fidelity("search", 8192)
        pace = self.pace if genomes else Pace(0.02)
        return SleepGenomes(
            self._space, self._table, self._sizes, pace, genomes, fidelity, label, self.generation
        )  # fmt: skip

    def _evaluate(self, genomes: Sequence[Genome], fidelity: Fidelity) -> Iterator[Evaluation]:
        self.generation += 1
        started = time.monotonic()
        ordered = sorted(genomes)
        if self.part is None:
            parts = divided(ordered, self.pool.size)
        else:
            parts = [tuple(ordered[i : i + self.part]) for i in range(0, len(ordered), self.part)]
        tasks = [self._task(part, f"eval[{fidelity.split} {n}/{len(parts)}]") for n, part in enumerate(parts, 1)]
        for evaluations, waited in self.pool.map(tasks):
            if waited is not None:
                self.waits.append(waited)
            yield from evaluations
        self.inside += time.monotonic() - started

    def _mark(self, progress: Progress) -> None:
        self.marks.append((progress.genomes, self.cpu_clock(), psutil.Process().memory_info().rss))

    def _growth(self) -> dict[str, Any]:
        """How memory and CPU go on through the run."""
        step = max(1, len(self.marks) // CHECKPOINTS)
        marks = self.marks[::step]
        pairs = list(pairwise(marks))
        first, last = marks[min(1, len(marks) - 1)], marks[-1]
        return {
            "cpu_ms_through_the_run": [round(1e3 * (b[1] - a[1]) / (b[0] - a[0]), 2) for a, b in pairs],
            "rss_mib_through_the_run": [round(mark[2] / 2**20) for mark in marks],
            "bytes_per_evaluation": round((last[2] - first[2]) / max(1, last[0] - first[0])),
        }


def open_workers(kind: str, workers: int, patience: Patience) -> Dispatcher:
    elasticity = Elasticity(workers, workers)
    if kind == "threads":
        return Dispatcher(ThreadBackend(), elasticity, patience)
    from workers.cluster.ray_cluster import Placement, connect  # noqa: PLC0415
    from workers.cluster.ray_pool import RayPool  # noqa: PLC0415

    connect("local")
    return RayPool(Placement(cpus=0), elasticity, patience, threads=0, run="load")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", choices=("threads", "ray"), default="threads")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="of an evaluation, in the mean")
    parser.add_argument("--variation", type=float, default=0.2)
    parser.add_argument("--stragglers", type=float, default=0.0, help="share of tasks, ten times as long")
    parser.add_argument("--straggler-factor", type=float, default=Patience.straggler_factor)
    parser.add_argument("--layers", type=int, default=28, help="seven genes each, and one")
    parser.add_argument("--population", type=int, default=512)
    parser.add_argument("--generations", type=int, default=3)
    parser.add_argument("--brood", type=int, default=16)
    parser.add_argument("--part", type=int, help="genomes of a part; default: as a search divides them")
    args = parser.parse_args()
    patience = Patience(straggler_factor=args.straggler_factor)
    pace = Pace(args.seconds, args.variation, args.stragglers)
    clock = time.process_time if args.pool == "ray" else time.thread_time
    with open_workers(args.pool, args.workers, patience) as pool, tempfile.TemporaryDirectory() as folder:
        load = Load(pool, pace, args.layers, args.population, args.generations, args.brood, args.part, clock)
        print(json.dumps(load.run(Path(folder)), indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
