"""This module runs the column loop of SparseGPT/GPTQ over rows of several formats at once.

Source: Frantar & Alistarh 2022 and 2023, algorithm 1 of both. Columns are rounded in order, and each column's error is
spread over the columns after it; scales are fitted at the start of each block. Legend: U upper with
U^T U = H_damped^-1, W transposed (columns, R) with R rows of all tensors and formats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantizers.formats.grids import Grid, Scales, safe_inverse
from quantizers.formats.scalar_packing import pack
from quantizers.formats.table import SUPER_BLOCK
from quantizers.rounding.coordinate_descent import descend
from quantizers.rounding.nearest import fit_rows, pad_rows
from quantizers.rounding.pruning_masks import ColumnMasks

PANEL = 32  # columns between updates of the super-block; every block size is a multiple of it
GRAIN = 16  # columns that share a step in every format


@dataclass
class Segment:
    """A Segment is a range of rows of one format in the stack, with the scales fitted to them."""

    grid: Grid
    rows: slice
    scales: list[Scales] = field(default_factory=list)  # block by block along the row

    def finish(self, W: Tensor, integers: Tensor, H: Tensor, rounds: int) -> Tensor:
        """Return the bytes uint8 (N, row_bytes) of the segment's rows after ``rounds`` rounds of coordinate descent.

        W are the original weights, ``integers`` the compensated integers, (columns, N) each; H is (columns, columns).
        """
        N = W.shape[1]
        W, integers = pad_rows(W), pad_rows(integers)
        scales = Scales.concatenate(self.scales, 0).map(pad_rows)
        return pack(self.grid, *descend(self.grid, W, H, (scales, integers), rounds))[:N]


def column_loop(
    W: Tensor, U: Tensor, importance: Tensor, segments: Sequence[Segment], masks: ColumnMasks | None = None
) -> Tensor:
    """Return integers int8 (columns, R) for W (columns, R), which is overwritten; scales are appended to ``segments``.

    U is (columns, columns); scales are fitted under ``importance`` (columns,). With ``masks`` of the same W, weights
    are pruned in the same pass: kept weights are rounded, and the errors of pruned and kept weights are spread.
    """
    columns, R = W.shape
    integers = torch.empty(columns, R, dtype=torch.int8, device=W.device)
    errors = torch.empty_like(W[:SUPER_BLOCK])
    steps = _Steps(R, segments, W)
    for block in range(0, columns, SUPER_BLOCK):
        stop = min(block + SUPER_BLOCK, columns)
        for start in range(block, stop, PANEL):
            end = start + PANEL
            if masks is not None:
                masks.begin_panel(start, stop)
            steps.refresh(W, importance, start, masks)
            integers[start:end], panel_errors = _round_panel(W[start:end], U[start:end, start:end], steps, start, masks)
            W[end:stop] -= U[start:end, end:stop].T @ panel_errors
            errors[start - block : end - block] = panel_errors
        W[stop:] -= U[block:stop, stop:].T @ errors[: stop - block]
    return integers


class _Steps:
    """Holds the step and offset of every row, for each GRAIN of columns in the current super-block."""

    def __init__(self, R: int, segments: Sequence[Segment], like: Tensor):
        self.segments = segments
        self.step, self.inverse, self.offset = like.new_zeros(3, SUPER_BLOCK // GRAIN, R)
        self.low, self.high = like.new_zeros(2, R)
        self.tables = [(segment.rows, segment.grid) for segment in segments if segment.grid.levels]
        for segment in segments:
            self.low[segment.rows] = segment.grid.low
            self.high[segment.rows] = segment.grid.high

    def refresh(self, W: Tensor, importance: Tensor, start: int, masks: ColumnMasks | None) -> None:
        """Fit the scales of blocks that start at column ``start`` to the kept weights, and freeze them."""
        for segment in self.segments:
            size = segment.grid.format.block_size
            if start % size:
                continue
            columns = slice(start, start + size)
            part = W[columns, segment.rows]
            if masks is not None:
                part = part * masks.kept[columns, segment.rows]
            scales = fit_rows(segment.grid, part, importance[columns])
            segment.scales.append(scales)
            repeat = segment.grid.width // GRAIN
            grains = slice(start % SUPER_BLOCK // GRAIN, (start % SUPER_BLOCK + size) // GRAIN)
            for table, values in ((self.step, scales.step), (self.offset, scales.offset)):
                table[grains, segment.rows] = values[0, :, 0].repeat_interleave(repeat, 0)
            self.inverse[grains, segment.rows] = safe_inverse(self.step[grains, segment.rows])


def _round_panel(W: Tensor, U: Tensor, steps: _Steps, start: int, masks: ColumnMasks | None) -> tuple[Tensor, Tensor]:
    """Return integers and errors / U_jj, (PANEL, R) each, of the panel W (PANEL, R) whose first column is ``start``.

    The error of each column is spread over the rest of the panel, in place; U (PANEL, PANEL) is the panel's part.
    """
    integers, errors = torch.empty_like(W), torch.empty_like(W)
    for j, w in enumerate(W):
        grain = (start + j) % SUPER_BLOCK // GRAIN
        step, offset = steps.step[grain], steps.offset[grain]
        target = w
        if masks is not None:
            masks.begin_column(start + j)
            target = w * masks.kept[start + j]
        q = torch.add(target, offset, out=integers[j]).mul_(steps.inverse[grain])
        for rows, grid in steps.tables:
            grid.nearest(q[rows])
        q.round_().clamp_(steps.low, steps.high)
        error = torch.mul(q, step, out=errors[j]).sub_(offset).sub_(w).div_(-U[j, j])
        W[j + 1 :].addcmul_(U[j, j + 1 :, None], error, value=-1)
    return integers, errors
