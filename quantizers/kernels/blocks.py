"""A Triton kernel of coordinate descent on blocks of 32 weights with one step: all blocks of a super-block at once.

It does what ``coordinate_descent.Block`` does with some 50 kernels a block: d and dmin together, then the integers in
turn, then what later blocks see of it. Sums run in another order than torch's. This module is imported only where
Triton is there (``quantizers.kernels.choice``).

Legend: n blocks of T weights, K = n * T, N rows, last and contiguous; a program holds a block of a few rows.
"""

import triton
import triton.language as tl
from torch import Tensor

from quantizers.formats.grids import Grid, nearest_level
from quantizers.kernels.panels import _nearest
from quantizers.kernels.searches import _safe_inverse

ROWS = 32  # of a program of one warp: every thread holds one row's block
MOST_FP16 = tl.constexpr(65504.0)


@triton.jit
def _fp16(x):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(x, -MOST_FP16), MOST_FP16).to(tl.float16).to(tl.float32)


@triton.jit
def _blocks_kernel(  # type: ignore[no-untyped-def]
    H, stride_h, G, D, q, d, dmin, table, low, high, degenerate, rows,
    BLOCKS: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = n < rows
    t = tl.arange(0, T)
    for b in range(BLOCKS):
        own = (b * T + t)[:, None] * rows + n[None, :]
        corner = H + b * T * (stride_h + 1)
        gain = tl.load(G + own, there[None, :], 0.0)
        # d and dmin from their normal equations, in the directions q and 1
        product = tl.zeros((T, BLOCK), tl.float32)
        ones = tl.zeros((T,), tl.float32)
        for j in range(T):
            column = tl.load(corner + j * stride_h + t)  # H is symmetric
            product += column[:, None] * tl.load(q + (b * T + j) * rows + n, there, 0.0)[None, :]
            ones += column
        integers = tl.load(q + own, there[None, :], 0.0)
        aa, ag = tl.sum(integers * product, 0), tl.sum(integers * gain, 0)
        old_d, old_dmin = tl.load(d + b * rows + n, there, 0.0), tl.load(dmin + b * rows + n, there, 0.0)
        d_change = tl.div_rn(ag, tl.maximum(aa, 1e-30))
        new_dmin = old_dmin
        if HAS_OFFSET:
            mm, am, mg = tl.sum(ones, 0), tl.sum(product, 0), tl.sum(gain, 0)
            determinant = aa * mm - am * am
            solvable = determinant > degenerate * aa * mm
            safe = tl.where(solvable, determinant, 1.0)
            d_change = tl.where(solvable, tl.div_rn(mm * ag - am * mg, safe), d_change)
            new_dmin = _fp16(old_dmin + tl.where(solvable, tl.div_rn(aa * mg - am * ag, safe), 0.0))
        new_d = _fp16(old_d + d_change)
        change = integers * (new_d - old_d)[None, :]
        gain -= product * (new_d - old_d)[None, :]
        if HAS_OFFSET:
            change += (new_dmin - old_dmin)[None, :]
            gain -= ones[:, None] * (new_dmin - old_dmin)[None, :]
        tl.store(d + b * rows + n, new_d, there)
        tl.store(dmin + b * rows + n, new_dmin, there)
        inverse = _safe_inverse(new_d)
        for j in range(T):
            mine = t[:, None] == j
            old = tl.sum(tl.where(mine, integers, 0.0), 0)
            g = tl.sum(tl.where(mine, gain, 0.0), 0)
            wanted = tl.div_rn(g * inverse, tl.load(corner + j * (stride_h + 1))) + old
            new = _nearest(wanted, low, high, table, HAS_TABLE)
            moved = (new - old) * new_d
            integers = tl.where(mine, new[None, :], integers)
            change += tl.where(mine, moved[None, :], 0.0)
            gain -= tl.load(corner + j * stride_h + t)[:, None] * moved[None, :]
        tl.store(q + own, integers, there[None, :])
        tl.store(D + own, tl.load(D + own, there[None, :], 0.0) - change, there[None, :])
        for later in range(b + 1, BLOCKS):
            other = (later * T + t)[:, None] * rows + n[None, :]
            gain = tl.load(G + other, there[None, :], 0.0)
            for j in range(T):
                moved = tl.sum(tl.where(t[:, None] == j, change, 0.0), 0)
                gain -= tl.load(H + (b * T + j) * stride_h + later * T + t)[:, None] * moved[None, :]
            tl.store(G + other, gain, there[None, :])
        tl.debug_barrier()  # the next block reads what this one wrote


def update(
    grid: Grid, H: Tensor, G: Tensor, D: Tensor, q: Tensor, units: tuple[Tensor, Tensor], degenerate: float
) -> None:
    """Update D and the integers q (n, T, N), and ``units`` d and dmin (n, N), in place; G (K, N) is overwritten.

    H is (K, K); mins are -1 where the grid has an offset. All but H are contiguous. ``degenerate`` is the relative
    determinant below which d and dmin are not told apart.
    """
    blocks, T, N = q.shape
    table = G if grid.levels is None else nearest_level(grid.levels, G.device)
    _blocks_kernel[(triton.cdiv(N, ROWS),)](
        H, H.stride(0), G, D, q, *units, table, float(grid.low), float(grid.high), degenerate, N,
        BLOCKS=blocks, T=T, BLOCK=ROWS, HAS_OFFSET=grid.has_offset, HAS_TABLE=grid.levels is not None, num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip
