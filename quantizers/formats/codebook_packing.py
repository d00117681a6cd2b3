"""This module packs and unpacks the blocks of ggml's codebook types, byte for byte.

Layouts: ggml-common.h, ``block_iq2_xxs`` ... ``block_iq3_s``. Shape legend: n blocks of 256 weights in file order (row
by row), I = 256 / V codeword indices of a block (V weights each), S scale codes 0..15 of a block.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from quantizers.formats.codebooks import SIGN_GROUP, CodebookGrid
from quantizers.formats.grids import Scales
from quantizers.formats.scalar_packing import Plane, by_block, half_bytes
from quantizers.formats.table import SUPER_BLOCK

PACKED_WEIGHTS = 1 << 24  # weights that are packed at once: 128 MiB of indices
BITS, PAIRS, NIBBLES = Plane(0, 1, 1), Plane(0, 2, 1), Plane(0, 4, 1)  # consecutive codes share a byte


class Fields(NamedTuple):
    """Holds what blocks store besides the fp16 scale d."""

    chosen: Tensor  # int64 (n, I), codeword indices
    signs: Tensor  # uint8 (n, 32), bit j set: weight j of the eight is negative
    scale: Tensor  # uint8 (n, S), scale codes


def _bytes(words: Tensor, size: int) -> Tensor:
    """Return the low ``size`` bytes of each word, little-endian: int64 (n, k) -> uint8 (n, k * size)."""
    return words.contiguous().view(torch.uint8).view(len(words), -1, 8)[:, :, :size].flatten(1)


def _words(data: Tensor, size: int) -> Tensor:
    """Return words read from ``size`` little-endian bytes each: uint8 (n, k * size) -> int64 (n, k)."""
    parts = data.reshape(len(data), -1, size).long()
    return (parts << (8 * torch.arange(size, device=data.device))).sum(2)


def _low_byte(index: Tensor) -> Tensor:
    return (index & 255).to(torch.uint8)


def _high_bits(index: Tensor) -> Tensor:
    return (index >> 8).to(torch.uint8)


def _write_sign_words(f: Fields) -> Tensor:
    """Return bytes of 32-bit words: four times 7 sign bits, and a scale code in the highest 4 bits."""
    shifts = 7 * torch.arange(4, device=f.signs.device)
    signs = ((f.signs & 127).view(len(f.signs), -1, 4).long() << shifts).sum(2)
    return _bytes(signs | f.scale.long() << 28, 4)


def _read_sign_words(data: Tensor) -> tuple[Tensor, Tensor]:
    words = _words(data, 4)
    signs = (words[:, :, None] >> 7 * torch.arange(4, device=data.device)) & 127
    return _with_parity(signs.flatten(1)), (words >> 28).to(torch.uint8)


def _with_parity(signs: Tensor) -> Tensor:
    """Return 7 sign bits with the eighth that makes the number of minuses even, uint8."""
    parity = sum((signs >> bit & 1 for bit in range(7)), torch.zeros_like(signs)) & 1
    return (signs | parity << 7).to(torch.uint8)


def _write_iq2_xxs(f: Fields) -> Tensor:
    n = len(f.chosen)
    words = _low_byte(f.chosen).view(n, -1, 4), _write_sign_words(f).view(n, -1, 4)
    return torch.cat(words, 2).flatten(1)


def _read_iq2_xxs(data: Tensor) -> Fields:
    index, words = data.view(len(data), -1, 2, 4).unbind(2)
    return Fields(index.flatten(1).long(), *_read_sign_words(words.flatten(1)))


def _write_iq2_xs(f: Fields) -> Tensor:
    return torch.cat([_bytes(f.chosen | (f.signs & 127).long() << 9, 2), NIBBLES.write(f.scale)], 1)


def _read_iq2_xs(data: Tensor) -> Fields:
    words = _words(data[:, :64], 2)
    return Fields(words & 511, _with_parity(words >> 9), NIBBLES.read(data[:, 64:]))


def _write_iq2_s(f: Fields) -> Tensor:
    high = PAIRS.write(_high_bits(f.chosen))
    return torch.cat([_low_byte(f.chosen), f.signs, high, NIBBLES.write(f.scale)], 1)


def _read_iq2_s(data: Tensor) -> Fields:
    low, signs, high, scale = data.split([32, 32, 8, 8], 1)
    return Fields(low.long() | PAIRS.read(high).long() << 8, signs, NIBBLES.read(scale))


def _write_iq3_xxs(f: Fields) -> Tensor:
    return torch.cat([_low_byte(f.chosen), _write_sign_words(f)], 1)


def _read_iq3_xxs(data: Tensor) -> Fields:
    return Fields(data[:, :64].long(), *_read_sign_words(data[:, 64:]))


def _write_iq3_s(f: Fields) -> Tensor:
    high = BITS.write(_high_bits(f.chosen))
    return torch.cat([_low_byte(f.chosen), high, f.signs, NIBBLES.write(f.scale)], 1)


def _read_iq3_s(data: Tensor) -> Fields:
    low, high, signs, scale = data.split([64, 8, 32, 4], 1)
    return Fields(low.long() | BITS.read(high).long() << 8, signs, NIBBLES.read(scale))


_LAYOUTS: dict[str, tuple[Callable[[Fields], Tensor], Callable[[Tensor], Fields]]] = {
    "IQ2_XXS": (_write_iq2_xxs, _read_iq2_xxs),
    "IQ2_XS": (_write_iq2_xs, _read_iq2_xs),
    "IQ2_S": (_write_iq2_s, _read_iq2_s),
    "IQ3_XXS": (_write_iq3_xxs, _read_iq3_xxs),
    "IQ3_S": (_write_iq3_s, _read_iq3_s),
}


@cache
def _index_of(grid: CodebookGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return two int64 tables that find the index of a codeword.

    The first gives each magnitude's rank among the codebook's L levels. The second gives the codeword index for V ranks
    read as the digits of a number in base L, -1 where no codeword has these magnitudes.
    """
    G = grid.codewords(torch.empty(0, device=device)).long()
    levels = G.unique()
    place = torch.zeros(int(levels.max()) + 1, dtype=torch.long, device=device)
    place[levels] = torch.arange(len(levels), device=device)
    index = torch.full((len(levels) ** grid.vector,), -1, dtype=torch.long, device=device)
    index[_number(place[G], len(levels))] = torch.arange(len(G), device=device)
    return place, index


