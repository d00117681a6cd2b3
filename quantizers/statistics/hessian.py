"""This module computes the Hessian of a linear layer's squared output error, and the factor of its inverse.

For ``y = W x`` over n inputs, mean |dW x|^2 = tr(dW H dW^T) with H = sum(x x^T) / n: half of the usual 2/n (Frantar &
Alistarh 2022, equation 1), so that errors are directly mean squared output errors. A constant factor of H cancels in
every rounding decision.
"""

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)

DAMPING_STEP = 10.0  # factor between attempts at a factorization
FIRST_DAMPING = 1e-4  # of the second attempt, after a damping of 0
LAST_DAMPING = 100.0
INVERSE_BLOCK = 512  # columns of a triangular matrix inverted at once
SMALLEST_PIVOT = 1e-12  # relative to the mean diagonal; below it a float64 factor is noise


class HessianAccumulator:
    """Accumulates the sum of x x^T over input vectors x of ``columns`` features.

    Calibration (evaluators/prepare/calibration.py) adds what its hooks see of every layer's input. Each ``add``
    multiplies in float32 (relative accuracy about 1e-6 of the diagonal) and accumulates in float64.
    """

    def __init__(self, columns: int, device: torch.device | None = None):
        self.columns = columns
        self.count = 0  # input vectors seen
        self._sum = torch.zeros(columns, columns, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Add the vectors of x (..., columns) to the sum. Raises ValueError for another number of features."""
        if x.shape[-1] != self.columns:
            raise ValueError(f"expected inputs of {self.columns} features, got {x.shape[-1]}")
        vectors = x.detach().reshape(-1, self.columns).float()
        self._sum += vectors.T @ vectors
        self.count += len(vectors)

    def matrix(self) -> Tensor:
        """Return H float32 (columns, columns), symmetric. Raises ValueError before the first input."""
        if self.count == 0:
            raise ValueError("the Hessian has seen no input")
        return (self._sum / self.count).float()

    def importance(self) -> Tensor:
        """Return diag(H), float32 (columns,): the mean square of each feature, the values of llama.cpp's imatrix.

        Raises ValueError before the first input.
        """
        return self.matrix().diagonal()


def check_hessian(H: Tensor, columns: int) -> None:
    """Raise ValueError unless H is a finite (columns, columns) matrix with a non-negative diagonal.

    A layer whose input is always zero has a zero H: any rounding of it is right.
    """
    if H.shape != (columns, columns):
        raise ValueError(f"expected a Hessian of shape ({columns}, {columns}), got {tuple(H.shape)}")
    if not H.isfinite().all():
        raise ValueError(
            f"the Hessian holds {int((~H.isfinite()).sum())} non-finite values: check the calibration inputs"
        )
    if (H.diagonal() < 0).any():
        raise ValueError(
            f"the Hessian has {int((H.diagonal() < 0).sum())} negative diagonal values, expected sums of squares"
        )


def damped(H: Tensor, damping: float) -> Tensor:
    """Return H + damping * mean(diag H) * I, float64 (columns, columns).

    Dead columns (H_jj = 0) are decoupled: their other entries become 0, and the mean is added to their diagonal too.
    Where all columns are dead the mean is taken as 1, so that nothing is compensated and all columns weigh the same.
    """
    H = H.double().clone()
    diagonal = H.diagonal()
    mean = diagonal.mean()
    mean = torch.where(mean == 0, 1.0, mean)
    dead = diagonal == 0
    H[dead, :] = 0
    H[:, dead] = 0
    H.diagonal().add_(damping * mean + dead * mean)
    return H


def invert_upper(R: Tensor) -> None:
    """Replace upper triangular R (columns, columns) by its inverse, in place, one block of columns after the other."""
    for start in range(0, len(R), INVERSE_BLOCK):
        block = slice(start, start + INVERSE_BLOCK)
        identity = torch.eye(len(R[block]), dtype=R.dtype, device=R.device)
        R[block, block] = torch.linalg.solve_triangular(R[block, block], identity, upper=True)
        R[:start, block] = -(R[:start, :start] @ R[:start, block]) @ R[block, block]


def inverse_factor(H: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return U float64 (columns, columns), upper triangular with U^T U = damped(H)^-1, and the damping used.

    H = R R^T with R upper (Cholesky from the last row and column) and U = R^-1: one factorization, no explicit inverse
    of H. ``damping`` is relative to the mean diagonal. A factorization that fails is repeated with ten times the
    damping, with a warning. Raises ValueError if none works up to LAST_DAMPING.
    """
    attempt = damping
    while attempt <= LAST_DAMPING:
        regular = damped(H, attempt).flip(0, 1)
        smallest = SMALLEST_PIVOT * regular.diagonal().mean()
        L, info = torch.linalg.cholesky_ex(regular)
        del regular  # in a wide layer, each of these matrices takes gigabytes
        if not info.any() and L.diagonal().square().min() > smallest:
            U = L.flip(0, 1)
            del L
            invert_upper(U)
            return U, attempt
        stronger = max(attempt * DAMPING_STEP, FIRST_DAMPING)
        log.warning("Hessian of %d columns is singular at damping %g, trying %g", len(H), attempt, stronger)
        attempt = stronger
    lowest = float(torch.linalg.eigvalsh(H.double()).min())
    raise ValueError(
        f"the Hessian is not positive semidefinite: smallest eigenvalue {lowest:g} at a mean diagonal of "
        f"{float(H.diagonal().mean()):g}, and damping of {LAST_DAMPING:g} did not help"
    )
