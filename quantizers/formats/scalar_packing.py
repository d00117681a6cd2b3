"""This module packs and unpacks the blocks of GGUF's scalar formats, byte for byte (ggml-common.h, ``block_*``).

A block is a sequence of fields. Integers are stored in bit planes: a plane holds ``bits`` bits of every integer, from
bit ``shift`` on. ``8 // bits`` runs of ``width`` consecutive integers share ``width`` bytes of the plane, the first run
in the lowest bits.

Shape legend: n blocks in file order (row by row), S sub-blocks, K weights of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quantizers.formats.grids import Grid, Scales
from quantizers.formats.table import QuantFormat


@dataclass(frozen=True)
class Plane:
    """A Plane stores some bits of every integer of a block, in K * bits / 8 bytes."""

    shift: int
    bits: int
    width: int

    def write(self, codes: Tensor) -> Tensor:
        """Return the plane's bytes uint8 (n, K * bits / 8) of codes uint8 (n, K)."""
        runs = 8 // self.bits
        parts = (codes >> self.shift & (1 << self.bits) - 1).view(len(codes), -1, runs, self.width)
        out = parts[:, :, 0].clone()
        for run in range(1, runs):
            out |= parts[:, :, run] << self.bits * run
        return out.flatten(1)

    def read(self, data: Tensor) -> Tensor:
        """Return codes uint8 (n, K) with only this plane's bits set, of bytes uint8 (n, K * bits / 8)."""
        if self.bits == 8:
            return data
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=data.device).view(-1, 1)
        runs = data.reshape(len(data), -1, 1, self.width) >> shifts
        runs &= (1 << self.bits) - 1
        return (runs << self.shift if self.shift else runs).flatten(1)


def _write_pairs(scale: Tensor, minimum: Tensor) -> Tensor:
    """Write the 16 bytes of Q2_K: scale in the low nibble, min in the high one."""
    return scale | minimum << 4


def _read_pairs(data: Tensor) -> tuple[Tensor, Tensor]:
    return data & 15, data >> 4


def _write_six_bit_pairs(scale: Tensor, minimum: Tensor) -> Tensor:
    """Write the 12 bytes of Q4_K and Q5_K: 8 scales and 8 mins of 6 bits (ggml-quants.c, ``get_scale_min_k4``)."""
    (s_low, s_high), (m_low, m_high) = scale.chunk(2, 1), minimum.chunk(2, 1)
    first = s_low | s_high >> 4 << 6
    second = m_low | m_high >> 4 << 6
    return torch.cat([first, second, s_high & 15 | (m_high & 15) << 4], 1)


def _read_six_bit_pairs(data: Tensor) -> tuple[Tensor, Tensor]:
    first, second, third = data.chunk(3, 1)
    scale = torch.cat([first & 63, third & 15 | first >> 6 << 4], 1)
    minimum = torch.cat([second & 63, third >> 4 | second >> 6 << 4], 1)
    return scale, minimum


def _write_six_bit_scales(scale: Tensor, _: Tensor) -> Tensor:
    """Write the 12 bytes of Q3_K: 16 scales of 6 bits.

    The low nibbles of scales j and j + 8 share a byte; four runs of high bits follow.
    """
    low, high = scale & 15, scale >> 4
    pairs = low[:, :8] | low[:, 8:] << 4
    return torch.cat([pairs, Plane(0, 2, 4).write(high.contiguous())], 1)


def _read_six_bit_scales(data: Tensor) -> tuple[Tensor, None]:
    pairs = data[:, :8]
    return torch.cat([pairs & 15, pairs >> 4], 1) | Plane(4, 2, 4).read(data[:, 8:]), None


def _write_bytes(scale: Tensor, _: Tensor) -> Tensor:
    """Write the 16 bytes of Q6_K, which are signed scales."""
    return scale


def _read_bytes(data: Tensor) -> tuple[Tensor, None]:
    return data.view(torch.int8), None


def _write_six_bit_halves(scale: Tensor, _: Tensor) -> Tensor:
    """Write the 6 bytes of IQ4_XS, 8 scales of 6 bits: high bits in 2 bytes, then low nibbles in 4."""
    return torch.cat([Plane(4, 2, 1).write(scale), Plane(0, 4, 1).write(scale)], 1)


def _read_six_bit_halves(data: Tensor) -> tuple[Tensor, None]:
    return Plane(4, 2, 1).read(data[:, :2]) | Plane(0, 4, 1).read(data[:, 2:]), None


class Codes(NamedTuple):
    """A Codes field stores the integer scales and mins of the sub-blocks in ``size`` bytes.

    Stored scale = scale + ``bias`` (modulo 256).
    """

    size: int
    write: Callable[[Tensor, Tensor], Tensor]  # stored scale and min, uint8 (n, S) each -> uint8 (n, size)
    read: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    bias: int = 0


