"""Packing keeps every legal scale and integer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantizers.formats.grids import GRIDS, Grid, Scales
from quantizers.formats.scalar_packing import pack, unpack
from tests import ggml_reference

all_grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda g: g.format.name)


def random_blocks(grid: Grid, blocks: int, rows: int, seed: int) -> tuple[Scales, torch.Tensor]:
    """Legal scales of (blocks, rows) and integers (columns, rows), both ends of every range included."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    halves = torch.randn(2, blocks, 1, 1, rows, generator=generator).half().float()
    codes = (blocks, grid.sub_blocks, 1, rows)
    scale, minimum = integers(*grid.scale_codes, *codes).float(), integers(*grid.min_codes, *codes).float()
    q = integers(grid.low, grid.high, blocks * grid.format.block_size, rows)
    q[0], q[-1] = grid.low, grid.high
    q = grid.nearest(q.float()).to(torch.int8)
    return Scales(halves[0], halves[1] * grid.has_offset, scale, minimum), q


@all_grids
@settings(max_examples=30, deadline=None)
@given(blocks=st.integers(1, 3), rows=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_what_is_packed_is_unpacked(grid: Grid, blocks: int, rows: int, seed: int) -> None:
    scales, integers = random_blocks(grid, blocks, rows, seed)
    content = unpack(grid, pack(grid, scales, integers))
    assert torch.equal(content.integers.view(rows, -1), integers.T.float())
    assert torch.equal(content.step.view(rows, -1), scales.step.permute(3, 0, 1, 2).reshape(rows, -1))
    if content.offset is not None:
        assert torch.equal(content.offset.view(rows, -1), scales.offset.permute(3, 0, 1, 2).reshape(rows, -1))


@all_grids
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_grid_arithmetic_is_ggmls(grid: Grid, seed: int) -> None:
    scales, integers = random_blocks(grid, 2, 3, seed)
    values = grid.blocks(integers.float()) * scales.step - scales.offset
    decoded = ggml_reference.dequantize(grid.format, pack(grid, scales, integers))
    assert torch.equal(values.view(-1, 3).T, decoded)


@all_grids
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_bit_counts(grid: Grid, seed: int) -> None:
    """A flipped bit changes an integer, a step or an offset; a zero d or code may hide one of a code or d."""
    scales, integers = random_blocks(grid, 2, 2, seed)
    data = pack(grid, scales, integers)
    flipped = data.clone()
    position = seed % data.shape[1]
    flipped[0, position] ^= 1 << seed % 8
    before, after = unpack(grid, data), unpack(grid, flipped)
    members = [(getattr(before, name), getattr(after, name)) for name in before._fields]
    assert any(a is not None and not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in members)
