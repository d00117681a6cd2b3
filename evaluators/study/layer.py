"""What a study's method is given of a layer, and what it gives back."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from evaluators.prepare.activation_samples import SampledInput
from evaluators.prepare.calibration import InputGroup
from quantizers.rounding.sparsegpt import row_errors
from quantizers.statistics.hessian import inverse_factor
from quantizers.statistics.moments import InputStatistics


class LayerInput:
    """The input of one or several layers: Hessian H (columns, columns), moments, and the factor of its inverse.

    ``samples`` of its activations are there if the method asked for them and the input has any; in
    ``memo`` a method keeps what it need not compute again for the next layer with this input.
    """

    def __init__(self, group: InputGroup, damping: float, device: torch.device, samples: SampledInput | None = None):
        self.H = group.hessian.to(device)
        self.statistics = InputStatistics(**{name: t.to(device) for name, t in group.statistics.tensors().items()})
        self.damping = damping
        self.samples = samples
        self.memo: dict[str, Any] = {}

    @cached_property
    def factor(self) -> Tensor:
        """U upper float64 (columns, columns) with U^T U = damped(H)^-1."""
        return inverse_factor(self.H, self.damping)[0]


@dataclass(frozen=True)
class StudyLayer:
    """A matrix W float32 (rows, columns) in its place in the model, and its input."""

    name: str
    block: int  # -1 for the embedding, ``blocks`` for the head
    blocks: int
    W: Tensor
    input: LayerInput


@dataclass(frozen=True)
class TreatedLayer:
    """Simulated weights (rows, columns), bits of each input channel (columns,) and the scores they came from."""

    weights: Tensor
    bits: Tensor
    stored_bits: float  # bits a weight, with scales and whatever else a file would hold
    score: Tensor | None = None
    grouping_seconds: float = 0.0


@dataclass(frozen=True)
class LayerRecord:
    """One layer of one method, in numbers."""

    tensor: str
    weights: int
    channels: dict[int, int]  # by bits
    average_bits: float
    stored_bits: float
    zeros: int  # weights that are exactly 0
    error: float  # tr(dW H dW^T)
    power: float  # tr(W H W^T)
    importance_min: float | None
    importance_max: float | None
    grouping_seconds: float = 0.0  # spent on mutual information and clusters


def record_of(layer: StudyLayer, treated: TreatedLayer) -> LayerRecord:
    """Raises FloatingPointError, with the layer's name, if the weights are not finite."""
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
