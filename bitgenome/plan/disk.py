"""Says how many bytes the artefacts of a run take on disk."""

from bitgenome.plan.plan import Plan
from bitgenome.plan.seconds import input_groups

FLOAT_BYTES = 4
WINDOW_COPIES = 2  # of the tokens, beside the run and beside the calibration
ID_BYTES = 4
EVALUATION_BYTES = 400  # a line of evaluations.jsonl, with the KL of its windows


def hessian_bytes(plan: Plan) -> int:
    """Return the bytes of the Hessians of all input groups, float32."""
    return sum(FLOAT_BYTES * group.columns**2 for group in input_groups(plan))


def bank_bytes(plan: Plan) -> int:
    """Return the bytes of every tensor at every level."""
    return sum(gene.size_bytes(choice) for gene in plan.space.genes for choice in range(len(gene.formats)))


def own_bytes(plan: Plan) -> int:
    """Return the bytes of the run's own directory: the file, tokens and evaluations."""
    tokens = plan.config.text.tokens
    text = tokens.calibration + tokens.search + tokens.validation + tokens.test
    return plan.budget.file_bytes + WINDOW_COPIES * ID_BYTES * text + EVALUATION_BYTES * plan.search_evaluations


def disk_bytes(plan: Plan) -> dict[str, int]:
    """Return the bytes that stages leave on disk, by stage; Hessians and bank are shared by digest among runs."""
    return {"calibration": hessian_bytes(plan), "bank": bank_bytes(plan), "export": own_bytes(plan)}
