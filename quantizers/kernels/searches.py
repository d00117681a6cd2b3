"""Triton kernels of the scale search: all candidates of a sub-block while its weights are in registers.

They compute what ``scale_search`` does with some 10 kernels a candidate, each of which reads and writes all weights.
Sums over a sub-block run in another order than torch's. This module is imported only where Triton is there
(``quantizers.kernels.choice``).

Legend: O sub-blocks of T weights, N rows, last and contiguous; x and results are contiguous, w need not be.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantizers.formats.grids import Grid, nearest_level
from quantizers.kernels.panels import _nearest

ROWS = 32  # of a program of one warp: every thread holds one row's sub-block


@triton.jit
def _safe_inverse(x):  # type: ignore[no-untyped-def]
    inverse = tl.div_rn(1.0, x)
    return tl.where(tl.abs(inverse) < float("inf"), inverse, 0.0)


@triton.jit
def _symmetric_kernel(  # type: ignore[no-untyped-def]
    x, w, w_outer, w_inner, w_row, steps, targets, candidates, low, high, table, rows,
    T: tl.constexpr, BLOCK: tl.constexpr, HAS_TABLE: tl.constexpr, POSITIVE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = n < rows
    outer = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, T)
    values = tl.load(x + (outer * T + t)[:, None] * rows + n[None, :], there[None, :], 0.0)
    weight = tl.load(w + outer * w_outer + t[:, None] * w_inner + n[None, :] * w_row, there[None, :], 0.0)
    weighted = weight * values
    largest, smallest = tl.max(values, 0), tl.min(values, 0)
    inverse_peak = _safe_inverse(tl.where(largest >= -smallest, largest, smallest))
    if POSITIVE:
        inverse_peak = tl.abs(inverse_peak)
    best_gain = tl.zeros((BLOCK,), tl.float32)
    best_step = tl.zeros((BLOCK,), tl.float32)
    for i in range(candidates):
        factor = inverse_peak * tl.load(targets + i)
        q = _nearest(values * factor[None, :], low, high, table, HAS_TABLE)
        projection = tl.sum(weighted * q, 0)
        step = tl.div_rn(projection, tl.maximum(tl.sum(q * q * weight, 0), 1e-30))
        gain = projection * step
        better = gain > best_gain
        best_gain = tl.where(better, gain, best_gain)
        best_step = tl.where(better, step, best_step)
    tl.store(steps + outer * rows + n, best_step, there)


@triton.jit
def _affine_kernel(  # type: ignore[no-untyped-def]
    x, w, steps, offsets, targets, candidates, high, rows,
    T: tl.constexpr, BLOCK: tl.constexpr, NONNEGATIVE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = n < rows
    outer = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, T)
    values = tl.load(x + (outer * T + t)[:, None] * rows + n[None, :], there[None, :], 0.0)
    weight = tl.load(w + outer * T + t)[:, None]
    floor = tl.min(values, 0)
    if NONNEGATIVE:
        floor = tl.minimum(floor, 0.0)
    inverse_width = _safe_inverse(tl.max(values, 0) - floor)
    total = tl.sum(weight, 0)
    mean = tl.div_rn(tl.sum(weight * values, 0), total + tl.zeros((BLOCK,), tl.float32))
    weighted = weight * (values - mean[None, :])
    shifted = values - floor[None, :]
    best_gain = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_step = tl.zeros((BLOCK,), tl.float32)
    best_offset = -floor if NONNEGATIVE else -mean
    for i in range(candidates):
        factor = inverse_width * tl.load(targets + i)
        q = _nearest(shifted * factor[None, :], 0.0, high, x, False)
        covariance = tl.sum(weighted * q, 0)
        wq = q * weight
        q_mean = tl.div_rn(tl.sum(wq, 0), total + tl.zeros((BLOCK,), tl.float32))
        square = tl.sum(wq * q, 0)
        variance = square - total * (q_mean * q_mean)
        step = tl.where(variance > 1e-6 * square, tl.div_rn(covariance, variance), 0.0)
        offset = step * q_mean - mean
        gain = covariance * step
        if NONNEGATIVE:
            projection = covariance + mean * total * q_mean
            through_zero = tl.div_rn(projection, tl.maximum(square, 1e-30))
            gain = tl.where(offset < 0, projection * through_zero - total * (mean * mean), gain)
            step = tl.where(offset < 0, through_zero, step)
            offset = tl.maximum(offset, 0.0)
        better = gain > best_gain
        best_gain = tl.where(better, gain, best_gain)
        best_step = tl.where(better, step, best_step)
        best_offset = tl.where(better, offset, best_offset)
    tl.store(steps + outer * rows + n, best_step, there)
    tl.store(offsets + outer * rows + n, best_offset, there)


@triton.jit
def _sums_kernel(  # type: ignore[no-untyped-def]
    x, w, step, offset, sums, size, low, high, table, rows,
    T: tl.constexpr, BLOCK: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = n < rows
    outer = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, T)
    here = outer * rows + n
    values = tl.load(x + (outer * T + t)[:, None] * rows + n[None, :], there[None, :], 0.0)
    weight = tl.load(w + outer * T + t)[:, None]
    scale = tl.load(step + here, there, 0.0)
    shift = tl.load(offset + here, there, 0.0)
    q = _nearest((values + shift[None, :]) * _safe_inverse(scale)[None, :], low, high, table, HAS_TABLE)
    difference = q * scale[None, :] - values
    residual = q * scale[None, :] - shift[None, :] - values
    wq = weight * q
    tl.store(sums + here, tl.sum(residual * residual * weight, 0), there)
    tl.store(sums + size + here, tl.sum(difference * weight, 0), there)
    tl.store(sums + 2 * size + here, tl.sum(wq * q, 0), there)
    tl.store(sums + 3 * size + here, tl.sum(wq, 0), there)
    tl.store(sums + 4 * size + here, tl.sum(wq * values, 0), there)


@cache
def _floats(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _launch(outer: int, rows: int) -> tuple[int, int]:
    return outer, triton.cdiv(rows, ROWS)


def search_symmetric(
    x: Tensor, w: Tensor, dim: int, targets: tuple[float, ...], span: tuple[int, int],
    levels: tuple[int, ...] | None, *, positive: bool,
) -> Tensor:  # fmt: skip
    """Return the steps along ``dim``, 1 or 2, of x (B, S, T, N), kept with size 1, as ``scale_search`` does."""
    steps = torch.empty_like(x[:, :1] if dim == 1 else x[:, :, :1], memory_format=torch.contiguous_format)
    N, T = x.shape[3], x.shape[dim]
    w_outer = w.stride(0) if dim == 1 else w.stride(1)
    table = x if levels is None else nearest_level(levels, x.device)
    _symmetric_kernel[_launch(steps.numel() // N, N)](
        x, w, w_outer, w.stride(dim), w.stride(3) if w.shape[3] > 1 else 0, steps, _floats(targets, x.device),
        len(targets), float(span[0]), float(span[1]), table, N,
        T=T, BLOCK=ROWS, HAS_TABLE=levels is not None, POSITIVE=positive, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return steps


def search_affine(
    x: Tensor, w: Tensor, targets: tuple[float, ...], high: int, *, nonnegative: bool
) -> tuple[Tensor, Tensor]:
    """Return steps and offsets (B, S, 1, N) of x (B, S, T, N) under w (B, S, T, 1), as ``scale_search`` does."""
    B, S, T, N = x.shape
    steps, offsets = x.new_empty(2, B, S, 1, N)
    _affine_kernel[_launch(B * S, N)](
        x, w, steps, offsets, _floats(targets, x.device), len(targets), float(high), N,
        T=T, BLOCK=ROWS, NONNEGATIVE=nonnegative, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return steps, offsets


def sums(grid: Grid, x: Tensor, w: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """Return (5, B, S, 1, N): sums over a sub-block of w times (step q - offset - x)^2, step q - x, q^2, q and q x.

    q are the storable integers nearest to (x + offset) / step, for x (B, S, T, N) and w (B, S, T, 1).
    """
    B, S, T, N = x.shape
    found = x.new_empty(5, B, S, 1, N)
    table = x if grid.levels is None else nearest_level(grid.levels, x.device)
    _sums_kernel[_launch(B * S, N)](
        x, w, step, offset, found, B * S * N, float(grid.low), float(grid.high), table, N,
        T=T, BLOCK=ROWS, HAS_TABLE=grid.levels is not None, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return found
