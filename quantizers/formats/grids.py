"""This module describes the value grids of GGUF's block formats: which weights a block can represent, given its scales.

A block of ``S * T`` weights has S sub-blocks of T weights. Each sub-block has a float32 step and offset, and
weight = step * q - offset with an integer q. K types and IQ4_XS derive step and offset from one fp16
pair (d, dmin) for each block and small integer codes for each sub-block; the others have S = 1 and fixed codes.
Geometry: ggml-common.h; arithmetic: ggml-quants.c, ``dequantize_row_*``.

Shape legend, for the transposed layout, in which rows are the contiguous last dimension:
    B blocks along a row, S sub-blocks, T weights of a sub-block, N rows; ``columns = B * S * T``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantizers.formats.table import FORMATS, QuantFormat

FP16_MAX = 65504.0


@dataclass(frozen=True)
class Grid:
    """A Grid says which integers and scale codes a block format can store."""

    format: QuantFormat
    width: int  # T, weights that share a step
    low: int  # smallest integer of a weight
    high: int  # largest integer of a weight
    scale_codes: tuple[int, int] = (1, 1)  # integer scale of a sub-block: step = d * code
    min_codes: tuple[int, int] = (0, 0)  # integer offset of a sub-block: offset = dmin * code
    levels: tuple[int, ...] | None = None  # integers of a table type, ascending; None: all of low..high

    @property
    def sub_blocks(self) -> int:
        """Number of sub-blocks in a block, S."""
        return self.format.block_size // self.width

    @property
    def has_offset(self) -> bool:
        """Whether blocks store an offset (affine formats)."""
        return self.min_codes != (0, 0)

    @property
    def is_nested(self) -> bool:
        """Whether sub-blocks have integer codes of their own (K types and IQ4_XS)."""
        return self.scale_codes != (1, 1)

    @property
    def spacing(self) -> float:
        """Average distance between neighbouring integers; 1 unless the type has a table."""
        return 1.0 if self.levels is None else (self.high - self.low) / (len(self.levels) - 1)

    def nearest(self, x: Tensor) -> Tensor:
        """Return the storable integers nearest to ``x``, of any shape, which is overwritten."""
        if self.levels is None:
            return x.round_().clamp_(self.low, self.high)
        halves = (x.clamp_(self.low, self.high) * 2).floor_().sub_(2 * self.low).int()
        return x.copy_(nearest_level(self.levels, x.device)[halves])

    def nearest_code(self, code: Tensor) -> Tensor:
        """Return the storable integer scales nearest to ``code``, of any shape, which may be overwritten."""
        return code.round_().clamp_(*self.scale_codes)

    def blocks(self, columns_first: Tensor) -> Tensor:
        """Return a view (B, S, T, N) of a tensor (columns, N)."""
        return columns_first.view(-1, self.sub_blocks, self.width, columns_first.shape[-1])


# kvalues_iq4nl in ggml-common.h
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
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
        Grid(FORMATS["IQ4_XS"], 32, -127, 113, (-32, 31), levels=IQ4_LEVELS),
        Grid(FORMATS["IQ4_NL"], 32, -127, 113, levels=IQ4_LEVELS),
    )
}


@dataclass(frozen=True)
class Scales:
    """Holds the scales of B x N blocks as they are stored: fp16 values and small integers, in float32 tensors."""

    d: Tensor  # (B, 1, 1, N), representable in fp16
    dmin: Tensor  # (B, 1, 1, N), representable in fp16
    scale: Tensor  # (B, S, 1, N), integers within Grid.scale_codes
    min: Tensor  # (B, S, 1, N), integers within Grid.min_codes

    @property
    def step(self) -> Tensor:
        """Step of each sub-block (B, S, 1, N), the same float32 product as in ggml's decoder."""
        return self.d * self.scale

    @property
    def offset(self) -> Tensor:
        """Offset of each sub-block (B, S, 1, N), the same float32 product as in ggml's decoder."""
        return self.dmin * self.min

    @property
    def members(self) -> list[Tensor]:
        """The fields in order."""
        return [self.d, self.dmin, self.scale, self.min]

    def map(self, function: Callable[..., Tensor], *others: "Scales") -> "Scales":
        """Return Scales whose fields are ``function`` of the same field of ``self`` and ``others``."""
        return Scales(*map(function, *(s.members for s in (self, *others))))

    @classmethod
    def concatenate(cls, parts: "list[Scales]", dim: int) -> "Scales":
        """Return the ``parts`` joined along ``dim`` (0: blocks of a row, 3: rows)."""
        return parts[0].map(lambda *tensors: torch.cat(tensors, dim), *parts[1:])


@cache
def nearest_level(levels: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a table of the level nearest to each half-open interval [i / 2, (i + 1) / 2) from lowest to highest.

    Midpoints between levels are multiples of 1/2, so every interval has one nearest level and the table is exact.
    """
    table = torch.tensor(levels, dtype=torch.float32, device=device)
    halves = torch.arange(2 * levels[0], 2 * levels[-1] + 1, device=device) / 2
    return table[torch.bucketize(halves, (table[1:] + table[:-1]) / 2, right=True)]


def nearest_fp16(x: Tensor) -> Tensor:
    """Return ``x`` rounded to the nearest finite fp16 values, in the dtype of ``x``."""
    return x.clamp(-FP16_MAX, FP16_MAX).half().to(x.dtype)


def safe_inverse(x: Tensor) -> Tensor:
    """Return 1 / x where that is finite, else 0."""
    inverse = 1.0 / x
    return torch.where(inverse.isfinite(), inverse, 0.0)


def round_to_grid(grid: Grid, x: Tensor, offset: Tensor, inverse_step: Tensor) -> Tensor:
    """Return the storable integers nearest to (x + offset) / step, in the shape (B, S, T, N) and dtype of ``x``.

    ``offset`` and ``inverse_step`` are (B, S, 1, N); where ``inverse_step`` is 0 the result is the integer nearest 0.
    """
    q = (x + offset).mul_(inverse_step) if grid.has_offset else x * inverse_step
    return grid.nearest(q)
