"""What the evaluations of a run take of a worker's memory, told before they start."""

import psutil

from bitgenome.common.devices import best_device, host_share, worker_memory
from bitgenome.run.plan import Plan
from evaluators.engine.memory import Load, SweepMemory, sweep_memory

GENES_TOGETHER = 8  # of neighbouring tensors, in one sweep: they branch off the full-precision model in the same blocks
MOST_TOGETHER = 32  # genomes of one task: what a lost worker costs, and how often there is progress to show
KEPT_GENOMES = 4  # whose prefixes workers remember
REFERENCES = 12  # seeds and uniform genomes, about, that are held against the winner


def heaviest_load(plan: Plan) -> Load:
    """Of the sweeps of all stages, the one with the most hidden states."""
    config, space = plan.config, plan.space
    tokens = config.text.tokens
    levels = max(len(gene.formats) for gene in space.genes)
    genomes = min(MOST_TOGETHER, config.search.population + config.search.elites)
    loads = (
        Load(GENES_TOGETHER * levels, tokens.sensitivity, 1),
        Load(genomes, max(config.ladder.rungs), KEPT_GENOMES),
        Load(config.search.validation_candidates + REFERENCES, tokens.validation, 0),
        Load(REFERENCES, tokens.test, 0),
    )
    return max(loads, key=lambda load: load.candidates * load.tokens)


def worker_sweep_memory(plan: Plan) -> SweepMemory:
    """Of one worker, on a machine like this one. Raises UserError if the model cannot be evaluated in its memory."""
    config = plan.config
    formats = {name: gene.formats for gene in plan.space.genes for name in gene.tensors}
    device = best_device()
    free = host_share(config.workers.cpus_per_worker) if device.type == "cpu" else worker_memory(device)
    limit = config.evaluation.memory or free
    return sweep_memory(plan.folder, formats, config.text.window, heaviest_load(plan), limit)


def check_memory(plan: Plan) -> None:
    """Raise UserError if a worker of this machine, or of the configured size, could not hold even one block.

    The machines of a cluster elsewhere are not known: they are checked when their workers start.
    """
    if plan.config.evaluation.memory or plan.config.workers.ray in ("off", "auto", "local"):
        worker_sweep_memory(plan)


def process_bytes() -> int:
    """What this process takes with nothing but its libraries loaded, as every worker does."""
    return int(psutil.Process().memory_info().rss)


def memory_line(plan: Plan) -> str:
    """For `bitgenome plan`."""
    memory = worker_sweep_memory(plan)
    parts = {
        "weights": memory.weights,
        "hidden states": memory.states + memory.cache,
        "reference": memory.reference + memory.logits,
        "work": memory.work,
    }
    host = best_device().type == "cpu"
    own = process_bytes() if host else 0
    listed = ", ".join(f"{size / 2**30:.2f} {what}" for what, size in parts.items())
    held = (
        "resident" if memory.resident else f"streamed, {memory.all_weights / 2**30:.2f} GiB of weights in all formats"
    )
    where = "host" if host else "device"
    by_itself = f" ({own / 2**30:.2f} by itself)" if host else ""
    return f"a worker takes up to {(own + memory.peak) / 2**30:.2f} GiB of {where} memory{by_itself}: {listed}; {held}"
