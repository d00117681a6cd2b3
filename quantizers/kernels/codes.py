"""Triton kernels that choose the integer scales and mins of a block, one sub-block after another.

They do what ``coordinate_descent.Block.adjust_codes`` does with some 30 kernels a sub-block. How a change of one code
moves the gains of all others depends on integers and H alone: so the products of all pairs of sub-blocks come first,
and the codes of a row then follow from a few numbers. Sums run in another order than torch's. This module is imported
only where Triton is there (``quantizers.kernels.choice``).

Legend: S sub-blocks of T weights, K = S * T, N rows, last and contiguous; p = q_s, the integers of a sub-block, or 1.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from quantizers.formats.codebooks import CodebookGrid
from quantizers.formats.grids import Grid, safe_inverse
from quantizers.kernels.panels import _nearest

ROWS = 32  # of a program of one warp: every thread holds one row's sub-block


@triton.jit
def _pairs_kernel(H, stride_h, q, pairs, leans, rows, S: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write q_u^T H_us q_s to ``pairs`` and 1^T H_us q_s to ``leans``, both (S, S, N) by s and u."""
    n = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    there = n < rows
    s, u = tl.program_id(0), tl.program_id(1)
    t = tl.arange(0, T)
    product = tl.zeros((T, BLOCK), tl.float32)
    for j in range(T):
        column = tl.load(H + (s * T + j) * stride_h + u * T + t)  # H is symmetric
        row = tl.load(q + (s * T + j) * rows + n, there, 0.0)
        product += column[:, None] * row[None, :]
    other = tl.load(q + (u * T + t)[:, None] * rows + n[None, :], there[None, :], 0.0)
    here = (s * S + u) * rows + n
    tl.store(pairs + here, tl.sum(product * other, 0), there)
    tl.store(leans + here, tl.sum(product, 0), there)


@triton.jit
def _codes_kernel(  # type: ignore[no-untyped-def]
    pairs, leans, plain, gains, sums, d, inverse_d, dmin, inverse_dmin, scale, minimum,
    first, unit, low, high, low_min, high_min, rows,
    S: tl.constexpr, BLOCK: tl.constexpr, HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    """Update ``scale`` and ``minimum`` (S, N); ``gains`` are q_s^T G_s and ``sums`` 1^T G_s, ``plain`` 1^T H_us 1."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = n < rows
    every = tl.arange(0, S)
    table = every[:, None] * rows + n[None, :]
    gain = tl.load(gains + table, there[None, :], 0.0)
    total = tl.load(sums + table, there[None, :], 0.0)
    step, inverse_step = tl.load(d + n, there, 0.0), tl.load(inverse_d + n, there, 0.0)
    offset, inverse_offset = tl.load(dmin + n, there, 0.0), tl.load(inverse_dmin + n, there, 0.0)
    for s in range(S):
        mine = every[:, None] == s
        square = tl.load(pairs + (s * S + s) * rows + n, there, 1.0)
        old = tl.load(scale + s * rows + n, there, 0.0)
        wanted = old + tl.div_rn(tl.sum(tl.where(mine, gain, 0.0), 0), tl.maximum(square, 1e-30)) * inverse_step
        code = _nearest(tl.div_rn(wanted - first, unit), low, high, scale, False) * unit + first
        change = (code - old) * step
        tl.store(scale + s * rows + n, code, there)
        gain -= tl.load(pairs + s * S * rows + table, there[None, :], 0.0) * change[None, :]
        total -= tl.load(leans + s * S * rows + table, there[None, :], 0.0) * change[None, :]
        if HAS_OFFSET:
            old = tl.load(minimum + s * rows + n, there, 0.0)
            lean = tl.sum(tl.where(mine, total, 0.0), 0)
            wanted = old - tl.div_rn(lean, tl.maximum(tl.load(plain + s * S + s), 1e-30)) * inverse_offset
            code = _nearest(wanted, low_min, high_min, minimum, False)
            change = (old - code) * offset
            tl.store(minimum + s * rows + n, code, there)
            across = leans + every[:, None] * S * rows + s * rows + n[None, :]
            gain -= tl.load(across, there[None, :], 0.0) * change[None, :]
            total -= tl.load(plain + s * S + every)[:, None] * change[None, :]


def adjust(
    grid: Grid, H: Tensor, G: Tensor, q: Tensor, units: tuple[Tensor, Tensor], codes: tuple[Tensor, Tensor]
) -> Tensor:
    """Update ``codes``, scale and min (S, N), in place; return the change of the decoded weights (K, N).

    H is (K, K), G and the integers q (K, N), ``units`` d and dmin (N,).
    """
    S, T, N = grid.sub_blocks, grid.width, q.shape[1]
    pairs, leans = q.new_empty(2, S, S, N)
    blocks = triton.cdiv(N, ROWS)
    _pairs_kernel[(S, S, blocks)](H, H.stride(0), q, pairs, leans, N, S=S, T=T, BLOCK=ROWS, num_warps=1)
    plain = H.reshape(S, T, S, T).sum((1, 3))
    parts = G.view(S, T, N)
    before = [code.clone() for code in codes]
    first, unit, low, high = _spacing(grid)
    d, dmin = units
    _codes_kernel[(blocks,)](
        pairs, leans, plain, (parts * q.view(S, T, N)).sum(1), parts.sum(1), d, safe_inverse(d), dmin,
        safe_inverse(dmin), *codes, first, unit, low, high, *map(float, grid.min_codes), N,
        S=S, BLOCK=ROWS, HAS_OFFSET=grid.has_offset, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    change = ((codes[0] - before[0]) * d)[:, None] * q.view(S, T, N)
    if grid.has_offset:
        change -= ((codes[1] - before[1]) * dmin)[:, None]
    return change.view(S * T, N)


def _spacing(grid: Grid) -> Sequence[float]:
    """Return the first scale code, the distance of two, and the least and most of it that a code is from the first."""
    if isinstance(grid, CodebookGrid):
        return grid.unit, 2 * grid.unit, 0.0, 15.0
    return 0.0, 1.0, *map(float, grid.scale_codes)
