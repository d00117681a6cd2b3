"""Decides whether the search simulates llama.cpp's 8-bit inputs, by what they cost one genome."""

import logging
from dataclasses import replace
from typing import Any

from bitgenome.plan.plan import Plan
from bitgenome.storage.run_directory import RunDirectory
from evaluators.engine.evaluator import EvaluateGenomes, EvaluatorSetup
from search.allocation.seeds import nearest_uniform
from search.types import Fidelity
from workers.pool.base import Pool

log = logging.getLogger(__name__)

GAP = 0.02  # of the KL: what 8-bit inputs change, above which a search without them would miss its aim
RECORDED = "activations"  # key of run.json


def choose_activations(plan: Plan, setup: EvaluatorSetup, run: RunDirectory, pool: Pool) -> str:
    """Return "float" or "q8": what is configured, or for "auto" what the base genome says, which is recorded.

    The base genome is the uniform one that is nearest to the budget, on the text of the sensitivities. ``setup``
    evaluates with float inputs.
    """
    configured = plan.config.evaluation.activations
    if configured != "auto":
        return configured

    def measure() -> dict[str, Any]:
        base = nearest_uniform(plan.space, plan.budget)
        fidelity = Fidelity("search", plan.config.text.tokens.sensitivity)
        setups = (replace(setup, activations=how, key=f"{setup.key}-{how}") for how in ("float", "q8"))
        tasks = [EvaluateGenomes(s, (base,), fidelity, f"activations[{s.activations}]", ()) for s in setups]
        (plain,), (rounded,) = pool.map(tasks)
        chosen = decided(plain.kl, rounded.kl)
        log.info(
            "8-bit inputs change the KL of a uniform genome from %.5f to %.5f: the search reads %s",
            plain.kl, rounded.kl, "8-bit inputs, as llama.cpp does" if chosen == "q8" else "float inputs",
        )  # fmt: skip
        return {"chosen": chosen, "float_kl": plain.kl, "q8_kl": rounded.kl}

    return str(run.record.once(RECORDED, measure)["chosen"])


def decided(float_kl: float, q8_kl: float) -> str:
    """Return "q8" if 8-bit inputs change a genome's KL by more than the share GAP, else "float"."""
    return "q8" if abs(q8_kl - float_kl) > GAP * float_kl else "float"


def with_activations(plan: Plan, activations: str) -> Plan:
    """Return ``plan`` with decided ``activations``."""
    evaluation = plan.config.evaluation.model_copy(update={"activations": activations})
    return replace(plan, config=plan.config.model_copy(update={"evaluation": evaluation}))


def plan_as_decided(plan: Plan, run: RunDirectory) -> Plan:
    """Return ``plan`` with the activations that ``run`` has decided on; as it is where nothing was to be decided."""
    return with_activations(plan, run.record[RECORDED]["chosen"]) if RECORDED in run.record else plan
