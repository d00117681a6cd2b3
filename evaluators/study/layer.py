"""The inputs and results of a study's methods, layer by layer."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from evaluators.prepare.activation_samples import SampledInput
from evaluators.prepare.input_group import InputGroup
from quantizers.rounding.row_choice import row_errors
from quantizers.statistics.hessian import inverse_factor
from quantizers.statistics.moments import InputStatistics


class LayerInput:
    """Statistics of the input that one or several layers share: Hessian H (columns, columns) and moments.

    ``samples`` holds activations if the method needs them and the input has any. Methods cache in ``memo`` what the
    next layer with the same input can reuse.
    """

    def __init__(self, group: InputGroup, damping: float, device: torch.device, samples: SampledInput | None = None):
        self.H = group.hessian.to(device)
        self.statistics = InputStatistics(**{name: t.to(device) for name, t in group.statistics.tensors().items()})
        self.damping = damping
        self.samples = samples
        self.memo: dict[str, Any] = {}

    @cached_property
    def factor(self) -> Tensor:
        """Upper triangular U, float64 (columns, columns), with U^T U = damped(H)^-1."""
        return inverse_factor(self.H, self.damping)[0]


@dataclass(frozen=True)
class StudyLayer:
    """A weight matrix W, float32 (rows, columns), with its position in the model and its input."""

    name: str
    block: int  # index; -1 for the embedding, ``blocks`` for the head
    blocks: int
    W: Tensor
    input: LayerInput


@dataclass(frozen=True)
class TreatedLayer:
    """Holds simulated weights (rows, columns), bits (columns,) of the input channels, and the scores behind them."""

    weights: Tensor
    bits: Tensor
    stored_bits: float  # bits per weight, with scales and all else that a file would hold
    score: Tensor | None = None  # (columns,)
    grouping_seconds: float = 0.0  # for mutual information and clusters


@dataclass(frozen=True)
class LayerRecord:
    """Figures of one layer under one method."""

    tensor: str
    weights: int
    channels: dict[int, int]  # number of input channels by bits
    average_bits: float
    stored_bits: float
    zeros: int  # weights that are exactly 0
    error: float  # tr(dW H dW^T)
    power: float  # tr(W H W^T)
    importance_min: float | None
    importance_max: float | None
    grouping_seconds: float = 0.0  # for mutual information and clusters


def record_of(layer: StudyLayer, treated: TreatedLayer) -> LayerRecord:
    """Return the figures of a treated layer. Raises FloatingPointError, naming the layer, for non-finite weights."""
    if not treated.weights.isfinite().all():
        raise FloatingPointError(f"the simulated weights of {layer.name} are not finite")
    levels, counts = treated.bits.unique(return_counts=True)
    score = treated.score
    return LayerRecord(
        tensor=layer.name,
        weights=layer.W.numel(),
        channels=dict(zip(levels.tolist(), counts.tolist(), strict=True)),
        average_bits=float(treated.bits.double().mean()),
        stored_bits=treated.stored_bits,
        zeros=int((treated.weights == 0).sum()),
        error=float(row_errors(layer.W - treated.weights, layer.input.H).sum()),
        power=float(row_errors(layer.W, layer.input.H).sum()),
        importance_min=None if score is None else float(score.min()),
        importance_max=None if score is None else float(score.max()),
        grouping_seconds=treated.grouping_seconds,
    )
