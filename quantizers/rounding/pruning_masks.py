"""This module selects the weights to prune by the OBS rule, unstructured and n:m.

Source: Frantar & Alistarh 2023, sections 3.2 and 3.3. Removing w_j and compensating with the columns after it costs
w_j^2 / [H^-1]_jj, where H is restricted to columns j and later; this is (w_j / U_jj)^2. The cheapest weights are
pruned. Legend: W transposed (columns, R), R rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantizers.settings import Sparsity

MASK_BLOCK = 128  # columns whose unstructured mask is chosen at once, over all rows of the tensor together


def unstructured_mask(scores: Tensor, fraction: float) -> Tensor:
    """Return a bool mask of the lowest ``fraction`` of all ``scores`` (columns, R); of equals the first are taken."""
    pruned = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    pruned[scores.flatten().argsort(stable=True)[: round(fraction * scores.numel())]] = True
    return pruned.view_as(scores)


def group_mask(scores: Tensor, zeros: int, group: int) -> Tensor:
    """Return a bool mask (columns, R) of the ``zeros`` lowest in every ``group`` neighbouring scores of each row.

    ``scores`` are (columns, R), columns a multiple of ``group``; of equal scores the first are taken.
    """
    groups = scores.unflatten(0, (-1, group))
    lowest = groups.argsort(dim=1, stable=True)[:, :zeros]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, lowest, True).view_as(scores)


class ColumnMasks:
    """Holds the masks of a stack W (columns, R) and updates them while the column loop compensates W in place.

    ``importance`` (columns,) is 1 / U_jj^2 up to a factor, and 0 or nearly 0 in dead columns. ``rules`` give the
    sparsity of ranges of rows; the rows of one tensor are one range, pruned together. ``kept``, bool (columns, R), is
    final for the columns that the loop has reached. For the rest of the scale blocks it has started, ``kept`` is the
    choice by the current weights, so that their scales can be fitted.
    """

    def __init__(self, W: Tensor, importance: Tensor, rules: Sequence[tuple[slice, Sparsity]]):
        self.W = W
        self.importance = importance
        self.rules = rules
        self.kept = torch.ones(W.shape, dtype=torch.bool, device=W.device)

    def begin_panel(self, start: int, stop: int) -> None:
        """Choose the masks of columns ``start:stop``, the rest of a scale block, by the current weights.

        An unstructured mask is final once ``start`` is the first column of its mask block; later calls leave it alone.
        """
        for rows, sparsity in self.rules:
            if sparsity.group:
                self._choose(rows, sparsity, slice(start, stop))
            elif start % MASK_BLOCK == 0:
                for first in range(start, stop, MASK_BLOCK):
                    self._choose(rows, sparsity, slice(first, min(first + MASK_BLOCK, stop)))

    def begin_column(self, column: int) -> None:
        """Choose the masks of n:m groups that start at ``column``, for all of which earlier errors have been spread."""
        for rows, sparsity in self.rules:
            if sparsity.group and column % sparsity.group == 0:
                self._choose(rows, sparsity, slice(column, column + sparsity.group))

    def _choose(self, rows: slice, sparsity: Sparsity, columns: slice) -> None:
        scores = self.W[columns, rows].square() * self.importance[columns, None]
        if sparsity.group:
            pruned = group_mask(scores, sparsity.zeros, sparsity.group)
        else:
            pruned = unstructured_mask(scores, sparsity.fraction)
        self.kept[columns, rows] = ~pruned


def prune_columns(W: Tensor, U: Tensor, importance: Tensor, sparsity: Sparsity) -> Tensor:
    """Prune W (columns, R) by SparseGPT without quantization, in place, and return ``kept``, bool (columns, R).

    W then holds the compensated weights, and exactly 0 where pruned. U (columns, columns) is upper with
    U^T U = H_damped^-1; ``importance`` (columns,) is as for ``ColumnMasks``.
    """
    masks = ColumnMasks(W, importance, [(slice(None), sparsity)])
    for start in range(0, len(W), MASK_BLOCK):
        stop = min(start + MASK_BLOCK, len(W))
        errors = torch.empty_like(W[start:stop])
        masks.begin_panel(start, stop)
        for j in range(start, stop):
            masks.begin_column(j)
            error = torch.where(masks.kept[j], 0.0, W[j]).div_(U[j, j])
            W[j + 1 : stop].addcmul_(U[j, j + 1 : stop, None], error, value=-1)
            errors[j - start] = error
        W[stop:] -= U[start:stop, stop:].T @ errors
    W.mul_(masks.kept)
    return masks.kept
