"""The value grids of GGUF's block formats: which weights a block can represent, given its scales.

A block of ``T * S`` weights has S sub-blocks of T weights; each has a float32 step and offset, and weight = step * q
- offset with an integer q. K types derive step and offset from one fp16 pair (d, dmin) for each block and small
integer codes for each sub-block; the others have S = 1 and the codes are fixed. Geometry: ggml-common.h; arithmetic:
ggml-quants.c, ``dequantize_row_*``.

Shape legend, the transposed layout in which rows are the contiguous last dimension:
    B blocks along a row, S sub-blocks, T weights of a sub-block, N rows; ``columns = B * S * T``.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from quantizers.formats import FORMATS, QuantFormat

FP16_MAX = 65504.0


@dataclass(frozen=True)
class Grid:
    """Integers and codes that a block format can store."""

    format: QuantFormat
    width: int  # T, weights that share a step
    low: int  # integers of a weight, low..high
    high: int
    scale_codes: tuple[int, int] = (1, 1)  # integer scale of a sub-block: step = d * code
    min_codes: tuple[int, int] = (0, 0)  # integer offset of a sub-block: offset = dmin * code

    @property
    def sub_blocks(self) -> int:
        return self.format.block_size // self.width

    @property
    def has_offset(self) -> bool:
        return self.min_codes != (0, 0)

    @property
    def is_nested(self) -> bool:
        """Whether sub-blocks have integer codes of their own (K types)."""
        return self.scale_codes != (1, 1)

    @property
    def is_signed(self) -> bool:
        """Whether a step may be negative: an uneven range of integers is then used from the side that fits."""
        return not self.has_offset and self.low != -self.high

    def blocks(self, columns_first: Tensor) -> Tensor:
        """(columns, N) viewed as (B, S, T, N)."""
        return columns_first.view(-1, self.sub_blocks, self.width, columns_first.shape[-1])


GRIDS: dict[str, Grid] = {
    grid.format.name: grid
    for grid in (
        Grid(FORMATS["Q2_K"], 16, 0, 3, (0, 15), (0, 15)),
        Grid(FORMATS["Q3_K"], 16, -4, 3, (-32, 31)),
        Grid(FORMATS["Q4_K"], 32, 0, 15, (0, 63), (0, 63)),
        Grid(FORMATS["Q5_K"], 32, 0, 31, (0, 63), (0, 63)),
        Grid(FORMATS["Q6_K"], 16, -32, 31, (-128, 127)),
        Grid(FORMATS["Q8_0"], 32, -127, 127),
        Grid(FORMATS["Q4_0"], 32, -8, 7),
        Grid(FORMATS["Q4_1"], 32, 0, 15, min_codes=(-1, -1)),  # the file adds m, so offset = -m
        Grid(FORMATS["Q5_0"], 32, -16, 15),
        Grid(FORMATS["Q5_1"], 32, 0, 31, min_codes=(-1, -1)),
    )
}


@dataclass(frozen=True)
class Scales:
    """The scales of B x N blocks, as stored: float32 tensors that hold fp16 values and small integers."""

    d: Tensor  # (B, 1, 1, N), representable in fp16
    dmin: Tensor  # (B, 1, 1, N), representable in fp16
    scale: Tensor  # (B, S, 1, N), integers within Grid.scale_codes
    min: Tensor  # (B, S, 1, N), integers within Grid.min_codes

    @property
    def step(self) -> Tensor:
        """(B, S, 1, N): the decoder's own float32 product."""
        return self.d * self.scale

    @property
    def offset(self) -> Tensor:
        """(B, S, 1, N): the decoder's own float32 product."""
        return self.dmin * self.min

    def map(self, function: Callable[..., Tensor], *others: "Scales") -> "Scales":
        """``function`` applied field by field."""
        return Scales(*(function(*(getattr(s, f.name) for s in (self, *others))) for f in fields(self)))

    @classmethod
    def concatenate(cls, parts: "list[Scales]", dim: int) -> "Scales":
        return parts[0].map(lambda *tensors: torch.cat(tensors, dim), *parts[1:])


def nearest_fp16(x: Tensor) -> Tensor:
    """``x`` rounded to the nearest finite fp16 value, in its own type."""
    return x.clamp(-FP16_MAX, FP16_MAX).half().to(x.dtype)


def safe_inverse(x: Tensor) -> Tensor:
    """1 / x where that is finite, else 0."""
    inverse = 1.0 / x
    return torch.where(inverse.isfinite(), inverse, 0.0)


def round_to_grid(grid: Grid, x: Tensor, offset: Tensor, inverse_step: Tensor) -> Tensor:
    """Nearest integers of ``x`` (B, S, T, N) on the grid, in the type of ``x``; 0 where ``inverse_step`` is 0."""
    q = (x + offset).mul_(inverse_step) if grid.has_offset else x * inverse_step
    return q.round_().clamp_(grid.low, grid.high)
