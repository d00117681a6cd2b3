"""Predicts the peak memory of every stage of a run before it starts, from the model's sizes alone."""

from collections.abc import Mapping, Sequence

import psutil
import torch

from bitgenome.common.devices import best_device, compute_type, host_share, worker_memory
from bitgenome.common.errors import UserError
from bitgenome.config.run import RunConfig
from bitgenome.plan.objective import factored_tensors, rounds_by_loss, tensors_by_rows
from bitgenome.plan.plan import Plan
from bitgenome.plan.text import written_counts
from evaluators.engine.memory import Load, SweepMemory, lighter, sweep_memory
from evaluators.engine.streamed import pass_memory
from evaluators.gradient.memory import factor_memory, gradient_memory
from evaluators.healing.memory import chunk_bytes, healing_memory, reference_bytes
from evaluators.model.sizes import FLOAT_BYTES, ModelShape, StageMemory, larger
from evaluators.prepare.memory import bank_memory, calibration_memory, writing_memory
from exporters.runtime.comparison import CHUNK_BYTES
from quantizers.formats.table import QuantFormat

GENES_TOGETHER = 8  # neighbours in one sweep, which branch off the full-precision model in the same blocks
MOST_TOGETHER = 32  # genomes of one task: bounds what a lost worker costs, and the time between signs of progress
KEPT_GENOMES = 4  # whose prefixes workers keep
PACKED_COPIES = 3  # of a tensor's bytes: from the file, in another order of rows, from the bank
TOKEN_BYTES = 1200  # of a token of the vocabulary and its merge, as Python objects and as written
RUNTIME_BYTES = 28 << 20  # llama.cpp's own buffers, vocabulary and server
LOG_PROBS = 5  # of a chunk of positions: llama.cpp's, a model's, and what comparing them computes
REFERENCES = 12  # approximate number of seeds and uniform genomes that the winner is compared with


def sensitivity_load(plan: Plan) -> Load:
    """Return the load of measuring sensitivities by forward passes."""
    levels = max(len(gene.formats) for gene in plan.space.genes)
    return Load(GENES_TOGETHER * levels, plan.config.text.tokens.sensitivity, 1)


