"""What computing in another type than float32 costs by itself: the KL below which differences are rounding."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from evaluators.engine.divergence import Reference
from evaluators.engine.evaluator import EvaluatorSetup, GenomeEvaluator, warm_evaluator
from evaluators.engine.prefix_cache import PrefixCache
from evaluators.engine.sweep import Sweep
from evaluators.engine.weights import ModelWeights
from evaluators.model.block_model import BlockModel
from search.types import Fidelity

WINDOWS = 2  # of text, the first of a fidelity


@dataclass(frozen=True)
class ComputeFloor:
    """``kl`` in nats per token from the full-precision model in float32 to itself in ``compute``, over ``tokens``."""

    compute: str
    kl: float  # infinite where activations leave the type's range
    tokens: int


@dataclass(frozen=True)
class MeasureComputeFloor:
    """Pool task: the floor of the type in which this worker computes; None where that is float32."""

    setup: EvaluatorSetup
    fidelity: Fidelity

    @property
    def label(self) -> str:
        return "compute floor"

    def run(self, state: dict[Any, Any]) -> ComputeFloor | None:
        return compute_floor(warm_evaluator(self.setup, state), self.fidelity)


def compute_floor(evaluator: GenomeEvaluator, fidelity: Fidelity) -> ComputeFloor | None:
    """None if the evaluator computes in float32. In memory is one block more than the evaluator's own."""
    sweep = evaluator.sweep
    if sweep.model.compute == torch.float32:
        return None
    streamed = ModelWeights(BlockModel(sweep.model.folder, sweep.model.device), evaluator.bank, 0)
    exact = Sweep(streamed, sweep.batches, PrefixCache(0))
    ids = evaluator.ids(fidelity)[:WINDOWS]
    text = (fidelity, WINDOWS)
    (expected,), (found,) = (s.final_states(ids, text, [{}]) for s in (exact, sweep))
    head = sweep.head(None)
    try:
        kl = Reference(expected, head, ids).compare(found, head).kl
    except FloatingPointError:
        kl = math.inf
    return ComputeFloor(str(sweep.model.compute).removeprefix("torch."), kl, ids.numel())
