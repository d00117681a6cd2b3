"""This module chooses how far an output factor is trusted: its damping, from factors of two halves of the text.

Rows of a tensor are rounded so that errors E, alike in all rows, become dW = M E with M from the Cholesky factor of the
damped S (quantizers.rounding.row_order). By the true S the loss is then tr(S M M^T) times that of one row. S of one
half of the text makes M, S of the other says what it is worth; the damping that is best there is taken. Scores of large
pretrained models have heavy tails, and few tokens decide their factors, so that a damping of 0.1, good for a small
model, makes them worse than none.
"""

import torch
from torch import Tensor

from quantizers.statistics.hessian import inverse_factor

DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of the mean diagonal of S
TRIED_ROWS = 512  # of a factor that are tried


def chosen_damping(first: Tensor, second: Tensor) -> float:
    """Return the damping, relative to the mean diagonal, for the mean of two factors (r, r) of halves of a text.

    The factors are symmetric and positive semidefinite. Raises ValueError for factors that are not, or not finite.
    """
    if not (first.isfinite().all() and second.isfinite().all()):
        raise ValueError("the output factor holds non-finite values: check the gradients of the calibration text")
    one, other = (half[:TRIED_ROWS, :TRIED_ROWS].double() for half in (first, second))
    losses = [_loss(one, other, damping) + _loss(other, one, damping) for damping in DAMPINGS]
    return DAMPINGS[min(range(len(DAMPINGS)), key=losses.__getitem__)]


def _loss(made_of: Tensor, judge: Tensor, damping: float) -> float:
    """Return tr(S M M^T) / tr(S): S is ``judge`` (r, r), and M follows from ``made_of`` (r, r) with ``damping``."""
    power = float(judge.diagonal().sum())
    if not power:
        return 1.0
    U, _ = inverse_factor(made_of, damping)
    M = (U / U.diagonal()[:, None]).T
    return float(torch.sum((judge @ M) * M)) / power