def _number(places: Tensor, base: int) -> Tensor:
    """Return numbers (...) from digits ``places`` (..., V) in ``base``, the lowest digit first."""
    return (places * base ** torch.arange(places.shape[-1], device=places.device)).sum(-1)


def pack_codebook(grid: CodebookGrid, scales: Scales, integers: Tensor) -> Tensor:
    """Return bytes uint8 (N, row_bytes) of N rows, from scales of B x N blocks and signed codewords int8 (columns, N).

    Rows are packed some PACKED_WEIGHTS weights at a time, as indices take eight bytes a weight. Raises ValueError for
    magnitudes that are no codeword of the format.
    """
    rows = max(1, PACKED_WEIGHTS // len(integers))
    parts = [
        _pack_rows(grid, scales.map(lambda member, first=first: member[..., first : first + rows]), part)
        for first, part in zip(range(0, integers.shape[1], rows), integers.split(rows, 1), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pack_rows(grid: CodebookGrid, scales: Scales, integers: Tensor) -> Tensor:
    rows = integers.shape[1]
    blocks = integers.T.contiguous().view(-1, SUPER_BLOCK)
    place, index_of = _index_of(grid, integers.device)
    levels = int(place.max()) + 1
    index = index_of[_number(place[blocks.long().abs()].view(len(blocks), -1, grid.vector), levels)]
    signs = BITS.write((blocks < 0).to(torch.uint8))
    if bool((index < 0).any()):
        raise ValueError(f"expected codewords of {grid.format.name}, found magnitudes that are none")
    scale = ((by_block(scales.scale) / grid.unit - 1) / 2).to(torch.uint8)
    write, _ = _LAYOUTS[grid.format.name]
    return torch.cat([half_bytes(scales.d), write(Fields(index, signs, scale))], 1).view(rows, -1)


def unpack_codebook(grid: CodebookGrid, data: Tensor) -> Tensor:
    """Return weights float32 (n, 256), blocks in file order, of bytes uint8 (..., row_bytes) of whole blocks."""
    blocks = data.reshape(-1, grid.format.block_bytes)
    _, read = _LAYOUTS[grid.format.name]
    fields = read(blocks[:, 2:])
    d = blocks[:, :2].contiguous().view(torch.float16).float()
    values = grid.codewords(d)[fields.chosen].view(len(blocks), -1, SIGN_GROUP)
    bits = fields.signs[:, :, None] >> torch.arange(SIGN_GROUP, dtype=torch.uint8, device=data.device) & 1
    step = d * ((2 * fields.scale.float() + 1) * grid.unit)
    signed = values * (1 - 2 * bits.float())
    return (signed.view(len(blocks), grid.sub_blocks, -1) * step[:, :, None]).view(len(blocks), -1)
