"""Reports the rounding error of evaluating genomes in another type than float32."""

import logging
import math

from bitgenome.common.errors import UserError
from evaluators.engine.compute_floor import MeasureComputeFloor
from evaluators.engine.evaluator import EvaluatorSetup
from search.types import Fidelity
from workers.pool.base import Pool

log = logging.getLogger(__name__)


def log_compute_floor(setup: EvaluatorSetup, tokens: int, pool: Pool) -> None:
    """Log the KL below which differences are rounding, if workers compute in another type than float32.

    The KL is in nats per token. ``tokens`` is the length of the search text that is read. Raises UserError if
    activations overflow the type.
    """
    if setup.compute == "float32":
        return
    (floor,) = pool.map([MeasureComputeFloor(setup, Fidelity("search", tokens))])
    if floor is None:
        return
    if not math.isfinite(floor.kl):
        raise UserError(
            f"expected activations within the range of {floor.compute}, found some beyond it: set evaluation.compute "
            "to bfloat16 or float32"
        )
    log.info(
        "blocks multiply in %s while searching: the full-precision model computed so has a KL of %.1e from itself in "
        "float32 (%d tokens of search text); figures on test text are in float32",
        floor.compute,
        floor.kl,
        floor.tokens,
    )
