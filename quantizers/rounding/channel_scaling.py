"""This module chooses channel scales: X / s and W * s have the same product, but W * s rounds differently.

Legend: X inputs with features j, W (rows, columns), s (columns,) positive with geometric mean 1, H Hessian of X. The
Hessian of X / s is H / (s s^T), so the error of the scaled weights under it is the error of the original output:
tr(dW H dW^T) = tr((dW s) (H / s s^T) (dW s)^T).

Scaling is off by default, because compensated rounding with importance leaves little to gain (benchmarks.scaling,
embedded model, Q2_K to Q6_K): searched scales change the error by -0.3 % and held-out KL by -1.6 to +0.3 %; SmoothQuant
at alpha 0.5 raises the error by 3 to 5 %, protection by 2 to 4 %.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.formats.table import QuantFormat
from quantizers.rounding.sparsegpt import compensate
from quantizers.settings import CompensationSettings, ScalingSettings
from quantizers.statistics.moments import InputStatistics

PROTECTION = 2.0  # factor on salient columns (Lin et al. 2023, table 2: 1.5 to 2 is best)
SAMPLED_ROWS = 128  # rows of each tensor, evenly spaced, on which errors are measured
DEFAULT_COMPENSATION = CompensationSettings()
LARGEST_SCALE = 1e4  # and its inverse the smallest, relative to the geometric mean; keeps fp16 block scales in range


@dataclass(frozen=True)
class Scaling:
    """Holds the scales s (columns,) of one input, and the error on sampled rows relative to that with s = 1."""

    scales: Tensor
    alpha: float
    weighted: bool  # whether scales are divided by the weights' magnitudes
    error: float


@dataclass(frozen=True)
class SharedColumns:
    """States which of an input's columns, laid out as (groups, repeats, width), must share a scale.

    Columns that differ only in their index along ``repeats`` share one. The input of an attention output projection has
    a group for each key-value head, ``repeats`` query heads in each, and ``width`` the head size.
    """

    repeats: int = 1
    width: int = 1

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of the values (columns,) that share a scale, (columns / repeats,)."""
        return values.view(-1, self.repeats, self.width).mean(1).flatten()

    def amax(self, values: Tensor) -> Tensor:
        """Return the largest of the values (columns,) that share a scale, (columns / repeats,)."""
        return values.view(-1, self.repeats, self.width).amax(1).flatten()

    def expand(self, values: Tensor) -> Tensor:
        """Return shared values (columns / repeats,) repeated for every column, (columns,)."""
        return values.view(-1, 1, self.width).expand(-1, self.repeats, -1).flatten()


def normalized_scales(s: Tensor) -> Tensor:
    """Return ``s`` (columns,) divided by its geometric mean and clamped to LARGEST_SCALE and its inverse, float32.

    Dead columns, where ``s`` is zero or not finite, get 1.
    """
    live = s.isfinite() & (s > 0)
    logs = torch.where(live, s, 1.0).double().log()
    mean = logs.sum() / live.sum().clamp(min=1)
    scaled = (logs - mean).exp().clamp(1 / LARGEST_SCALE, LARGEST_SCALE).float()
    return torch.where(live, scaled, 1.0)


def smoothquant_scales(abs_max: Tensor, weight_max: Tensor, alpha: float) -> Tensor:
    """Return max|X_j|^alpha / max|W_:j|^(1 - alpha), (columns,), normalized (Xiao et al. 2022, equation 4)."""
    return normalized_scales(abs_max.double() ** alpha / weight_max.double() ** (1 - alpha))


def awq_scales(mean_abs: Tensor, weight_mean: Tensor, alpha: float, weighted: bool) -> Tensor:
    """Return mean|X_j|^alpha, (columns,), normalized (Lin et al. 2023, equation 5).

    With ``weighted`` it is divided by mean|W_:j|^(1 - alpha), the ``duo_scaling`` of the authors' code; without,
    alpha = 0 is no scaling.
    """
    scales = mean_abs.double() ** alpha
    return normalized_scales(scales / weight_mean.double() ** (1 - alpha) if weighted else scales)


def protection(salience: Tensor, share: float) -> Tensor:
    """Return PROTECTION for the ``share`` of columns of largest ``salience`` (columns,), 1 for the rest, float32."""
    factors = torch.ones_like(salience, dtype=torch.float32)
    factors[salience.topk(round(share * len(salience))).indices] = PROTECTION
    return factors


def scaled_hessian(H: Tensor, s: Tensor) -> Tensor:
    """Return the Hessian of X / s, float32 (columns, columns)."""
    return (H.double() / torch.outer(s.double(), s.double())).float()


