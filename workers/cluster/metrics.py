"""Metrics of a run for Prometheus, reported through Ray; only this module uses ray.util.metrics.

Ray prefixes every name with ``ray_`` and appends ``_total`` to counters. A record costs about 2 microseconds here;
Ray's own threads pass it on every RAY_metrics_report_interval_ms (10 s by default).
"""

import sys
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

TAGS = ("run", "model", "strategy")
GAUGES = {
    "bitgenome_best_loss": "Loss of the best genome on the search's present text",
    "bitgenome_best_kl": "KL of that genome, nats per token",
    "bitgenome_generation": "Generations done",
    "bitgenome_workers": "Workers alive",
    "bitgenome_queue_depth": "Tasks that no worker has yet",
    "bitgenome_running_tasks": "Tasks on workers",
    "bitgenome_device_memory_bytes": "Largest memory of any worker: of its device, or of its process where it has none",
}
COUNTERS = {
    "bitgenome_evaluations": "Genomes evaluated by workers",
    "bitgenome_tokens_scored": "Tokens of text that those genomes read",
    "bitgenome_cache_hits": "Genomes answered from the archive instead of being evaluated",
    "bitgenome_retries": "Tasks of lost workers that ran again",
    "bitgenome_speculations": "Stragglers that were sent out twice",
}
SECONDS = "bitgenome_evaluation_seconds"
BOUNDARIES_S = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
NOTHING = sys.float_info.min  # Ray's counters refuse 0, and to Prometheus a missing series is not zero


class RunMetrics:
    """Reports all metrics of one run under ``tags``, a value for each of TAGS; needs a connected Ray."""

    def __init__(self, tags: Mapping[str, str]):
        self._gauges = {name: Gauge(name, text, TAGS) for name, text in GAUGES.items()}
        self._counters = {name: Counter(name, text, TAGS) for name, text in COUNTERS.items()}
        self._seconds = Histogram(SECONDS, "Seconds of a worker per genome", BOUNDARIES_S, TAGS)
        for metric in (*self._gauges.values(), *self._counters.values(), self._seconds):
            metric.set_default_tags(dict(tags))
        for counter in self._counters.values():
            counter.inc(NOTHING)

    def set(self, name: str, value: float) -> None:
        """Set the gauge ``name`` to its present ``value``."""
        self._gauges[name].set(value)

    def add(self, name: str, amount: float) -> None:
        """Increase the counter ``name`` by ``amount``, 0 or more."""
        if amount:
            self._counters[name].inc(amount)

    def observe(self, seconds: float) -> None:
        """Record one evaluated genome, which took ``seconds`` of a worker."""
        self._seconds.observe(seconds)
