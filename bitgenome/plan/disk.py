"""Says how many bytes the artefacts of a run take on disk."""

from bitgenome.plan.objective import factor_bytes, rounds_by_loss
from bitgenome.plan.plan import Plan
from bitgenome.plan.seconds import input_groups
from evaluators.model.sizes import ModelShape
from exporters.runtime.nearest import mix_wanted

FLOAT_BYTES = 4
KEPT_HESSIANS = 2 << 30  # bytes up to which Hessians stay: another set of levels then needs no calibration
HESSIANS_AT_ONCE = 8 << 30  # bytes that are on disk at a time where they do not stay: enough tensors for many workers
WINDOW_COPIES = 2  # of the tokens, beside the run and beside the calibration
ID_BYTES = 4
EVALUATION_BYTES = 400  # a line of evaluations.jsonl, with the KL of its windows


def hessian_bytes(plan: Plan) -> int:
    """Return the bytes of the Hessians of all input groups, float32."""
    return sum(FLOAT_BYTES * group.columns**2 for group in input_groups(plan))


def block_hessian_bytes(plan: Plan) -> int:
    """Return the bytes of one block's Hessians."""
    of_blocks = sum(FLOAT_BYTES * group.columns**2 for group in input_groups(plan) if group.block)
    return of_blocks // ModelShape.of(plan.folder).layers


def keeps_hessians(plan: Plan) -> bool:
    """Return whether the Hessians stay on disk when the bank is built: as configured, or where they are small."""
    wanted = plan.config.quantization.keep_hessians
    if wanted == "auto":
        return plan.config.reads_hessians_again or hessian_bytes(plan) <= KEPT_HESSIANS
    return wanted


def stretches(plan: Plan) -> list[range]:
    """Return the blocks whose Hessians are on disk at the same time, where Hessians do not stay.

    They do not depend on the workers. The number after the last block stands for head and embedding.
    """
    blocks = ModelShape.of(plan.folder).layers
    together = max(1, HESSIANS_AT_ONCE // block_hessian_bytes(plan))
    starts = range(0, blocks, together)
    return [range(start, start + together if start + together < blocks else blocks + 1) for start in starts]


def calibration_bytes(plan: Plan) -> int:
    """Return the bytes that calibration takes on disk: what stays, or the most at a time."""
    factors = factor_bytes(plan) if rounds_by_loss(plan) else 0
    if keeps_hessians(plan):
        return hessian_bytes(plan) + factors
    tokens, longest = plan.config.text.tokens.calibration, max(len(blocks) for blocks in stretches(plan))
    states = 2 * tokens * ModelShape.of(plan.folder).state_bytes
    return factors + longest * block_hessian_bytes(plan) + states  # hidden states: the old and the new ones


def bank_bytes(plan: Plan) -> int:
    """Return the bytes of every tensor at every level."""
    return sum(gene.size_bytes(choice) for gene in plan.space.genes for choice in range(len(gene.formats)))


def own_bytes(plan: Plan) -> int:
    """Return the bytes of the run's own directory: the file, tokens and evaluations, and for a while llama.cpp's."""
    tokens = plan.config.text.tokens
    text = tokens.calibration + tokens.search + tokens.validation + tokens.test
    beside = mix_wanted(plan.config.llamacpp_mix, plan.space.weights)
    mix = FLOAT_BYTES * plan.space.weights + plan.budget.file_bytes if beside else 0  # while the file is proved
    copies = 1 if plan.config.export.split_max_size is None else 2  # the file, and its shards
    files = copies * plan.budget.file_bytes + mix
    return files + WINDOW_COPIES * ID_BYTES * text + EVALUATION_BYTES * plan.search_evaluations


def disk_bytes(plan: Plan) -> dict[str, int]:
    """Return the bytes that stages take on disk, by stage; Hessians and bank are shared by digest among runs.

    Of Hessians that do not stay, it is the most at a time.
    """
    return {"calibration": calibration_bytes(plan), "bank": bank_bytes(plan), "export": own_bytes(plan)}
