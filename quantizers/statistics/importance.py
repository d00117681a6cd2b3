"""Five-dimensional importance of a matrix's input channels, after the activation-aware enhancement of SparseGPT.

Each dimension is divided by its mean over the channels, so that it has no unit and a mean of 1; the score is their
weighted mean. Channel j of W (rows, columns), whose inputs are x:

    activation    mean |x_j|
    hessian       1 / [H^-1]_jj, H damped: the squared output error of a change in column j that the others make up for
    weight        mean |W_ij| over rows i
    sensitivity   sum_i sqrt(W_ij^2 * mean x_j^2), what the channel adds to the outputs
    stability     variance of x_j
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from quantizers.statistics.hessian import check_hessian, inverse_factor
from quantizers.statistics.moments import InputStatistics

DIMENSIONS = ("activation", "hessian", "weight", "sensitivity", "stability")


@dataclass(frozen=True)
class ImportanceWeights:
    """How much each dimension counts; they are divided by their sum. Raises ValueError unless one is positive, none
    negative and all finite.
    """

    activation: float = 0.25
    hessian: float = 0.25
    weight: float = 0.15
    sensitivity: float = 0.25
    stability: float = 0.10

    def __post_init__(self) -> None:
        values = asdict(self)
        wrong = [f"{name} = {value:g}" for name, value in values.items() if not (math.isfinite(value) and value >= 0)]
        if wrong or not any(values.values()):
            raise ValueError(
                "expected importance weights that are finite, not negative and not all zero, found "
                f"{', '.join(wrong) or 'zeros'}"
            )

    def shares(self) -> dict[str, float]:
        """By dimension, of sum 1."""
        values = asdict(self)
        total = sum(values.values())
        return {name: values[name] / total for name in DIMENSIONS}

    def without(self, dimension: str) -> "ImportanceWeights":
        """The others alone, for an ablation. Raises ValueError for a dimension that does not exist."""
        if dimension not in DIMENSIONS:
            raise ValueError(f"expected a dimension among {', '.join(DIMENSIONS)}, found {dimension!r}")
        return replace(self, **{dimension: 0.0})


def channel_dimensions(
    W: Tensor, H: Tensor, statistics: InputStatistics, damping: float = 0.01, *, U: Tensor | None = None
) -> dict[str, Tensor]:
    """By name the five raw dimensions, float64 (columns,), in the units of W and x.

    W (rows, columns), H (columns, columns). ``U`` with U^T U = damped(H)^-1 saves its computation. Raises ValueError
    for shapes that do not fit and values that are not finite.
    """
    check_hessian(H, W.shape[1])
    if not W.isfinite().all():
        raise ValueError(f"weights hold {int((~W.isfinite()).sum())} non-finite values of {W.numel()}")
    U = inverse_factor(H, damping)[0] if U is None else U
    magnitude = W.double().abs().mean(0)
    return {
        "activation": statistics.mean_abs.double(),
        "hessian": inverse_diagonal(U).reciprocal() * (H.diagonal() != 0),
        "weight": magnitude,
        "sensitivity": len(W) * magnitude * statistics.mean_square.double().sqrt(),
        "stability": statistics.variance.double(),
    }


def inverse_diagonal(U: Tensor) -> Tensor:
    """diag(H^-1) float64 (columns,) of U upper with U^T U = H^-1."""
    return U.double().square().sum(0)


def combined_importance(dimensions: Mapping[str, Tensor], weights: ImportanceWeights | None = None) -> Tensor:
    """float64 (columns,): weighted mean of the dimensions, each over its own mean; a dimension of zeros adds none."""
    parts = [
        share * dimensions[name] / dimensions[name].mean().clamp(min=torch.finfo(torch.float64).tiny)
        for name, share in (weights or ImportanceWeights()).shares().items()
    ]
    return torch.stack(parts).sum(0)


def channel_contribution(W: Tensor, statistics: InputStatistics) -> Tensor:
    """Mean |W_ij| * mean |x_j| over its mean over the channels, float64 (columns,): the three-level variant's score."""
    contribution = W.double().abs().mean(0) * statistics.mean_abs.double()
    mean = contribution.mean()
    return contribution / mean if mean > 0 else torch.ones_like(contribution)
