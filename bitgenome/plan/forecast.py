"""Forecasts a run: time, memory and disk of every stage, from rates that are measured on a worker."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bitgenome.common.cpus import usable_cpus
from bitgenome.common.devices import best_device
from bitgenome.plan.disk import disk_bytes
from bitgenome.plan.memory import stage_memory, worker_limit, worker_sweep_memory
from bitgenome.plan.plan import Plan, compensation_settings
from bitgenome.plan.seconds import Work, roundings
from bitgenome.plan.text import written_counts
from evaluators.model.sizes import StageMemory
from evaluators.probes.measure import MeasureRates
from evaluators.probes.rates import Rates
from workers.pool.base import SerialPool

ALONE = ("calibration", "export", "proof")  # stages that run on one worker, or in the driver, while others wait


@dataclass(frozen=True)
class StageForecast:
    """Holds what one stage is expected to take: seconds, bytes that stay on disk, and the peak of memory if known."""

    stage: str
    seconds: float
    disk: int
    memory: StageMemory | None = None  # of one process, beside what that takes itself


def rates_task(plan: Plan) -> MeasureRates:
    """Return the pool task that measures the rates for ``plan`` on a worker."""
    config = plan.config
    evaluation = config.evaluation
    return MeasureRates(
        plan.folder.path.resolve(),
        config.text.window,
        roundings(plan),
        compensation_settings(plan),
        evaluation.compute,
        "q8" if evaluation.activations == "q8" else "float",
        bool(written_counts(config.text)),
    )


def rates_here(plan: Plan) -> Rates:
    """Measure the rates for ``plan`` in this process, with the threads that a worker of it has."""
    (rates,) = SerialPool(plan.config.workers.cpus_per_worker).map([rates_task(plan)])
    return rates


def workers_here(plan: Plan) -> int:
    """Return the number of workers that are configured, or else of those that this machine's cores give."""
    workers = plan.config.workers
    if workers.ray == "off":
        return 1
    return workers.count or max(1, usable_cpus() // workers.cpus_per_worker)


def forecast(
    plan: Plan, rates: Rates, workers: int, device: torch.device | None = None, limit: int | None = None
) -> list[StageForecast]:
    """Return the stages of a run in order, on ``workers`` workers with these rates.

    ``limit`` is what a worker may use on ``device``; the defaults are this machine's. Raises UserError if the model
    cannot be evaluated in a worker's memory.
    """
    work = Work(plan, rates, workers, worker_sweep_memory(plan).resident)
    disk, memory = disk_bytes(plan), stage_memory(plan, device, limit)
    return [StageForecast(stage, seconds, disk.get(stage, 0), memory.get(stage)) for stage, seconds in work.stages()]


def too_large(plan: Plan, stages: Sequence[StageForecast], device: torch.device | None = None) -> list[str]:
    """Return a phrase for every stage whose peak is above what may be used on ``device`` of a machine like this one.

    Stages that run alone may use the shares of all workers of a host.
    """
    device = device or best_device()
    limit, found = worker_limit(plan.config, device), []
    for stage in stages:
        if stage.memory is None:
            continue
        needed = stage.memory.host_bytes if device.type == "cpu" else stage.memory.device_bytes
        shares = workers_here(plan) if device.type == "cpu" and stage.stage in ALONE else 1
        if needed > limit * shares:
            found.append(f"{stage.stage} {needed / 2**30:.1f} GiB of {limit * shares / 2**30:.1f}")
    return found


def compared(expected: Mapping[str, float], taken: Mapping[str, float]) -> str:
    """Return a line on the seconds that were expected and taken, by stage and in total; of all stages if none was."""
    if not expected:
        return f"seconds taken: {', '.join(f'{stage} {seconds:.0f}' for stage, seconds in taken.items())}"
    stages = [f"{stage} {seconds:.0f} ({expected[stage]:.0f})" for stage, seconds in taken.items() if stage in expected]
    known = sum(seconds for stage, seconds in taken.items() if stage in expected)
    return f"seconds taken (expected): {', '.join(stages)}; together {known:.0f} ({sum(expected.values()):.0f})"


def duration(seconds: float) -> str:
    """Return seconds as text in the unit that suits them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