def scaled_error(
    weights: Mapping[str, Tensor],
    formats: Sequence[QuantFormat],
    H: Tensor,
    s: Tensor,
    compensation: CompensationSettings = DEFAULT_COMPENSATION,
) -> Tensor:
    """Return the errors tr(dW H dW^T), float64 (formats,), summed over ``weights``, when they are rounded as W * s.

    ``weights`` are (rows, columns) each. Raises ValueError as ``compensate``.
    """
    scaled = {name: W * s for name, W in weights.items()}
    results = compensate(scaled, dict.fromkeys(weights, formats), scaled_hessian(H, s), compensation)
    errors = [sum(results[name][fmt.name].error for name in weights) for fmt in formats]
    return torch.tensor(errors, dtype=torch.float64)


class ScalingTrial:
    """A trial measures the error of candidate scales for one input, on sampled rows of the weights that read it."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        formats: Sequence[QuantFormat],
        H: Tensor,
        shared: SharedColumns,
        compensation: CompensationSettings,
    ):
        self._sample = {name: sampled_rows(W) for name, W in weights.items()}
        self._formats, self._H, self._shared, self._compensation = formats, H, shared, compensation
        ones = torch.ones(len(H), device=H.device)
        self.none = Scaling(ones, 0.0, False, 1.0)
        self._plain = self._errors(ones).clamp(min=torch.finfo(torch.float64).tiny)

    def of_groups(self, scales: Tensor, alpha: float, weighted: bool) -> Scaling:
        """Try ``scales`` (columns / repeats,), one for each set of columns that must share one."""
        return self.of_columns(self._shared.expand(scales), alpha, weighted)

    def of_columns(self, scales: Tensor, alpha: float, weighted: bool) -> Scaling:
        """Try ``scales`` (columns,); the error is the mean over formats of the error relative to no scaling."""
        return Scaling(scales, alpha, weighted, float((self._errors(scales) / self._plain).mean()))

    def _errors(self, scales: Tensor) -> Tensor:
        return scaled_error(self._sample, self._formats, self._H, scales, self._compensation)


def choose_scaling(
    weights: Mapping[str, Tensor],
    formats: Sequence[QuantFormat],
    H: Tensor,
    statistics: InputStatistics,
    settings: ScalingSettings,
    shared: SharedColumns | None = None,
    compensation: CompensationSettings = DEFAULT_COMPENSATION,
) -> Scaling:
    """Choose the scales of the input of ``weights``, (rows, columns) each, which will be rounded with ``compensation``.

    H (columns, columns) and ``statistics`` are of that input; ``shared`` says which columns must share a scale, none by
    default. Kind smoothquant takes the given alpha. Kind awq takes the candidate of least mean error over ``formats``,
    each error relative to that without scaling; no scaling is a candidate, so the result is never worse on the sampled
    rows. Protection is applied on top, without a search. Raises ValueError as ``compensate``.
    """
    shared = shared or SharedColumns()
    trial = ScalingTrial(weights, formats, H, shared, compensation)
    rows = sum(len(W) for W in weights.values())
    weight_mean = shared.mean(torch.stack([W.abs().sum(0) for W in weights.values()]).sum(0) / rows)
    mean_abs = shared.mean(statistics.mean_abs)
    best = trial.none
    if settings.kind == "smoothquant":
        weight_max = torch.stack([W.abs().amax(0) for W in weights.values()]).amax(0)
        scales = smoothquant_scales(shared.amax(statistics.abs_max), shared.amax(weight_max), settings.alpha)
        best = trial.of_groups(scales, settings.alpha, True)
    elif settings.kind == "awq":
        tried = [
            trial.of_groups(awq_scales(mean_abs, weight_mean, alpha, weighted), alpha, weighted)
            for alpha, weighted in grid_candidates(settings.grid)
        ]
        best = min([trial.none, *tried], key=lambda candidate: candidate.error)
    if not settings.protect:
        return best
    protected = shared.expand(protection(mean_abs * weight_mean, settings.protect))
    return trial.of_columns(normalized_scales(best.scales * protected), best.alpha, best.weighted)


def sampled_rows(W: Tensor) -> Tensor:
    """Return at most SAMPLED_ROWS rows of W (rows, columns), evenly spaced."""
    return W[torch.linspace(0, len(W) - 1, min(len(W), SAMPLED_ROWS)).round().long()]


def grid_candidates(grid: int) -> Iterator[tuple[float, bool]]:
    """Yield (alpha, weighted) of AWQ's search: alpha = i / grid below 1, with and without the weights' magnitudes."""
    for i in range(grid):
        if i:
            yield i / grid, False
        yield i / grid, True
