"""This module reads and writes the fp16 scales of packed blocks: d, and dmin where a format has offsets.

A weight is linear in the scales of its block, so its derivative is what the block decodes to with that scale at 1 and
the other at 0; see ``quantizers.formats.grids`` for the decoders.

Shape legend: n blocks in file order (row by row), u scales of a block: d, dmin.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from quantizers.formats.codebooks import CODEBOOK_GRIDS
from quantizers.formats.packed_tensor import dequantize
from quantizers.formats.scalar_packing import half_offsets
from quantizers.formats.table import QuantFormat

GRADIENT_WEIGHTS = 1 << 22  # that are decoded at once: 16 MiB


def scales_of_block(fmt: QuantFormat) -> int:
    """Return how many fp16 scales a block has: 0, 1 or 2."""
    return len(_offsets(fmt))


def block_scales(fmt: QuantFormat, data: Tensor) -> Tensor:
    """Return the scales float16 (n, u) of bytes uint8 (rows, row_bytes); u is 0 for float formats."""
    blocks = data.reshape(-1, fmt.block_bytes)
    found = [blocks[:, at : at + 2].contiguous().view(torch.float16) for at in _offsets(fmt)]
    return torch.cat(found, 1) if found else torch.empty(len(blocks), 0, dtype=torch.float16, device=data.device)


def with_block_scales(fmt: QuantFormat, data: Tensor, scales: Tensor) -> Tensor:
    """Return the bytes ``data`` uint8 (rows, row_bytes) with other ``scales`` float16 (n, u)."""
    found = data.clone()
    blocks = found.view(-1, fmt.block_bytes)
    for index, at in enumerate(_offsets(fmt)):
        blocks[:, at : at + 2] = scales[:, index : index + 1].contiguous().view(torch.uint8)
    return found


def scale_gradients(fmt: QuantFormat, data: Tensor, gradient: Tensor) -> Tensor:
    """Return a loss's gradient float32 (n, u) in the scales of ``data`` uint8 (rows, row_bytes).

    ``gradient`` (rows, columns) is that in the weights that the bytes decode to.
    """
    parts = []
    step = max(1, GRADIENT_WEIGHTS // gradient.shape[1])
    for bytes_, at_weights in zip(data.split(step), gradient.split(step), strict=True):
        n, u = block_scales(fmt, bytes_).shape
        found = []
        for index in range(u):
            unit = functional.one_hot(torch.tensor(index), u).to(bytes_.device, torch.float16).expand(n, u)
            derivative = dequantize(fmt, with_block_scales(fmt, bytes_, unit))[:, : gradient.shape[1]]
            product = functional.pad(derivative.mul_(at_weights), (0, -gradient.shape[1] % fmt.block_size))
            found.append(product.view(n, -1).sum(1))
        parts.append(torch.stack(found, 1))
    return torch.cat(parts)


@cache
def _offsets(fmt: QuantFormat) -> tuple[int, ...]:
    """Return where d and dmin of a block are, in bytes from its start."""
    if fmt.is_float:
        return ()
    return (0,) if fmt.name in CODEBOOK_GRIDS else half_offsets(fmt)
