"""This module holds what the rows of a format store, before it is packed: scales and integers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.formats.codebook_packing import pack_codebook
from quantizers.formats.codebooks import CodebookGrid
from quantizers.formats.grids import Grid, Scales
from quantizers.formats.scalar_packing import pack
from quantizers.rounding.row_batches import pad_rows


@dataclass(frozen=True)
class Codes:
    """Holds scales and integers int8 (columns, N) of N rows."""

    scales: Scales
    integers: Tensor

    def rows(self, start: int, stop: int) -> "Codes":
        """Return the codes of the rows from ``start`` to before ``stop``."""
        scales = self.scales.map(lambda member: member[..., start:stop])
        return Codes(scales, self.integers[:, start:stop])

    def padded(self) -> "Codes":
        """Return the codes with rows of zeros up to a whole tile."""
        return Codes(self.scales.map(pad_rows), pad_rows(self.integers))

    def packed(self, grid: Grid) -> Tensor:
        """Return the bytes uint8 (N, row_bytes) of the rows."""
        if isinstance(grid, CodebookGrid):
            return pack_codebook(grid, self.scales, self.integers)
        return pack(grid, self.scales, self.integers)

    @classmethod
    def joined(cls, parts: Sequence["Codes"]) -> "Codes":
        """Return the rows of all ``parts`` in order."""
        scales = Scales.concatenate([part.scales for part in parts], 3)
        return cls(scales, torch.cat([part.integers for part in parts], 1))
