"""Chunk sizes decide speed and memory, and no byte: an accelerator's chunks give what a CPU's give."""

import pytest
import torch

from bitgenome.common.devices import ACCELERATOR_CHUNK
from quantizers.formats.codebooks import CODEBOOK_GRIDS
from quantizers.formats.packed_tensor import dequantize
from quantizers.formats.table import FORMATS
from quantizers.rounding import codebook_search, coordinate_descent, nearest, row_batches
from quantizers.rounding.sparsegpt import compensate

ROWS = 64
SLOW = {"IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"}  # seconds each; IQ2_XXS takes the same path
BLOCK_FORMATS = [
    pytest.param(fmt, marks=[pytest.mark.long] if fmt.name in SLOW else [], id=fmt.name)
    for fmt in FORMATS.values()
    if not fmt.is_float
]


@pytest.mark.parametrize("fmt", BLOCK_FORMATS)
def test_no_byte_depends_on_the_chunks(fmt, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(7)
    columns = 256 if fmt.name in CODEBOOK_GRIDS else 512  # one super-block is slow enough
    W = 0.02 * torch.randn(ROWS, columns, generator=generator) * torch.rand(ROWS, 1, generator=generator)
    x = torch.randn(2 * columns, columns, generator=generator)
    found = []
    for size in (1 << 15, ACCELERATOR_CHUNK):  # 32 rows of a super-block; all rows and columns
        for module in (nearest, coordinate_descent, codebook_search):
            monkeypatch.setattr(module, "chunk_bytes", lambda device, on_cpu, size=size: size)
        monkeypatch.setattr(row_batches, "BATCH_ROWS", size // 1024)
        found.append(compensate({"w": W}, {"w": [fmt]}, x.T @ x / len(x))["w"][fmt.name])
    small, large = found
    assert torch.equal(small.packed.data, large.packed.data)
    assert small.error == pytest.approx(large.error)
    assert dequantize(fmt, large.packed.data).isfinite().all()
