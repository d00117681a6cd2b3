"""This module describes ggml's codebook types: which magnitudes, signs and scales a block can store.

Weight = step * sign * magnitude. Magnitudes come V at a time from a table of E codewords. Signs are free, or 7 of every
8 are stored and the last one makes the number of minuses even. step = d * code, with one fp16 d for 256 weights and one
code, an odd multiple of a unit, for each sub-block. Tables and arithmetic: ``iq2xxs_grid`` ... ``iq3s_grid`` and
``dequantize_row_iq*`` in ggml (ggml-common.h, ggml-quants.c); the tables are read from the gguf package.
"""

from dataclasses import dataclass
from functools import cache

import torch
from gguf import quants
from torch import Tensor

from quantizers.formats.grids import Grid
from quantizers.formats.table import FORMATS

SIGN_GROUP = 8  # weights whose signs are stored together


@dataclass(frozen=True)
class CodebookGrid(Grid):
    """A CodebookGrid takes magnitudes from a codebook, ``vector`` at a time; ``width`` weights share a step."""

    vector: int = 8  # V, weights of a codeword
    even_signs: bool = False  # whether each SIGN_GROUP stores 7 signs, its number of minuses being even
    unit: float = 1.0  # scales are unit * (1, 3, ..., 31)

    @property
    def is_nested(self) -> bool:
        """Whether sub-blocks have scale codes of their own: always."""
        return True

    def nearest_code(self, code: Tensor) -> Tensor:
        """Return the storable scale code nearest to each of ``code``, of the same shape."""
        return ((code / self.unit - 1) / 2).round_().clamp_(0, 15).mul_(2).add_(1).mul_(self.unit)

    def codewords(self, like: Tensor) -> Tensor:
        """Return the codebook's magnitudes (E, V), in the dtype and on the device of ``like``."""
        return _table(self.format.name, like.dtype, like.device)


@cache
def _table(name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    reader = getattr(quants, name)
    reader.init_grid()
    return torch.from_numpy(reader.grid.reshape(reader.grid_shape).copy()).to(device, dtype)


def _grid(name: str, width: int, vector: int, largest: int, unit: float, even_signs: bool = False) -> CodebookGrid:
    return CodebookGrid(FORMATS[name], width, -largest, largest, vector=vector, even_signs=even_signs, unit=unit)


CODEBOOK_GRIDS: dict[str, CodebookGrid] = {
    grid.format.name: grid
    for grid in (
        _grid("IQ2_XXS", 32, 8, 43, 1 / 8, even_signs=True),
        _grid("IQ2_XS", 16, 8, 43, 1 / 8, even_signs=True),
        _grid("IQ2_S", 16, 8, 43, 1 / 8),
        _grid("IQ3_XXS", 32, 4, 62, 1 / 4, even_signs=True),
        _grid("IQ3_S", 32, 4, 15, 1.0),
    )
}
