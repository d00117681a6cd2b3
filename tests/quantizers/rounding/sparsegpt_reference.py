"""SparseGPT as published (Frantar & Alistarh 2023, algorithm 1 and section 3.5), in float64, for clarity not speed.

Weights are (rows, columns) as in the paper; every update goes to all later columns at once, which is what the paper's
lazy batches amount to.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MaskRule = Callable[[Tensor], Tensor]  # scores (rows, columns) -> which weights are kept


def keep_all_but(fraction: float) -> MaskRule:
    """The (1 - fraction) of all weights with the largest scores."""

    def rule(scores: Tensor) -> Tensor:
        order = sorted(range(scores.numel()), key=lambda i: float(scores.flatten()[i]))
        kept = torch.ones(scores.numel(), dtype=torch.bool)
        kept[order[: round(fraction * scores.numel())]] = False
        return kept.view_as(scores)

    return rule


def keep_all_but_n(zeros: int) -> MaskRule:
    """In every row all but the ``zeros`` smallest scores."""

    def rule(scores: Tensor) -> Tensor:
        return torch.stack([torch.argsort(torch.argsort(row)) >= zeros for row in scores])

    return rule


def sparsegpt(
    W: Tensor, H: Tensor, mask_every: int, rule: MaskRule, quant: Callable[[int, Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Pruned (and, by ``quant`` of column number and weights, quantized) W, and the mask of what is kept.

    ``H`` (columns, columns) is damped already; ``mask_every`` is B_s, the columns whose mask is chosen at once.
    """
    W, M = W.double().clone(), torch.ones(W.shape, dtype=torch.bool)
    U = torch.linalg.cholesky(torch.linalg.inv(H.double()), upper=True)  # the paper's H^-1 from its second line on
    for j in range(W.shape[1]):
        if j % mask_every == 0:
            columns = slice(j, min(j + mask_every, W.shape[1]))
            M[:, columns] = rule(W[:, columns] ** 2 / U.diagonal()[columns] ** 2)
        kept = W[:, j] if quant is None else quant(j, W[:, j])
        target = torch.where(M[:, j], kept, 0.0)
        error = (W[:, j] - target) / U[j, j]
        W[:, j] = target
        W[:, j + 1 :] -= torch.outer(error, U[j, j + 1 :])
    return W, M
