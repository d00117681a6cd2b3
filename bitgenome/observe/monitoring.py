"""Publishes metrics of a run while it works: the driver reports, and a thread publishes about every second."""

import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from bitgenome.config.run import RunConfig
from search.loop.search import Evaluate, Progress
from search.types import Evaluation, Fidelity, Genome
from workers.pool.base import Pool, PoolStatistics

PUBLISH_EVERY_S = 1.0


class Metrics(Protocol):
    """Receives metrics; implemented by workers.cluster.metrics.RunMetrics."""

    def set(self, name: str, value: float) -> None:
        """Set a gauge to its current value."""

    def add(self, name: str, amount: float) -> None:
        """Add ``amount`` to a counter."""

    def observe(self, seconds: float) -> None:
        """Record one evaluated genome and its seconds."""


class Monitor:
    """Collects what the driver reports, and publishes it and the pool's statistics when ``publish`` is called.

    A report costs the driver one append; ``publish`` may be called from another thread. Without ``metrics`` nothing is
    published.
    """

    def __init__(self, statistics: PoolStatistics, metrics: Metrics | None):
        self._statistics = statistics
        self._metrics = metrics
        self._finished: deque[Evaluation] = deque()
        self._progress: Progress | None = None
        self._published: dict[str, float] = {}  # totals of counters, as last published

    def watch(self, evaluate: Evaluate) -> Evaluate:
        """Return ``evaluate``, with every finished evaluation reported to this monitor."""
        if self._metrics is None:
            return evaluate

        def watched(genomes: Sequence[Genome], fidelity: Fidelity) -> Iterator[Evaluation]:
            for evaluation in evaluate(genomes, fidelity):
                self._finished.append(evaluation)
                yield evaluation

        return watched

    def progressed(self, progress: Progress) -> None:
        """Report the progress after a generation."""
        self._progress = progress

    def publish(self) -> None:
        """Publish everything that was reported since the last call."""
        if self._metrics is None:
            return
        while self._finished:
            evaluation = self._finished.popleft()
            self._metrics.observe(evaluation.seconds)
            self._metrics.add("bitgenome_evaluations", 1)
            self._metrics.add("bitgenome_tokens_scored", evaluation.tokens)
        if progress := self._progress:
            self._metrics.set("bitgenome_generation", progress.generation)
            for name, value in (("best_loss", progress.best.loss), ("best_kl", progress.best.kl)):
                if math.isfinite(value):
                    self._metrics.set(f"bitgenome_{name}", value)
            self._add_total("bitgenome_cache_hits", progress.answered)
        pool = self._statistics
        self._metrics.set("bitgenome_workers", pool.workers)
        self._metrics.set("bitgenome_queue_depth", pool.queued)
        self._metrics.set("bitgenome_running_tasks", pool.running)
        self._metrics.set("bitgenome_device_memory_bytes", pool.peak_memory_bytes)
        self._add_total("bitgenome_retries", pool.retries)
        self._add_total("bitgenome_speculations", pool.speculations)

    def _add_total(self, name: str, total: float) -> None:
        """Raise a counter to ``total``."""
        assert self._metrics is not None
        self._metrics.add(name, total - self._published.get(name, 0))
        self._published[name] = total


@contextmanager
def monitor_run(config: RunConfig, pool: Pool) -> Iterator[Monitor]:
    """Yield a monitor that publishes every second while the context lasts; without Ray nothing is published."""
    if config.workers.ray == "off":
        yield Monitor(pool.statistics, None)
        return
    from workers.cluster.metrics import RunMetrics  # noqa: PLC0415 - a run without Ray does not import it

    tags = {"run": config.name, "model": Path(config.model).name, "strategy": config.search.strategy}
    monitor, done = Monitor(pool.statistics, RunMetrics(tags)), threading.Event()

    def keep_publishing() -> None:
        while not done.wait(PUBLISH_EVERY_S):
            monitor.publish()

    thread = threading.Thread(target=keep_publishing, name="monitoring", daemon=True)
    thread.start()
    try:
        yield monitor
    finally:
        done.set()
        thread.join()
        monitor.publish()
