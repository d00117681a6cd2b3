"""This module computes the Hessian of a linear layer's squared output error, and the factor of its inverse.

For ``y = W x`` over n inputs, mean |dW x|^2 = tr(dW H dW^T) with H = sum(x x^T) / n: half of the usual 2/n (Frantar &
Alistarh 2022, equation 1), so that errors are directly mean squared output errors. A constant factor of H cancels in
every rounding decision.
"""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

DAMPING_STEP = 10.0  # factor between attempts at a factorization
FIRST_DAMPING = 1e-4  # of the second attempt, after a damping of 0
LAST_DAMPING = 100.0
INVERSE_BLOCK = 512  # columns of a triangular matrix inverted at once
BLOCK_ENTRIES = 1 << 22  # of a matrix that are copied at once; a layer of 28,672 columns has 200 times as many
SMALLEST_PIVOT = 1e-12  # relative to the mean diagonal; below it a float64 factor is noise


class HessianAccumulator:
    """Accumulates the sum of x x^T over input vectors x of ``columns`` features.

    Calibration (evaluators/prepare/calibration.py) adds what its hooks see of every layer's input. Each ``add``
    multiplies in float32 (relative accuracy about 1e-6 of the diagonal) and accumulates in float64.
    """

    def __init__(self, columns: int, device: torch.device | None = None):
        self.columns = columns
        self.count = 0  # input vectors seen
        self.sum = torch.zeros(columns, columns, dtype=torch.float64, device=device)  # of x x^T

    def add(self, x: Tensor) -> None:
        """Add the vectors of x (..., columns) to the sum. Raises ValueError for another number of features."""
        if x.shape[-1] != self.columns:
            raise ValueError(f"expected inputs of {self.columns} features, got {x.shape[-1]}")
        vectors = x.detach().reshape(-1, self.columns).float()
        self.sum += vectors.T @ vectors
        self.count += len(vectors)

    def matrix(self) -> Tensor:
        """Return H float32 (columns, columns), symmetric. Raises ValueError before the first input."""
        if self.count == 0:
            raise ValueError("the Hessian has seen no input")
        H = torch.empty_like(self.sum, dtype=torch.float32)
        rows = max(1, BLOCK_ENTRIES // self.columns)
        for target, part in zip(H.split(rows), self.sum.split(rows), strict=True):
            target.copy_(part / self.count)
        return H

    def importance(self) -> Tensor:
        """Return diag(H), float32 (columns,): the mean square of each feature, the values of llama.cpp's imatrix.

        Raises ValueError before the first input.
        """
        return self.matrix().diagonal()


def joined(accumulators: Iterable[HessianAccumulator]) -> HessianAccumulator:
    """Return an accumulator that has seen what ``accumulators``, at least one, have seen."""
    first, *others = accumulators
    total = HessianAccumulator(first.columns, first.sum.device)
    for accumulator in (first, *others):
        total.sum += accumulator.sum
        total.count += accumulator.count
    return total


def mean_of(accumulators: Iterable[HessianAccumulator]) -> Tensor:
    """Return the Hessian over all inputs that ``accumulators`` have seen, float64 (columns, columns).

    Raises ValueError before the first input.
    """
    total = joined(accumulators)
    if total.count == 0:
        raise ValueError("the Hessians have seen no input")
    return total.sum / total.count


def shrunk(own: HessianAccumulator | None, mean: Tensor, strength: float) -> Tensor:
    """Return H float32 (columns, columns) as if ``strength`` more inputs, of the Hessian ``mean``, had been seen.

    None has seen no input of its own.
    """
    if own is None:
        return mean.float()
    return ((own.sum + strength * mean) / (own.count + strength)).float()


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


def damped(H: Tensor, damping: float, out: Tensor | None = None) -> Tensor:
    """Return H + damping * mean(diag H) * I (columns, columns) in ``out``, by default a new float64 matrix.

    Dead columns (H_jj = 0) are decoupled: their other entries become 0, and the mean is added to their diagonal too.
    Where all columns are dead the mean is taken as 1, so that nothing is compensated and all columns weigh the same.
    Whatever the type of ``out``, the diagonal is computed in float64.
    """
    regular = torch.empty_like(H, dtype=torch.float64) if out is None else out
    diagonal = H.diagonal().double()
    mean, dead = diagonal.mean(), diagonal == 0
    mean = torch.where(mean == 0, 1.0, mean)
    regular.copy_(H)
    regular[dead, :] = 0
    regular[:, dead] = 0
    regular.diagonal().copy_(diagonal + (damping * mean + dead * mean))
    return regular


def reverse(matrix: Tensor) -> None:
    """Turn the order of both rows and columns of a contiguous ``matrix`` around, in place."""
    flat = matrix.view(-1)
    half, length = len(flat) // 2, len(flat)
    for start in range(0, half, BLOCK_ENTRIES):
        stop = min(start + BLOCK_ENTRIES, half)
        first, last = flat[start:stop], flat[length - stop : length - start]
        turned = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(turned)


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
    damping, with a warning. It all happens in one float64 matrix: at 28,672 columns one takes 6.6 GB. Raises
    ValueError if none works up to LAST_DAMPING.
    """
    attempt = damping
    memory = torch.empty(H.shape, dtype=torch.float64, device=H.device)
    U = memory.T  # LAPACK factors in place what lies column by column
    while attempt <= LAST_DAMPING:
        damped(H, attempt, U)
        reverse(memory)
        smallest = SMALLEST_PIVOT * U.diagonal().mean()
        _, info = torch.linalg.cholesky_ex(U, out=(U, torch.empty(0, dtype=torch.int32, device=H.device)))
        if not info.any() and U.diagonal().square().min() > smallest:
            reverse(memory)
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
