"""Which weights to prune: the OBS mask rule, unstructured and n:m (Frantar & Alistarh 2023, sections 3.2 and 3.3).

Removing w_j and making up for it with the columns after it costs w_j^2 / [H^-1]_jj, the inverse that of the columns
j and later, which is (w_j / U_jj)^2. The cheapest weights go. Legend: W transposed (columns, R), R rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantizers.settings import Sparsity

MASK_BLOCK = 128  # columns whose unstructured mask is chosen at once, over all rows of the tensor together


def unstructured_mask(scores: Tensor, fraction: float) -> Tensor:
    """The lowest ``fraction`` of all ``scores`` (columns, R), bool; among equals, those of the first columns."""
    pruned = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    pruned[scores.flatten().argsort(stable=True)[: round(fraction * scores.numel())]] = True
    return pruned.view_as(scores)


def group_mask(scores: Tensor, zeros: int, group: int) -> Tensor:
    """The ``zeros`` lowest of every ``group`` scores of each row, (columns, R) bool; among equals the first ones."""
    groups = scores.unflatten(0, (-1, group))
    lowest = groups.argsort(dim=1, stable=True)[:, :zeros]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, lowest, True).view_as(scores)


class ColumnMasks:
    """The masks of a stack W (columns, R) while the column loop compensates it in place.

    ``importance`` (columns,) is 1 / U_jj^2 up to a factor, 0 or nearly so in dead columns; ``rules`` say which rows
    are pruned how, those of one tensor together. ``kept`` (columns, R), bool, holds the choice for the columns that
    the loop has reached, and for the rest of the scale blocks begun the choice that the present weights suggest, so
    that their scales can be fitted.
    """

    def __init__(self, W: Tensor, importance: Tensor, rules: Sequence[tuple[slice, Sparsity]]):
        self.W = W
        self.importance = importance
        self.rules = rules
        self.kept = torch.ones(W.shape, dtype=torch.bool, device=W.device)

    def begin_panel(self, start: int, stop: int) -> None:
        """Choose, as far as the present weights tell, the masks of ``start:stop``, the rest of a scale block.

        An unstructured mask is final where a mask block begins, and later calls within that block leave it.
        """
        for rows, sparsity in self.rules:
            if sparsity.group:
                self._choose(rows, sparsity, slice(start, stop))
            elif start % MASK_BLOCK == 0:
                for first in range(start, stop, MASK_BLOCK):
                    self._choose(rows, sparsity, slice(first, min(first + MASK_BLOCK, stop)))

    def begin_column(self, column: int) -> None:
        """Choose the n:m groups that begin at ``column``, whose weights are compensated up to here."""
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
    """SparseGPT without quantization: W (columns, R) is overwritten with the compensated weights that are kept.

    Returns ``kept``, bool (columns, R); the pruned weights are exactly 0. U upper with U^T U = H_damped^-1.
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
