"""Says in a line each what was chosen for a run, and why."""

from bitgenome.config.run import RunConfig
from bitgenome.plan.forecast import duration, workers_here
from bitgenome.plan.plan import Plan
from bitgenome.quantize.effort import Chosen

USUAL_LEVELS = "fine"
WIDE_LEVELS = "all"  # for files smaller than those of the usual levels
GIVEN_LEVELS = "given"


def levels_note(levels: str, config: RunConfig) -> str:
    """Return in words which types tensors may take."""
    if levels == GIVEN_LEVELS:
        return f"{', '.join(config.levels)}, as set"
    if levels == WIDE_LEVELS:
        return "all, codebook types (IQ2_XXS, ...) too, as the size is below what K types reach"
    return "fine: Q2_K to Q8_0, fast on every device; --set levels=all loses less, and its bank takes 3 times as long"


def effort_notes(chosen: Chosen, plan: Plan, seconds: float) -> list[tuple[str, str]]:
    """Return in words the text, the search and the workers of ``chosen``, and what the run will take."""
    config, tokens = chosen.config, chosen.config.text.tokens
    search = config.search
    genomes = f", {search.generations} generations of {search.population}" if search.strategy != "exact" else ""
    cores = plan.config.workers.cpus_per_worker
    limit = duration(seconds)
    fits = f"the most that is forecast to end within {limit} (--time)"
    if chosen.seconds > seconds:
        fits = f"nothing is forecast to end within {limit} (--time), this soonest"
    disk = sum(stage.disk for stage in chosen.stages)
    return [
        ("effort", f"{chosen.effort.name}: {fits}"),
        ("tokens", f"{tokens.calibration:,} to calibrate, {tokens.search:,} to search, {tokens.test:,} to test"),
        ("search", f"{search.strategy}{genomes}; sensitivities by {config.sensitivity.measure}"),
        ("workers", f"{workers_here(plan)}, {cores} {'core' if cores == 1 else 'cores'} each"),
        ("forecast", f"{duration(chosen.seconds)}, {disk / 1e9:.2f} GB of disk (bitgenome plan shows every stage)"),
    ]