def heaviest_load(plan: Plan) -> Load:
    """Return the load of the stage whose sweep has the most hidden states (candidates times tokens)."""
    config, tokens = plan.config, plan.config.text.tokens
    genomes = min(MOST_TOGETHER, config.search.population + config.search.elites)
    loads = (
        sensitivity_load(plan),
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


def healing_variant(plan: Plan, limit: int | None = None, device: torch.device | None = None) -> str:
    """Return the variant of healing that is configured, or for auto: full where that fits in ``limit`` bytes.

    ``limit`` is what a worker may use on ``device``; the defaults are this machine's. Raises UserError for a configured
    ``full`` that does not fit.
    """
    device = device or best_device()
    limit = limit or worker_limit(plan.config, device)
    wanted = plan.config.healing.variant
    if wanted == "blockwise":
        return wanted
    memory = stage_healing(plan, "full", device)
    needed = memory.host_bytes if device.type == "cpu" else memory.device_bytes
    if needed <= limit:
        return "full"
    if wanted == "full":
        raise UserError(
            f"expected {needed / 2**30:.2f} GiB of memory for a worker with healing.variant: full, "
            f"found {limit / 2**30:.2f} GiB: auto or blockwise heals one block at a time"
        )
    return "blockwise"


def stage_healing(plan: Plan, variant: str, device: torch.device) -> StageMemory:
    """Return the peak of healing by ``variant``."""
    text = plan.config.text
    tokens = {split: getattr(text.tokens, split) for split in ("calibration", "validation", "test")}
    return healing_memory(ModelShape.of(plan.folder), variant, plan.config.healing, text.window, tokens, device)


def stage_memory(plan: Plan, device: torch.device | None = None, limit: int | None = None) -> dict[str, StageMemory]:
    """Return the predicted peak of every stage of a run by name, in one process beside what that takes itself.

    ``limit`` is what a worker may use on ``device``; the defaults are this machine's. Raises UserError if not even one
    block fits.
    """
    device = device or best_device()
    config, text, shape = plan.config, plan.config.text, ModelShape.of(plan.folder)
    limit = limit or worker_limit(config, device)
    formats = {name: gene.formats for gene in plan.space.genes for name in gene.tensors}
    compute = compute_type(config.evaluation.compute, device)
    load = heaviest_load(plan)
    division = sweep_memory(shape, formats, text.window, load, limit, compute, device)
    sweep = division.stage(device)
    exact = sweep_memory(shape, formats, text.window, load, limit, device=device).stage(device)
    writing = {"text": writing_memory(shape, text.window, device)} if written_counts(text) else {}
    factored = factored_tensors(plan) + tensors_by_rows(plan) if rounds_by_loss(plan) else []
    stages = writing | {
        "calibration": calibration_memory(shape, text.tokens.calibration, text.window, device),
        "bank": bank_memory(shape, formats, device, compensation=config.quantization.compensation, factored=factored),
        "sensitivity": lighter(division, shape, text.window, sensitivity_load(plan), device).stage(device),
        "search": sweep,
        "validation": sweep,
    }
    if factored:
        factors = factor_memory(shape, text.tokens.calibration, text.window, device)
        stages["calibration"] = larger(stages["calibration"], factors)
    if config.sensitivity.measure == "gradient":
        stages["sensitivity"] = gradient_memory(shape, text.tokens.sensitivity, text.window, device)
    if config.healing.enabled != "off":
        stages["healing"] = stage_healing(plan, healing_variant(plan, limit, device), device)
    stages |= {"test": exact, "export": export_memory(shape, formats)}
    proof = proof_memory(shape, text.window, text.tokens.test, limit, device, q8=config.evaluation.activations == "q8")
    stages["proof"] = larger(llamacpp_memory(plan), proof)  # one after the other
    return stages


def export_memory(shape: ModelShape, formats: Mapping[str, Sequence[QuantFormat]]) -> StageMemory:
    """Return what writing and checking the file takes: the largest tensor's packed bytes, and the tokenizer's lists."""
    largest = max(fmt.tensor_bytes(shape.tensors[name]) for name, fmts in formats.items() for fmt in fmts)
    return StageMemory(host={"packed tensor": PACKED_COPIES * largest, "tokenizer": TOKEN_BYTES * shape.vocabulary})


def llamacpp_memory(plan: Plan) -> StageMemory:
    """Return what llama.cpp takes in a process of its own: its buffers, and the file, whose pages it gives back."""
    window, shape = plan.config.text.window, ModelShape.of(plan.folder)
    cache = 2 * shape.layers * window * shape.state_bytes  # keys and values of a window, as if no heads shared them
    return StageMemory(
        host={"file in llama.cpp": plan.budget.file_bytes, "key-value cache": cache, "llama.cpp": RUNTIME_BYTES}
    )


def proof_memory(
    shape: ModelShape, window: int, tokens: int, limit: int, device: torch.device, *, q8: bool = False
) -> StageMemory:
    """Return what the proof takes beside llama.cpp: passes block by block; then the two heads.

    ``q8`` says whether 8-bit inputs are simulated too.
    """
    positions = max(window, tokens // window * window)
    states = positions * shape.state_bytes
    held = {"hidden states of passes before": (2 if q8 else 0) * states + states}
    passes = pass_memory(shape, window, positions, limit, device)
    one_pass = StageMemory.on(device, held, {"hidden states of llama.cpp": states})
    both = StageMemory({**one_pass.device, **passes.device}, {**one_pass.host, **passes.host})
    heads = {
        "heads": 2 * shape.head_bytes,
        "hidden states": (5 if q8 else 3) * states,
        "logits": chunk_bytes(shape, device) + reference_bytes(shape, positions),
    }
    chunk = min(CHUNK_BYTES, positions * shape.vocabulary * FLOAT_BYTES)
    comparison = {"hidden states of llama.cpp": states, "log probabilities": LOG_PROBS * chunk}
    return larger(both, StageMemory.on(device, heads, comparison))


def check_memory(plan: Plan) -> None:
    """Raise UserError if a worker of this machine, or of the configured size, could not hold even one block.

    So it does for a configured ``healing.variant: full`` that does not fit.

    The machines of a remote cluster are unknown here: they are checked when their workers start.
    """
    if plan.config.evaluation.memory or plan.config.workers.ray in ("off", "auto", "local"):
        worker_sweep_memory(plan)
        check_writing(plan)
        if plan.config.healing.enabled != "off":
            healing_variant(plan)


def check_writing(plan: Plan) -> None:
    """Raise UserError if the model is to write text and does not fit a worker of this machine as a whole."""
    if not written_counts(plan.config.text):
        return
    device = best_device()
    memory = writing_memory(ModelShape.of(plan.folder), plan.config.text.window, device)
    needed = memory.host_bytes if device.type == "cpu" else memory.device_bytes
    if needed > (limit := worker_limit(plan.config, device)):
        raise UserError(
            f"expected {needed / 2**30:.2f} GiB of memory for a worker with text.source: self, which holds the whole "
            f"model, found {limit / 2**30:.2f} GiB: give fewer workers more memory, or text by file, chat or datasets"
        )


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
