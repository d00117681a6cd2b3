"""What a run publishes of itself: all that was evaluated, once, and nothing without Ray."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from bitgenome.observe.monitoring import Monitor
from search.loop.search import Progress
from search.types import Evaluation, Fidelity, Genome
from workers.pool.base import PoolStatistics

BEST = Evaluation((0,), 0.5, 0.4, 1.0, 1.0, 1.0, 2_000, "search", 64, seconds=0.25)
FIDELITY = Fidelity("search", 64)


class Ledger:
    """Gauges and totals, as Prometheus would hold them."""

    def __init__(self) -> None:
        self.gauges: dict[str, float] = {}
        self.totals: dict[str, float] = {}
        self.seconds: list[float] = []

    def set(self, name: str, value: float) -> None:
        self.gauges[name] = value

    def add(self, name: str, amount: float) -> None:
        assert amount >= 0
        self.totals[name] = self.totals.get(name, 0) + amount

    def observe(self, seconds: float) -> None:
        self.seconds.append(seconds)


def evaluate(genomes: Sequence[Genome], fidelity: Fidelity) -> Iterator[Evaluation]:
    return (replace(BEST, genome=genome) for genome in genomes)


def test_every_evaluation_is_published_once_whenever_that_happens() -> None:
    ledger, statistics = Ledger(), PoolStatistics()
    monitor = Monitor(statistics, ledger)
    for number, _ in enumerate(monitor.watch(evaluate)([(n,) for n in range(10)], FIDELITY)):
        if number % 3 == 0:
            monitor.publish()
    monitor.publish()
    monitor.publish()
    assert ledger.totals["bitgenome_evaluations"] == 10
    assert ledger.totals["bitgenome_tokens_scored"] == 640
    assert ledger.seconds == [0.25] * 10


def test_counters_rise_by_what_is_new_and_gauges_show_the_last() -> None:
    ledger, statistics = Ledger(), PoolStatistics(workers=4)
    monitor = Monitor(statistics, ledger)
    for generation, answered, retries in ((1, 3, 1), (2, 5, 1), (2, 5, 2)):
        monitor.progressed(Progress(generation, 20, 40, replace(BEST, loss=1 / generation), {}, answered))
        statistics.retries, statistics.queued, statistics.peak_memory_bytes = retries, generation, 100 * generation
        monitor.publish()
    assert (ledger.totals["bitgenome_cache_hits"], ledger.totals["bitgenome_retries"]) == (5, 2)
    shown = {name.removeprefix("bitgenome_"): value for name, value in ledger.gauges.items()}
    assert shown == {
        "best_loss": 0.5, "best_kl": 0.4, "generation": 2, "workers": 4, "queue_depth": 2, "running_tasks": 0,
        "device_memory_bytes": 200,
    }  # fmt: skip


def test_a_loss_that_is_not_finite_is_not_shown() -> None:
    ledger = Ledger()
    monitor = Monitor(PoolStatistics(), ledger)
    monitor.progressed(Progress(1, 20, 40, replace(BEST, loss=float("inf"), kl=float("nan")), {}))
    monitor.publish()
    assert ledger.gauges["bitgenome_generation"] == 1
    assert not {"bitgenome_best_loss", "bitgenome_best_kl"} & ledger.gauges.keys()


def test_without_ray_evaluations_pass_untouched() -> None:
    monitor = Monitor(PoolStatistics(), None)
    assert monitor.watch(evaluate) is evaluate
    monitor.publish()
