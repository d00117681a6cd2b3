"""This module scores input channels in five dimensions, after the activation-aware enhancement of SparseGPT.

Each dimension is divided by its mean over the channels, so it has no unit and a mean of 1; the score is the weighted
mean of the dimensions. For channel j of W (rows, columns) with inputs x:

    activation    mean |x_j|
    hessian       1 / [H^-1]_jj, H damped: squared output error of a change in column j, compensated by the others
    weight        mean |W_ij| over rows i
    sensitivity   sum_i sqrt(W_ij^2 * mean x_j^2), what the channel contributes to the outputs
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
    """Weights of the five dimensions in the score, relative to their sum.

    Raises ValueError unless all are finite, none is negative and at least one is positive.
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
        """Return the weight of each dimension divided by their sum, by name."""
        values = asdict(self)
        total = sum(values.values())
        return {name: values[name] / total for name in DIMENSIONS}

    def without(self, dimension: str) -> "ImportanceWeights":
        """Return weights with ``dimension`` set to 0, for an ablation.

        Raises ValueError for an unknown dimension, and if no positive weight is left.
        """
        if dimension not in DIMENSIONS:
            raise ValueError(f"expected a dimension among {', '.join(DIMENSIONS)}, found {dimension!r}")
        return replace(self, **{dimension: 0.0})


def channel_dimensions(
    W: Tensor, H: Tensor, statistics: InputStatistics, damping: float = 0.01, *, U: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the five raw dimensions by name, float64 (columns,) each, in the units of W and x.

    W (rows, columns), H (columns, columns). ``U`` (columns, columns) with U^T U = damped(H)^-1 can be passed to save
    its computation. Raises ValueError for shapes that do not fit, for values that are not finite, and for an H that is
    not positive semidefinite.
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
    """Return diag(H^-1), float64 (columns,), from upper triangular U (columns, columns) with U^T U = H^-1."""
    return U.double().square().sum(0)


def combined_importance(dimensions: Mapping[str, Tensor], weights: ImportanceWeights | None = None) -> Tensor:
    """Return the score float64 (columns,): the weighted mean of the dimensions, each divided by its own mean.

    ``dimensions`` are (columns,) each, by name; one that is all zeros adds nothing.
    """
    parts = [
        share * dimensions[name] / dimensions[name].mean().clamp(min=torch.finfo(torch.float64).tiny)
        for name, share in (weights or ImportanceWeights()).shares().items()
    ]
    return torch.stack(parts).sum(0)


def channel_contribution(W: Tensor, statistics: InputStatistics) -> Tensor:
    """Return mean |W_ij| * mean |x_j| divided by its mean over the channels, float64 (columns,).

    This is the score of the three-level variant. W is (rows, columns); the result is ones where all are zero.
    """
    contribution = W.double().abs().mean(0) * statistics.mean_abs.double()
    mean = contribution.mean()
    return contribution / mean if mean > 0 else torch.ones_like(contribution)