Field = Plane | Codes | str  # a string names an fp16 field of Scales
_SIX_BIT_PAIRS = Codes(12, _write_six_bit_pairs, _read_six_bit_pairs)
LAYOUTS: dict[str, tuple[Field, ...]] = {
    "Q2_K": (Codes(16, _write_pairs, _read_pairs), Plane(0, 2, 32), "d", "dmin"),
    "Q3_K": (Plane(2, 1, 32), Plane(0, 2, 32), Codes(12, _write_six_bit_scales, _read_six_bit_scales, 32), "d"),
    "Q4_K": ("d", "dmin", _SIX_BIT_PAIRS, Plane(0, 4, 32)),
    "Q5_K": ("d", "dmin", _SIX_BIT_PAIRS, Plane(4, 1, 32), Plane(0, 4, 32)),
    "Q6_K": (Plane(0, 4, 64), Plane(4, 2, 32), Codes(16, _write_bytes, _read_bytes), "d"),
    "Q8_0": ("d", Plane(0, 8, 32)),
    "Q4_0": ("d", Plane(0, 4, 16)),
    "Q4_1": ("d", "dmin", Plane(0, 4, 16)),
    "Q5_0": ("d", Plane(4, 1, 1), Plane(0, 4, 16)),
    "Q5_1": ("d", "dmin", Plane(4, 1, 1), Plane(0, 4, 16)),
    "IQ4_XS": ("d", Codes(6, _write_six_bit_halves, _read_six_bit_halves, 32), Plane(0, 4, 16)),
    "IQ4_NL": ("d", Plane(0, 4, 16)),
}


def _field_bytes(field: Field, block_size: int) -> int:
    match field:
        case Plane():
            return block_size * field.bits // 8
        case Codes():
            return field.size
        case _:
            return 2


def half_offsets(fmt: QuantFormat) -> tuple[int, ...]:
    """Return where the fp16 fields d and, if there is one, dmin of a block are, in bytes from its start."""
    fields = LAYOUTS[fmt.name]
    starts = [sum(_field_bytes(before, fmt.block_size) for before in fields[:index]) for index in range(len(fields))]
    return tuple(start for field, start in zip(fields, starts, strict=True) if isinstance(field, str))


def by_block(member: Tensor) -> Tensor:
    """Return a field of Scales (B, S, 1, N) as (n, S), blocks in file order."""
    return member[:, :, 0].permute(2, 0, 1).flatten(0, 1)


def half_bytes(member: Tensor) -> Tensor:
    """Return the bytes uint8 (n, 2), blocks in file order, of fp16 values (B, 1, 1, N)."""
    return by_block(member).half().flatten().view(torch.uint8).view(-1, 2)


def _stored(grid: Grid) -> int:
    """Return what is added to an integer before it is stored: 0 for bytes (two's complement), else -``low``."""
    return 0 if grid.high == 127 else -grid.low


def _store(grid: Grid, integers: Tensor) -> Tensor:
    """Return the uint8 codes of int8 integers, in the same shape."""
    if grid.levels is None:
        return (integers + _stored(grid)).view(torch.uint8)
    levels = torch.tensor(grid.levels, dtype=torch.int8, device=integers.device)
    return torch.searchsorted(levels, integers).to(torch.uint8)


def _restore(grid: Grid, codes: Tensor) -> Tensor:
    """Return the integers, as float32, of uint8 codes, in the same shape."""
    if grid.levels is not None:
        return torch.tensor(grid.levels, dtype=torch.float32, device=codes.device)[codes.int()]
    return codes.view(torch.int8).float() if grid.high == 127 else codes.float().sub_(_stored(grid))


def pack(grid: Grid, scales: Scales, integers: Tensor) -> Tensor:
    """Return the bytes uint8 (N, row_bytes) of N whole rows.

    ``scales`` are those of B x N blocks; ``integers`` int8 (columns, N) must lie on the grid.
    """
    rows = integers.shape[1]
    codes = _store(grid, integers.T.contiguous()).view(-1, grid.format.block_size)
    parts = []
    for field in LAYOUTS[grid.format.name]:
        match field:
            case Plane():
                parts.append(field.write(codes))
            case Codes():
                stored = by_block(scales.scale + field.bias), by_block(scales.min)
                parts.append(field.write(*(s.to(torch.int16).to(torch.uint8) for s in stored)))
            case _:
                parts.append(half_bytes(getattr(scales, field)))
    return torch.cat(parts, 1).view(rows, -1)


class Unpacked(NamedTuple):
    """Holds decoded fields of n blocks in file order: weight = step * integers - offset (None: no offset)."""

    integers: Tensor  # float32 (n, S, T)
    step: Tensor  # float32 (n, S, 1)
    offset: Tensor | None  # float32 (n, S, 1)


def unpack(grid: Grid, data: Tensor) -> Unpacked:
    """Return the integers, steps and offsets of the blocks in ``data`` uint8 (..., row_bytes), rows of whole blocks."""
    layout = LAYOUTS[grid.format.name]
    sizes = [_field_bytes(field, grid.format.block_size) for field in layout]
    blocks = data.reshape(-1, grid.format.block_bytes)
    codes: Tensor | None = None
    step = offset = None
    halves: dict[str, Tensor] = {}
    for field, part in zip(layout, blocks.split(sizes, 1), strict=True):
        match field:
            case Plane():
                bits = field.read(part)
                codes = bits if codes is None else codes | bits
            case Codes():
                scale, minimum = field.read(part)
                step = scale.float() - field.bias
                offset = None if minimum is None else minimum.float()
            case _:
                halves[field] = part.contiguous().view(torch.float16).float()
    assert codes is not None
    integers = _restore(grid, codes)
    step = halves["d"] if step is None else step.mul_(halves["d"])
    if "dmin" in halves:
        offset = -halves["dmin"] if offset is None else offset.mul_(halves["dmin"])
    shape = len(blocks), grid.sub_blocks, grid.width
    return Unpacked(integers.view(shape), step[:, :, None], None if offset is None else offset[:, :, None])
