"""This module fits scales of block formats to minimize the importance-weighted error sum(w * (x - decoded)^2).

It has three stages: (1) for each sub-block alone, try several inverse steps, each with its closed-form step and offset;
(2) choose fp16 d and dmin and integer codes for the whole block; (3) coordinate descent on the true error: neighbouring
codes, then d and dmin in closed form. Stages 1 and 2 follow ``make_qx_quants``, ``make_qkx3_quants`` and
``make_qp_quants`` of ggml-quants.c, except that ggml weights by importance * sqrt(sigma^2 + x^2), never tries the other
sign of a step, and has no stage 3.

Shapes are as in quantizers.formats.grids: x (B, S, T, N), w (B, S, T, 1); values of a sub-block (B, S, 1, N), of a
block (B, 1, 1, N).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from quantizers.formats.grids import Grid, Scales, nearest_fp16, round_to_grid, safe_inverse
from quantizers.kernels.choice import kernels_for
from quantizers.rounding.step_search import FLAT, S_DIM, T_DIM, search_affine, search_symmetric

ROUNDS = 2


def fit(grid: Grid, x: Tensor, w: Tensor) -> Scales:
    """Return the scales for finite weights x (B, S, T, N) and positive importance w (B, S, T, 1)."""
    if grid.has_offset:
        step, offset = search_affine(x, w, grid.high, nonnegative_offset=grid.is_nested)
    else:
        positive = grid.scale_codes[0] == 0
        step = search_symmetric(x, w, (grid.low, grid.high), T_DIM, grid, positive=positive)
        offset = torch.zeros_like(step)
    scales = _snap(grid, x, w, step, offset)
    error = _error(grid, x, w, scales)
    for _ in range(ROUNDS):
        if grid.is_nested:
            scales, error = _try_neighbours(grid, x, w, scales, error)
        scales, error = _refit(grid, x, w, scales, error)
    return scales


def _snap(grid: Grid, x: Tensor, w: Tensor, step: Tensor, offset: Tensor) -> Scales:
    """Return storable scales near the ideal ``step``, weighted by sum(w q^2), and ``offset``, weighted by sum(w)."""
    if not grid.is_nested:
        d = nearest_fp16(step)
        ones = torch.ones_like(d)
        return Scales(d, nearest_fp16(-offset), ones, ones * grid.min_codes[0])
    if (kernels := kernels_for("searches", x)) is not None:
        square = kernels.sums(grid, x, w, step, offset)[2]
    else:
        q = round_to_grid(grid, x, offset, safe_inverse(step))
        square = q.square_().mul_(w).sum(T_DIM, keepdim=True)
    d, scale = _snap_codes(step, square, grid.scale_codes)
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
    if (kernels := kernels_for("searches", x)) is not None:
        found: Tensor = kernels.sums(grid, x, w, step, offset)[0]
        return found
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
            if (kernels := kernels_for("searches", x)) is not None:
                lean = kernels.sums(grid, x, w, step, scales.offset)[1]
            else:
                q = round_to_grid(grid, x, scales.offset, safe_inverse(step))
                lean = (q.mul_(step).sub_(x).mul_(w)).sum(T_DIM, keepdim=True)
            ideal = lean / w.sum(T_DIM, keepdim=True)
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
    if (kernels := kernels_for("searches", x)) is not None:
        qq, q1, xq = kernels.sums(grid, x, w, scales.step, scales.offset)[2:]
    else:
        q = round_to_grid(grid, x, scales.offset, safe_inverse(scales.step))
        wq = w * q
        xq, qq, q1 = (t.sum(T_DIM, keepdim=True) for t in (wq * x, wq * q, wq))
    xq, qq = xq * scales.scale, qq * scales.scale.square()
    one_q = q1 * scales.scale * scales.min
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
