"""Decides once, for a whole run, in which type its search multiplies, and records on what kind of device."""

import logging

from bitgenome.plan.plan import Plan
from bitgenome.storage.run_directory import RunDirectory
from evaluators.engine.compute import DescribeDevice
from workers.pool.base import Pool

log = logging.getLogger(__name__)

RECORDED = "compute"  # key of run.json


def choose_compute(plan: Plan, run: RunDirectory, pool: Pool) -> dict[str, str]:
    """Return the ``type`` of the search's products and the kind of ``device``, as recorded in run.json.

    The first time a worker is asked: ``evaluation.compute: auto`` is what suits its device. A run that is resumed on
    other machines goes on as it was begun.
    """

    def ask() -> dict[str, str]:
        configured = plan.config.evaluation.compute
        (device,) = pool.map([DescribeDevice()])
        chosen = device.compute if configured == "auto" else configured
        log.info("the search multiplies in %s, on workers with %s", chosen, device.name)
        return {"type": chosen, "device": device.kind}

    return run.record.once(RECORDED, ask)


def recorded_device(run: RunDirectory) -> str:
    """Return the kind of device that ``choose_compute`` recorded, "cpu" where it has not been called."""
    return str(run.record.get(RECORDED, {}).get("device", "cpu"))
