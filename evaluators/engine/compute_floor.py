"""This module measures the KL that computing in a type other than float32 causes by itself.

Differences of KL below this floor are rounding.
"""

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

WINDOWS = 2  # windows of text to measure on, the first of a fidelity


@dataclass(frozen=True)
class ComputeFloor:
    """Holds the KL from the full-precision model in float32 to the same model in the type ``compute``.

    ``kl`` is in nats per token, the mean over ``tokens`` tokens.
    """

    compute: str
    kl: float  # infinite if activations leave the type's range
    tokens: int


@dataclass(frozen=True)
class MeasureComputeFloor:
    """Pool task that measures the floor of the type in which its worker computes."""

    setup: EvaluatorSetup
    fidelity: Fidelity

    @property
    def label(self) -> str:
        return "compute floor"

    def run(self, state: dict[Any, Any]) -> ComputeFloor | None:
        """Return the floor; None if the worker computes in float32."""
        return compute_floor(warm_evaluator(self.setup, state), self.fidelity)


def compute_floor(evaluator: GenomeEvaluator, fidelity: Fidelity) -> ComputeFloor | None:
    """Return the floor of the evaluator's compute type, on the first WINDOWS windows of the text of ``fidelity``.

    None if the evaluator computes in float32. The float32 model is streamed, so this takes the memory of one block
    more than the evaluator's own.
    """
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
        kl = Reference(expected, head, ids, evaluator.windows.unscored).compare(found, head).kl
    except FloatingPointError:
        kl = math.inf
    return ComputeFloor(str(sweep.model.compute).removeprefix("torch."), kl, ids.numel())
