"""This module gives block formats a grid with an exact 0, so that pruned weights are zeros in the file.

Symmetric formats (Q3_K, Q6_K, Q8_0, Q4_0, Q5_0) have integer 0 already. An affine format decodes to d * scale * q -
dmin * min, so integer z decodes to exactly 0 where the two products are equal for q = z. That holds in all sub-blocks
at once if dmin is a fixed multiple of d and min follows from scale:

    Q4_K  dmin = 8 d   min = scale           weights d * scale * (q - 8)
    Q5_K  dmin = 16 d  min = scale           weights d * scale * (q - 16)
    Q2_K  dmin = d     min = scale           weights d * scale * (q - 1)
                    or min = 2 scale         weights d * scale * (q - 2), scale at most 7
    Q4_1, Q5_1         m = -8 d, m = -16 d   weights d * (q - 8), d * (q - 16)

Factors are powers of two or small integers, so every product is exact in fp16 and float32. Each format is then a
symmetric one with a zero, and is searched and refined as such (Q2_K's second form stores a negative scale). The price
is a fixed offset; the size is the same. Measured with half of the weights of a trained block pruned
(``benchmarks/pruning.py``): on an affine format's own grid 7 % of the pruned weights decode to 0 (Q2_K 11 %), here all
of them, at 7 % more error for Q2_K, 1 % for Q4_K and Q4_1, none for Q5_K and Q5_1.

Codebook types have no exact zero and are not included: the nearest value to 0 is 1 step (of 127) in IQ4_NL and IQ4_XS,
and further off in IQ2 and IQ3.
"""

import torch
from torch import Tensor

from quantizers.formats.grids import FP16_MAX, GRIDS, Grid, Scales
from quantizers.formats.scalar_packing import pack
from quantizers.formats.table import FORMATS, QuantFormat
from quantizers.rounding.nearest import chunk_columns, fit_rows, nearest_integers, normalized_importance, row_ranges

_SHIFTED = (
    Grid(FORMATS["Q2_K"], 16, -1, 2, (-7, 15)),
    Grid(FORMATS["Q4_K"], 32, -8, 7, (0, 63)),
    Grid(FORMATS["Q5_K"], 32, -16, 15, (0, 63)),
    Grid(FORMATS["Q4_1"], 32, -8, 7),
    Grid(FORMATS["Q5_1"], 32, -16, 15),
)
ZERO_GRIDS: dict[str, Grid] = {
    grid.format.name: grid for grid in (*_SHIFTED, *(GRIDS[name] for name in ("Q3_K", "Q6_K", "Q8_0", "Q4_0", "Q5_0")))
}
# dmin / d; min = |scale| * zero integer / factor. A negative factor goes with min = -1: files store m, which is added.
_DMIN_FACTORS = {"Q2_K": 1, "Q4_K": 8, "Q5_K": 16, "Q4_1": -8, "Q5_1": -16}


def pack_with_zero(grid: Grid, scales: Scales, integers: Tensor) -> Tensor:
    """Return bytes uint8 (N, row_bytes) of scales and integers int8 (columns, N) on a grid of ``ZERO_GRIDS``."""
    name = grid.format.name
    if name not in _DMIN_FACTORS:
        return pack(grid, scales, integers)
    factor = _DMIN_FACTORS[name]
    d = scales.d.clamp(-FP16_MAX / abs(factor), FP16_MAX / abs(factor))
    mirrored = scales.scale < 0
    scale, z = scales.scale.abs(), grid.blocks(integers)
    zero = torch.where(mirrored, grid.high, -grid.low)
    q = torch.where(mirrored, grid.high - z, z - grid.low).to(torch.int8)
    return pack(GRIDS[name], Scales(d, d * factor, scale, scale * zero / factor), q.view_as(integers))


def quantize_with_zero(fmt: QuantFormat, W: Tensor, importance: Tensor | None = None) -> Tensor:
    """Return bytes uint8 (rows, row_bytes) of W (rows, columns) on the grid with an exact 0: its zeros decode to 0.

    ``importance`` (columns,) is as for ``quantize``. Raises KeyError for a format without such a grid, and ValueError
    as ``normalized_importance``.
    """
    grid, importance = ZERO_GRIDS[fmt.name], normalized_importance(importance, W.shape[1], W.device)
    return torch.cat([_quantize_rows(grid, W[rows], importance) for rows in row_ranges(W)])


def _quantize_rows(grid: Grid, W: Tensor, importance: Tensor) -> Tensor:
    """Return bytes uint8 (rows, row_bytes) of W (rows, columns) under a normalized importance (columns,)."""
    parts = []
    step = chunk_columns(W)
    for columns, weight in zip(W.T.float().split(step), importance.split(step), strict=True):
        scales = fit_rows(grid, columns, weight)
        parts.append((scales, nearest_integers(grid, scales, columns)))
    return pack_with_zero(grid, Scales.concatenate([s for s, _ in parts], 0), torch.cat([q for _, q in parts]))
