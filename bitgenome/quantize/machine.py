"""Divides this machine among workers for a model: as many as there is memory for."""

from dataclasses import replace
from typing import Any

from bitgenome.common.cpus import usable_cpus
from bitgenome.common.devices import best_device
from bitgenome.common.errors import UserError
from bitgenome.plan.memory import check_memory
from bitgenome.plan.plan import Plan


def cpus_for_memory(plan: Plan) -> int:
    """Return the cores of a worker with which the model fits its share of this machine's memory, the fewest.

    On accelerators memory is the device's, and cores decide nothing. Raises UserError if it does not fit with all.
    """
    first = plan.config.workers.cpus_per_worker
    if best_device().type != "cpu":
        check_memory(plan)
        return first
    cpus, most = first, max(first, usable_cpus())
    while True:
        try:
            check_memory(with_workers(plan, cpus_per_worker=cpus))
        except UserError:
            if cpus == most:
                raise
            cpus = min(most, 2 * cpus)
        else:
            return cpus


def with_workers(plan: Plan, **settings: Any) -> Plan:
    """Return ``plan`` with other settings of its workers."""
    workers = plan.config.workers.model_copy(update=settings)
    return replace(plan, config=plan.config.model_copy(update={"workers": workers}))
