"""This module searches the step, and the offset, of each sub-block alone: stage 1 of ``scale_search``.

Shapes are as there: x (B, S, T, N), w (B, S, T, 1); results (B, S, 1, N).
"""

from itertools import chain

import torch
from torch import Tensor

from quantizers.formats.grids import Grid, safe_inverse
from quantizers.kernels.choice import kernels_for

T_DIM, S_DIM = 2, 1
TARGETS_BELOW, TARGETS_ABOVE = 10, 6  # candidates below and above each end of the integer range
TINY = 1e-30  # keeps 0 / 0 at 0
FLAT = 1e-6  # integers whose variance is less, relative to their sum of squares, are equal up to float32 rounding


def targets(end: int, spacing: float = 1.0) -> list[float]:
    """Return the values to try mapping the largest magnitude to: ``end`` of the integer range and values around it.

    ``spacing`` is the distance between neighbouring integers. The finer the grid, the wider the range of values, so
    that neighbouring candidates differ enough to round many weights differently. The range was found by trials on the
    embedded model for every format.
    """
    steps = abs(end) / spacing
    reach = steps**0.5 - 0.9
    below = [steps - reach * i / TARGETS_BELOW for i in range(TARGETS_BELOW, 0, -1)]
    above = [steps + min(reach, 2.0) * i / TARGETS_ABOVE for i in range(TARGETS_ABOVE + 1)]
    return [spacing * (target if end > 0 else -target) for target in below + above]


def search_symmetric(
    x: Tensor,
    w: Tensor,
    span: tuple[int, int],
    dim: int,
    grid: Grid | None = None,
    *,
    positive: bool = False,
) -> Tensor:
    """Return the step s along ``dim``, kept with size 1, that minimizes sum(w (x - s q)^2), q integers within ``span``.

    Of several inverse steps it takes the one whose q lower the error most: for given q the best s is
    sum(w x q) / sum(w q^2), and lowers the error by sum(w x q)^2 / sum(w q^2). Integers are those of ``grid``, by
    default all of ``span``. With ``positive`` only steps above 0 are tried.
    """
    low, high = span
    ends = [high] if low in (0, -high) else [low, high]
    if positive:
        ends = [abs(end) for end in ends]
    spacing = 1.0 if grid is None else grid.spacing
    tried = tuple(chain.from_iterable(targets(end, spacing) for end in ends))
    if (kernels := kernels_for("searches", x)) is not None:
        return kernels.search_symmetric(x, w, dim, tried, span, grid and grid.levels, positive=positive)
    largest, smallest = x.amax(dim, keepdim=True), x.amin(dim, keepdim=True)
    inverse_peak = safe_inverse(torch.where(largest >= -smallest, largest, smallest))
    if positive:
        inverse_peak = inverse_peak.abs()
    wx = w * x
    best_gain = torch.zeros_like(inverse_peak)
    best_step = torch.zeros_like(inverse_peak)
    for target in tried:
        scaled = x * (inverse_peak * target)
        q = grid.nearest(scaled) if grid is not None else scaled.round_().clamp_(low, high)
        projection = (wx * q).sum(dim, keepdim=True)
        step = projection / q.square_().mul_(w).sum(dim, keepdim=True).clamp_(min=TINY)
        gain = projection * step
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_step = torch.where(better, step, best_step)
    return best_step


def search_affine(x: Tensor, w: Tensor, high: int, nonnegative_offset: bool) -> tuple[Tensor, Tensor]:
    """Return the step and offset, (B, S, 1, N) each, for x ~ step * q - offset with q in 0..high.

    For given q both follow from the weighted 2 x 2 normal equations, with x centred on its weighted mean to keep
    float32 accurate.
    """
    if (kernels := kernels_for("searches", x)) is not None:
        return kernels.search_affine(x, w, tuple(targets(high)), high, nonnegative=nonnegative_offset)
    floor = x.amin(T_DIM, keepdim=True)
    if nonnegative_offset:
        floor = floor.clamp(max=0)
    width = x.amax(T_DIM, keepdim=True) - floor
    total = w.sum(T_DIM, keepdim=True)
    mean = (w * x).sum(T_DIM, keepdim=True) / total
    wx = w * (x - mean)  # sums to zero
    inverse_width = safe_inverse(width)
    shifted = x - floor
    best_gain = torch.full_like(mean, -torch.inf)
    best_step = torch.zeros_like(mean)
    best_offset = -floor if nonnegative_offset else -mean
    for target in targets(high):
        q = (shifted * (inverse_width * target)).round_().clamp_(0, high)
        step, offset, gain = _affine_fit(q, wx, w, total, mean, nonnegative_offset)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_step = torch.where(better, step, best_step)
        best_offset = torch.where(better, offset, best_offset)
    return best_step, best_offset


def _affine_fit(
    q: Tensor, wx: Tensor, w: Tensor, total: Tensor, mean: Tensor, nonnegative_offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best step and offset of each sub-block for given integers, and what they gain in weighted error.

    Arguments: q (B, S, T, N) integers, wx = w * (x - mean) (B, S, T, N), w (B, S, T, 1), and by sub-block the sum
    ``total`` of w and the weighted ``mean`` of x. All three results are (B, S, 1, N).
    """
    covariance = (wx * q).sum(T_DIM, keepdim=True)
    wq = q * w
    q_mean = wq.sum(T_DIM, keepdim=True) / total
    square = wq.mul_(q).sum(T_DIM, keepdim=True)
    variance = square - total * q_mean.square()
    step = torch.where(variance > FLAT * square, covariance / variance, 0.0)
    offset = step * q_mean - mean
    gain = covariance * step
    if nonnegative_offset:
        through_zero = offset < 0  # if so, the best line passes through zero
        free_projection = covariance + mean * total * q_mean
        zero_step = free_projection / square.clamp_(min=TINY)
        step = torch.where(through_zero, zero_step, step)
        gain = torch.where(through_zero, free_projection * zero_step - total * mean.square(), gain)
        offset = offset.clamp_(min=0)
    return step, offset, gain
