"""This module fits scales of block formats to minimize the importance-weighted error sum(w * (x - decoded)^2).

It has three stages: (1) for each sub-block alone, try several inverse steps, each with its closed-form step and offset;
(2) choose fp16 d and dmin and integer codes for the whole block; (3) coordinate descent on the true error: neighbouring
codes, then d and dmin in closed form. Stages 1 and 2 follow ``make_qx_quants``, ``make_qkx3_quants`` and
``make_qp_quants`` of ggml-quants.c, except that ggml weights by importance * sqrt(sigma^2 + x^2), never tries the other
sign of a step, and has no stage 3.

Shapes are as in quantizers.formats.grids: x (B, S, T, N), w (B, S, T, 1); values of a sub-block (B, S, 1, N), of a
block (B, 1, 1, N).
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from quantizers.formats.grids import Grid, Scales, nearest_fp16, round_to_grid, safe_inverse

T_DIM, S_DIM = 2, 1
TARGETS_BELOW, TARGETS_ABOVE = 10, 6  # candidates below and above each end of the integer range
ROUNDS = 2
TINY = 1e-30  # keeps 0 / 0 at 0
FLAT = 1e-6  # integers whose variance is less, relative to their sum of squares, are equal up to float32 rounding


def fit(grid: Grid, x: Tensor, w: Tensor) -> Scales:
    """Return the scales for finite weights x (B, S, T, N) and positive importance w (B, S, T, 1)."""
    if grid.has_offset:
        step, offset = search_affine(x, w, grid.high, nonnegative_offset=grid.is_nested)
    else:
        positive = grid.scale_codes[0] == 0
        step = search_symmetric(x, w, (grid.low, grid.high), T_DIM, grid.nearest, grid.spacing, positive=positive)
        offset = torch.zeros_like(step)
    scales = _snap(grid, x, w, step, offset)
    error = _error(grid, x, w, scales)
    for _ in range(ROUNDS):
        if grid.is_nested:
            scales, error = _try_neighbours(grid, x, w, scales, error)
        scales, error = _refit(grid, x, w, scales, error)
    return scales


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
    nearest: Callable[[Tensor], Tensor] | None = None,
    spacing: float = 1.0,
    *,
    positive: bool = False,
) -> Tensor:
    """Return the step s along ``dim``, kept with size 1, that minimizes sum(w (x - s q)^2), q integers within ``span``.

    Of several inverse steps it takes the one whose q lower the error most: for given q the best s is
    sum(w x q) / sum(w q^2), and lowers the error by sum(w x q)^2 / sum(w q^2). ``nearest`` rounds in place, by default
    to all integers of ``span``; they lie ``spacing`` apart. With ``positive`` only steps above 0 are tried.
    """
    low, high = span
    largest, smallest = x.amax(dim, keepdim=True), x.amin(dim, keepdim=True)
    inverse_peak = safe_inverse(torch.where(largest >= -smallest, largest, smallest))
    wx = w * x
    best_gain = torch.zeros_like(inverse_peak)
    best_step = torch.zeros_like(inverse_peak)
    ends = [high] if low in (0, -high) else [low, high]
    if positive:
        inverse_peak, ends = inverse_peak.abs(), [abs(end) for end in ends]
    for target in chain.from_iterable(targets(end, spacing) for end in ends):
        scaled = x * (inverse_peak * target)
        q = nearest(scaled) if nearest else scaled.round_().clamp_(low, high)
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


def _snap(grid: Grid, x: Tensor, w: Tensor, step: Tensor, offset: Tensor) -> Scales:
    """Return storable scales near the ideal ``step``, weighted by sum(w q^2), and ``offset``, weighted by sum(w)."""
    if not grid.is_nested:
        d = nearest_fp16(step)
        ones = torch.ones_like(d)
        return Scales(d, nearest_fp16(-offset), ones, ones * grid.min_codes[0])
    q = round_to_grid(grid, x, offset, safe_inverse(step))
    d, scale = _snap_codes(step, q.square_().mul_(w).sum(T_DIM, keepdim=True), grid.scale_codes)
    if not grid.has_offset:
        return Scales(d, torch.zeros_like(d), scale, torch.zeros_like(scale))
    total = w.sum(T_DIM, keepdim=True).expand_as(offset)
    dmin, minimum = _snap_codes(offset, total, grid.min_codes)
    return Scales(d, dmin, scale, minimum)


def _snap_codes(values: Tensor, weight: Tensor, codes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    unit = nearest_fp16(search_symmetric(values, weight, codes, S_DIM))
    return unit, (values * safe_inverse(unit)).round_().clamp_(*codes)


def _error(grid: Grid, x: Tensor, w: Tensor, scales: Scales) -> Tensor:
    """Return the weighted squared error of each sub-block, (B, S, 1, N), of the weights as they will be decoded."""
    step, offset = scales.step, scales.offset
    residual = round_to_grid(grid, x, offset, safe_inverse(step)).mul_(step)
    if grid.has_offset:
        residual.sub_(offset)
    return residual.sub_(x).square_().mul_(w).sum(T_DIM, keepdim=True)


def _neighbours(grid: Grid, x: Tensor, w: Tensor, scales: Scales) -> Iterator[Scales]:
    """Yield scales with neighbouring codes; where the step changes, the offset is refitted to it."""
    for delta in (-1, 1):
        scale = (scales.scale + delta).clamp_(*grid.scale_codes)
        minimum = scales.min
        if grid.has_offset:
            step = scales.d * scale
            q = round_to_grid(grid, x, scales.offset, safe_inverse(step))
            ideal = (q.mul_(step).sub_(x).mul_(w)).sum(T_DIM, keepdim=True) / w.sum(T_DIM, keepdim=True)
            minimum = (ideal * safe_inverse(scales.dmin)).round_().clamp_(*grid.min_codes)
        yield Scales(scales.d, scales.dmin, scale, minimum)
    if grid.has_offset:
        for delta in (-1, 1):
            yield Scales(scales.d, scales.dmin, scales.scale, (scales.min + delta).clamp_(*grid.min_codes))


def _try_neighbours(grid: Grid, x: Tensor, w: Tensor, scales: Scales, error: Tensor) -> tuple[Scales, Tensor]:
    best = scales
    for candidate in _neighbours(grid, x, w, scales):
        candidate_error = _error(grid, x, w, candidate)
        better = candidate_error < error
        best = Scales(
            best.d,
            best.dmin,
            torch.where(better, candidate.scale, best.scale),
            torch.where(better, candidate.min, best.min),
        )
        error = torch.where(better, candidate_error, error)
    return best, error


class _Sums(NamedTuple):
    """Holds weighted sums over a block of products of a = scale * q, b = min and x, (B, 1, 1, N) each."""

    aa: Tensor
    ab: Tensor
    bb: Tensor
    ax: Tensor
    bx: Tensor


def _sums(grid: Grid, x: Tensor, w: Tensor, scales: Scales) -> _Sums:
    q = round_to_grid(grid, x, scales.offset, safe_inverse(scales.step))
    wq = w * q
    xq = (wq * x).sum(T_DIM, keepdim=True) * scales.scale
    qq = wq.mul(q).sum(T_DIM, keepdim=True) * scales.scale.square()
    one_q = wq.sum(T_DIM, keepdim=True) * scales.scale * scales.min
    one = w.sum(T_DIM, keepdim=True) * scales.min.square()
    one_x = (w * x).sum(T_DIM, keepdim=True) * scales.min
    return _Sums(*(s.sum(S_DIM, keepdim=True) for s in (qq, one_q, one, xq, one_x)))


def _refit(grid: Grid, x: Tensor, w: Tensor, scales: Scales, error: Tensor) -> tuple[Scales, Tensor]:
    """Return scales with d and dmin in closed form for the current integers and codes, in blocks that gain by it."""
    s = _sums(grid, x, w, scales)
    determinant = s.aa * s.bb - s.ab.square()
    inverse = torch.where(determinant > FLAT * s.aa * s.bb, safe_inverse(determinant), 0.0)
    d = torch.where(
        inverse > 0, (s.bb * s.ax - s.ab * s.bx) * inverse, (s.ax + scales.dmin * s.ab) * safe_inverse(s.aa)
    )
    dmin = torch.where(inverse > 0, (s.ab * s.ax - s.aa * s.bx) * inverse, scales.dmin)
    if grid.is_nested:
        dmin = dmin.clamp_(min=0)
    candidate = Scales(nearest_fp16(d), nearest_fp16(dmin), scales.scale, scales.min)
    candidate_error = _error(grid, x, w, candidate)
    better = candidate_error.sum(S_DIM, keepdim=True) < error.sum(S_DIM, keepdim=True)
    scales = Scales(
        torch.where(better, candidate.d, scales.d),
        torch.where(better, candidate.dmin, scales.dmin),
        scales.scale,
        scales.min,
    )
    return scales, torch.where(better, candidate_error, error)
