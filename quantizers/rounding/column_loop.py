"""This module runs the column loop of SparseGPT/GPTQ over rows of several formats at once.

Source: Frantar & Alistarh 2022 and 2023, algorithm 1 of both. Columns are rounded in order, and each column's error is
spread over the columns after it; scales are fitted at the start of each block. Legend: U upper with
U^T U = H_damped^-1, W transposed (columns, R) with R rows of all tensors and formats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from types import ModuleType

import torch
from torch import Tensor

from bitgenome.common.replay import replayed, side_by_side
from quantizers.formats.grids import Grid, Scales, safe_inverse
from quantizers.formats.table import SUPER_BLOCK
from quantizers.kernels.choice import PANEL, kernels_for
from quantizers.rounding.nearest import fit_rows
from quantizers.rounding.pruning_masks import ColumnMasks

GRAIN = 16  # columns that share a step in every format
Range = tuple[Grid, int, int]  # first row and the row after the last


@dataclass
class Segment:
    """A Segment is a range of rows of one format in the stack, with the scales fitted to them."""

    grid: Grid
    rows: slice
    scales: list[Scales] = field(default_factory=list)  # super-block by super-block along the row


def column_loop(
    W: Tensor, U: Tensor, importance: Tensor, segments: Sequence[Segment], masks: ColumnMasks | None = None
) -> Tensor:
    """Return integers int8 (columns, R) for W (columns, R), which is overwritten; scales are appended to ``segments``.

    U is (columns, columns); scales are fitted under ``importance`` (columns,). With ``masks`` of the same W, weights
    are pruned in the same pass: kept weights are rounded, and the errors of pruned and kept weights are spread.
    """
    columns, R = W.shape
    integers = torch.empty(columns, R, dtype=torch.int8, device=W.device)
    ranges = tuple((segment.grid, segment.rows.start, segment.rows.stop) for segment in segments)
    for start in range(0, columns, SUPER_BLOCK):
        block = slice(start, min(start + SUPER_BLOCK, columns))
        parts = W[block], U[block, block], importance[block]
        if masks is None:
            found = replayed(_round_super_block, (ranges,), parts)
        else:
            found = _round_super_block(ranges, *parts, masks, start)
        integers[block], errors, *scales = found
        W[block.stop :] -= U[block, block.stop :].T @ errors
        for i, segment in enumerate(segments):
            segment.scales.append(Scales(*scales[4 * i : 4 * i + 4]).map(Tensor.clone))
    return integers


def _round_super_block(
    ranges: tuple[Range, ...],
    W: Tensor,
    U: Tensor,
    importance: Tensor,
    masks: ColumnMasks | None = None,
    first: int = 0,
) -> list[Tensor]:
    """Return integers and errors / U_jj, (K, R) each, of one super-block W (K, R), and the members of its scales.

    W is overwritten; U is (K, K) and ``importance`` (K,). ``masks`` are of all columns, of which the block's first is
    ``first``. The members of the scales come range by range, blocks in order.
    """
    integers, errors = torch.empty_like(W, dtype=torch.int8), torch.empty_like(W)
    steps = _Steps(ranges, W)
    kernels = kernels_for("panels", W) if masks is None else None
    for start in range(0, len(W), PANEL):
        panel = slice(start, start + PANEL)
        if masks is not None:
            masks.begin_panel(first + start, first + len(W))
        steps.refresh(W, importance, start, None if masks is None else masks.kept[first : first + len(W)])
        if kernels is not None:
            steps.round_panel(kernels, W[panel], U[panel, panel], start, (integers[panel], errors[panel]))
        else:
            integers[panel], errors[panel] = _round_panel(W[panel], U[panel, panel], steps, start, masks, first)
        W[panel.stop :] -= U[panel, panel.stop :].T @ errors[panel]
    scales = [Scales.concatenate(found, 0) for found in steps.scales]
    return [integers, errors, *chain.from_iterable(s.members for s in scales)]


class _Steps:
    """Holds the step and offset of every row, for each GRAIN of columns in the current super-block."""

    def __init__(self, ranges: Sequence[Range], like: Tensor):
        self.ranges = [(grid, slice(start, stop)) for grid, start, stop in ranges]
        self.scales: list[list[Scales]] = [[] for _ in ranges]
        R = like.shape[1]
        self.step, self.inverse, self.offset = like.new_zeros(3, SUPER_BLOCK // GRAIN, R)
        self.low, self.high = like.new_zeros(2, R)
        self.tables = [(rows, grid) for grid, rows in self.ranges if grid.levels]
        for grid, rows in self.ranges:
            self.low[rows].fill_(grid.low)
            self.high[rows].fill_(grid.high)

    def refresh(self, W: Tensor, importance: Tensor, start: int, kept: Tensor | None) -> None:
        """Fit the scales of blocks that start at column ``start`` to the kept weights, and freeze them."""
        due = [i for i, (grid, _) in enumerate(self.ranges) if start % grid.format.block_size == 0]
        fits = []
        for grid, rows in (self.ranges[i] for i in due):
            columns = slice(start, start + grid.format.block_size)
            part = W[columns, rows] if kept is None else W[columns, rows] * kept[columns, rows]
            fits.append(partial(fit_rows, grid, part, importance[columns]))
        for i, scales in zip(due, side_by_side(fits), strict=True):
            grid, rows = self.ranges[i]
            self.scales[i].append(scales)
            repeat = grid.width // GRAIN
            grains = slice(start // GRAIN, (start + grid.format.block_size) // GRAIN)
            for table, values in ((self.step, scales.step), (self.offset, scales.offset)):
                table[grains, rows] = values[0, :, 0].repeat_interleave(repeat, 0)
            self.inverse[grains, rows] = safe_inverse(self.step[grains, rows])

    def round_panel(
        self, kernels: ModuleType, W: Tensor, U: Tensor, start: int, results: tuple[Tensor, Tensor]
    ) -> None:
        """Do what ``_round_panel`` does with ``kernels``, into ``results``; W (PANEL, R) stays as it is."""
        grain = start // GRAIN
        parts = []
        for grid, rows in self.ranges:
            scales = [table[grain:, rows] for table in (self.step, self.inverse, self.offset)]
            found = [result[:, rows] for result in results]
            parts.append(partial(kernels.round_panel, W[:, rows], U, scales, GRAIN, grid, *found))
        side_by_side(parts)


def _round_panel(
    W: Tensor, U: Tensor, steps: _Steps, start: int, masks: ColumnMasks | None, first: int
) -> tuple[Tensor, Tensor]:
    """Return integers and errors / U_jj, (PANEL, R) each, of the panel W (PANEL, R) at column ``start`` of its block.

    The error of each column is spread over the rest of the panel, in place; U (PANEL, PANEL) is the panel's part.
    """
    integers, errors = torch.empty_like(W), torch.empty_like(W)
    for j, w in enumerate(W):
        grain = (start + j) // GRAIN
        step, offset = steps.step[grain], steps.offset[grain]
        target = w
        if masks is not None:
            masks.begin_column(first + start + j)
            target = w * masks.kept[first + start + j]
        q = torch.add(target, offset, out=integers[j]).mul_(steps.inverse[grain])
        for rows, grid in steps.tables:
            grid.nearest(q[rows])
        q.round_().clamp_(steps.low, steps.high)
        error = torch.mul(q, step, out=errors[j]).sub_(offset).sub_(w).div_(-U[j, j])
        W[j + 1 :].addcmul_(U[j, j + 1 :, None], error, value=-1)
    return integers, errors
