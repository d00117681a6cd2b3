"""This module holds the packed bytes of a tensor in a GGUF file and decodes them to weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.formats.codebook_packing import unpack_codebook
from quantizers.formats.codebooks import CODEBOOK_GRIDS
from quantizers.formats.grids import GRIDS
from quantizers.formats.scalar_packing import unpack
from quantizers.formats.table import QuantFormat

FLOAT_TYPES = {"F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class PackedTensor:
    """Holds a tensor as it is stored in a GGUF file."""

    format: QuantFormat
    data: Tensor  # uint8 (rows, row_bytes)
    shape: tuple[int, int]  # (rows, columns)

    def dequantize(self) -> Tensor:
        """Return the decoded weights, float32 (rows, columns)."""
        return dequantize(self.format, self.data)


def dequantize(fmt: QuantFormat, data: Tensor) -> Tensor:
    """Return the weights float32 (rows, columns) of bytes uint8 (rows, row_bytes), bit for bit as ggml decodes them.

    Raises ValueError if a row is not a whole number of blocks.
    """
    if data.shape[-1] % fmt.block_bytes:
        row = data.shape[-1]
        raise ValueError(f"row of {row} bytes is not a multiple of {fmt.name} block bytes ({fmt.block_bytes})")
    if fmt.is_float:
        return data.contiguous().view(FLOAT_TYPES[fmt.name]).float()
    if fmt.name in CODEBOOK_GRIDS:
        return unpack_codebook(CODEBOOK_GRIDS[fmt.name], data).view(len(data), -1)
    integers, step, offset = unpack(GRIDS[fmt.name], data)
    values = integers.mul_(step)
    return (values if offset is None else values.sub_(offset)).view(len(data), -1)
