"""Estimates how much of a worker's memory the evaluations of a run need, before they start."""

import psutil
import torch

from bitgenome.common.devices import best_device, compute_type, host_share, worker_memory
from bitgenome.config.run import RunConfig
from bitgenome.plan.plan import Plan
from evaluators.engine.memory import Load, SweepMemory, sweep_memory
from evaluators.model.sizes import ModelShape

GENES_TOGETHER = 8  # neighbours in one sweep, which branch off the full-precision model in the same blocks
MOST_TOGETHER = 32  # genomes of one task: bounds what a lost worker costs, and the time between signs of progress
KEPT_GENOMES = 4  # whose prefixes workers keep
REFERENCES = 12  # approximate number of seeds and uniform genomes that the winner is compared with


def heaviest_load(plan: Plan) -> Load:
    """Return the load of the stage whose sweep has the most hidden states (candidates times tokens)."""
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


def worker_limit(config: RunConfig, device: torch.device) -> int:
    """Return the bytes that a worker may use on ``device`` of a machine like this one: the setting, or its share."""
    workers = config.workers
    if device.type == "cpu":
        return config.evaluation.memory or host_share(workers.cpus_per_worker)
    return config.evaluation.memory or worker_memory(device, min(1.0, workers.gpus_per_worker or 1.0))


def worker_sweep_memory(plan: Plan) -> SweepMemory:
    """Return the memory that one worker's sweeps take, in bytes, on a machine like this one.

    Raises UserError if the model cannot be evaluated in that machine's memory.
    """
    config = plan.config
    formats = {name: gene.formats for gene in plan.space.genes for name in gene.tensors}
    device = best_device()
    compute = compute_type(config.evaluation.compute, device)
    shape, limit = ModelShape.of(plan.folder), worker_limit(config, device)
    return sweep_memory(shape, formats, config.text.window, heaviest_load(plan), limit, compute)


def check_memory(plan: Plan) -> None:
    """Raise UserError if a worker of this machine, or of the configured size, could not hold even one block.

    The machines of a remote cluster are unknown here: they are checked when their workers start.
    """
    if plan.config.evaluation.memory or plan.config.workers.ray in ("off", "auto", "local"):
        worker_sweep_memory(plan)


def process_bytes() -> int:
    """Return the bytes that this process takes with nothing but its libraries loaded, as every worker does."""
    return int(psutil.Process().memory_info().rss)


def memory_line(plan: Plan) -> str:
    """Return one line on a worker's memory, for ``bitgenome plan``."""
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
