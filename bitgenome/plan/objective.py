"""Decides what rounding makes least: each layer's output error, or what that does to the loss of the whole model."""

from bitgenome.plan.plan import Plan
from evaluators.model.sizes import FLOAT_BYTES, ModelShape, block_of
from quantizers.rounding.row_order import factor_entries
from quantizers.statistics.row_groups import row_entries

KEPT_FACTORS = 8 << 30  # bytes of output factors up to which rounding looks at the loss unless told otherwise


def factored_tensors(plan: Plan) -> list[str]:
    """Return the tensors that are rounded on both sides where the objective is the loss: blocks' that are not pruned.

    They need the factors of their outputs.
    """
    names = [name for gene in plan.space.genes for name in gene.tensors if name not in plan.sparsity]
    return [name for name in names if block_of(name) is not None]


def tensors_by_rows(plan: Plan) -> list[str]:
    """Return the tensors whose rows have Hessians of their own where the objective is the loss: head, lookup tables."""
    names = [name for gene in plan.space.genes for name in gene.tensors if name not in plan.sparsity]
    return [name for name in names if block_of(name) is None]


def factor_bytes(plan: Plan) -> int:
    """Return the bytes of all output factors and Hessians of rows, float32."""
    shape = ModelShape.of(plan.folder)
    factors = sum(factor_entries(shape.tensors[name][0]) for name in factored_tensors(plan))
    uses = 2 if plan.folder.tied else 1
    by_rows = sum(uses * row_entries(*shape.tensors[name]) for name in tensors_by_rows(plan))
    return FLOAT_BYTES * (factors + by_rows)


def rounds_by_loss(plan: Plan) -> bool:
    """Return whether rounding looks at the loss: as configured, or for auto where the output factors are small."""
    settings = plan.config.quantization
    if settings.objective == "auto":
        return settings.compensation and 0 < factor_bytes(plan) <= KEPT_FACTORS
    return settings.objective == "loss" and factor_bytes(plan) > 0


def objective_line(plan: Plan) -> str:
    """Return a line on what rounding makes least, and what that takes on disk."""
    if rounds_by_loss(plan):
        size = f"{factor_bytes(plan) / 1e6:,.0f} MB of factors"
        return f"rounding looks at the loss of the whole model (quantization.objective: loss; {size})"
    return "rounding makes each layer's output error least (quantization.objective: output)"
