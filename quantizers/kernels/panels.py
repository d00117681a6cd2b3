"""Triton kernels that round a panel of columns with error feedback, a few rows in each program.

They do what ``column_loop._round_panel`` and ``coordinate_descent.Block.adjust_integers`` do with some 10 kernels a
column, in the same order of operations and without fused multiply-adds, so that they round as those do. The panel of
a program's rows stays in registers. This module is imported only where Triton is there (``quantizers.kernels.choice``).

Legend: PANEL columns, N rows, last and contiguous.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from quantizers.formats.grids import Grid, nearest_level

ROWS = 32  # of a program of one warp: every thread holds one row's panel
WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float32 added to it is rounded to an integer, halves to even


@triton.jit
def _nearest(x, low, high, table, HAS_TABLE: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.minimum(tl.maximum(x, low), high)
    if HAS_TABLE:
        return tl.load(table + (tl.floor(x * 2) - 2 * low).to(tl.int32))
    return (x + WHOLE) - WHOLE


@triton.jit
def _round_kernel(  # type: ignore[no-untyped-def]
    W, stride, U, stride_u, next_u, step, inverse, offset, stride_s, integers, errors, stride_o, table, low, high, rows,
    PANEL: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = n < rows
    columns = tl.arange(0, PANEL)
    panel = tl.load(W + columns[:, None] * stride + n[None, :], there[None, :], 0.0)
    for j in range(PANEL):
        group = j // WIDTH * stride_s + n
        scale = tl.load(step + group, there, 0.0)
        shift = tl.load(offset + group, there, 0.0)
        w = tl.sum(tl.where(columns[:, None] == j, panel, 0.0), 0)
        q = _nearest((w + shift) * tl.load(inverse + group, there, 0.0), low, high, table, HAS_TABLE)
        error = tl.div_rn(q * scale - shift - w, -tl.load(U + j * (stride_u + next_u)))
        later = tl.load(U + j * stride_u + columns * next_u, columns > j, 0.0)
        panel = panel - later[:, None] * error[None, :]
        tl.store(integers + j * stride_o + n, q.to(tl.int8), there)
        tl.store(errors + j * stride_o + n, error, there)


@triton.jit
def _descend_kernel(  # type: ignore[no-untyped-def]
    G, H, stride_h, next_h, q, step, inverse, change, stride, table, low, high, rows,
    PANEL: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = n < rows
    columns = tl.arange(0, PANEL)
    panel = tl.load(G + columns[:, None] * stride + n[None, :], there[None, :], 0.0)
    for j in range(PANEL):
        group = j // WIDTH * stride + n
        here = j * stride + n
        old = tl.load(q + here, there, 0.0)
        g = tl.sum(tl.where(columns[:, None] == j, panel, 0.0), 0)
        wanted = tl.div_rn(g * tl.load(inverse + group, there, 0.0), tl.load(H + j * (stride_h + next_h))) + old
        new = _nearest(wanted, low, high, table, HAS_TABLE)
        moved = (new - old) * tl.load(step + group, there, 0.0)
        later = tl.load(H + j * stride_h + columns * next_h, columns > j, 0.0)
        panel = panel - later[:, None] * moved[None, :]
        tl.store(q + here, new, there)
        tl.store(change + here, moved, there)


def round_panel(
    W: Tensor, U: Tensor, scales: Sequence[Tensor], width: int, grid: Grid, integers: Tensor, errors: Tensor
) -> None:
    """Write ``integers`` int8 and ``errors`` / U_jj, (PANEL, N) each, for W (PANEL, N), which stays as it is.

    ``scales`` are step, its inverse and offset, a row for each ``width`` columns. U is (PANEL, PANEL).
    """
    step, inverse, offset = scales
    N = W.shape[1]
    table = W if grid.levels is None else nearest_level(grid.levels, W.device)
    _round_kernel[(triton.cdiv(N, ROWS),)](
        W, W.stride(0), U, *U.stride(), step, inverse, offset, step.stride(0), integers, errors, errors.stride(0),
        table, float(grid.low), float(grid.high), N,
        PANEL=len(W), WIDTH=width, BLOCK=ROWS, HAS_TABLE=grid.levels is not None, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def descend_panel(
    G: Tensor, H: Tensor, q: Tensor, scales: Sequence[Tensor], width: int, grid: Grid, change: Tensor
) -> None:
    """Update ``q`` (PANEL, N) in place, and write ``change``, that of the decoded weights, for G (PANEL, N).

    ``scales`` are step and inverse, a row for each ``width`` columns. H is (PANEL, PANEL).
    """
    step, inverse = scales
    N = G.shape[1]
    table = G if grid.levels is None else nearest_level(grid.levels, G.device)
    _descend_kernel[(triton.cdiv(N, ROWS),)](
        G, H, *H.stride(), q, step, inverse, change, G.stride(0), table, float(grid.low), float(grid.high), N,
        PANEL=len(G), WIDTH=width, BLOCK=ROWS, HAS_TABLE=grid.levels is not None, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
