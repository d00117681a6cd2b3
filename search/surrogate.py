"""A cheap guess of the loss of genomes not yet evaluated, to choose among offspring before evaluation.

Mean: the additive table, scaled to the losses seen. Correction: a Gaussian process over what the table got wrong, under
the kernel that predicts each loss seen best from the others (leave-one-out: Rasmussen and Williams, Gaussian Processes
for Machine Learning, eq. 5.12). There are two kinds of kernel:

- pairs: quantization moves the logits by d = sum_i d_i, so the KL is nearly d' F d (F: Fisher matrix), whose diagonal
  terms are the table's losses l_i and whose others are c_ij sqrt(l_i l_j). For unknown independent c_ij of equal
  variance the covariance of two genomes is sum_{i<j} of the products of those roots;
- likeness: exp(-(genes that differ) / length), which supposes nothing but that neighbours are alike.

Shapes: N genomes seen, M genomes asked about, G genes.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from search.sensitivity import SensitivityTable
from search.types import Genome

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (M, G), (N, G) genomes to (M, N) covariances

LENGTHS = (2.0, 6.0, 20.0)  # genes
NOISES = (1e-4, 1e-2, 1e-1, 1.0)  # variance, where a genome's own prior variance is about 1
KEPT_SHARE = 0.75  # the worst losses say little of the optimum, and would set the scale
KEPT_MOST = 320  # for the cost is cubic


class Surrogate:
    """Fitted to ``told`` (genome, loss), at least one, all losses finite."""

    def __init__(self, told: Sequence[tuple[Genome, float]], table: SensitivityTable | None = None) -> None:
        kept = sorted(told, key=lambda pair: pair[1])[: min(KEPT_MOST, math.ceil(KEPT_SHARE * len(told)))]
        self._genomes = np.array([genome for genome, _ in kept], dtype=np.int16)  # (N, G)
        losses = np.array([loss for _, loss in kept])
        self._table = table
        self._scale, self._shift = self._line(losses)
        self._fit(losses - self._mean(self._genomes))

    def __call__(self, genomes: Sequence[Genome]) -> np.ndarray:
        """(M,) expected losses."""
        asked = np.array(genomes, dtype=np.int16)
        result: np.ndarray = self._mean(asked) + self._kernel(asked, self._genomes) @ self._weights
        return result

    def _line(self, losses: np.ndarray) -> tuple[float, float]:
        """Slope, never negative, and intercept of losses over what the table predicts."""
        if self._table is None:
            return 0.0, float(losses.mean())
        predicted = _by_gene(self._table, self._genomes).sum(axis=1)
        spread = float(predicted.var())
        slope = max(0.0, float(np.mean((predicted - predicted.mean()) * losses)) / spread) if spread else 0.0
        return slope, float(losses.mean() - slope * predicted.mean())

    def _mean(self, genomes: np.ndarray) -> np.ndarray:
        if self._table is None:
            return np.full(len(genomes), self._shift)
        return self._shift + self._scale * _by_gene(self._table, genomes).sum(axis=1)

    def _fit(self, residuals: np.ndarray) -> None:
        """Weights under the kernel and noise of least leave-one-out error."""
        kernels: list[Kernel] = [partial(_likeness, length=length) for length in LENGTHS]
        kernels += [] if self._table is None else [partial(_pairs, table=self._table)]
        least = np.inf
        for kernel in kernels:
            covariance = kernel(self._genomes, self._genomes)
            unit = float(np.trace(covariance)) / len(residuals) or 1.0
            for noise in NOISES:
                inverse = np.linalg.inv(covariance + noise * unit * np.eye(len(residuals)))
                weights = inverse @ residuals
                error = float(np.square(weights / np.diag(inverse)).sum())
                if error < least:
                    least, self._kernel, self._weights = error, kernel, weights


def _by_gene(table: SensitivityTable, genomes: np.ndarray) -> np.ndarray:
    """(N, G) loss that the table gives each gene of (N, G) genomes."""
    return np.stack([values[genomes[:, g]] for g, values in enumerate(table.loss)], axis=1)


def _pairs(a: np.ndarray, b: np.ndarray, table: SensitivityTable) -> np.ndarray:
    """sum_{i<j} r_i r_j s_i s_j over the roots r, s of the genes' losses: half of (r . s)^2 less its diagonal."""
    roots_a, roots_b = (np.sqrt(np.maximum(_by_gene(table, genomes), 0)) for genomes in (a, b))
    covariance: np.ndarray = (np.square(roots_a @ roots_b.T) - np.square(roots_a) @ np.square(roots_b).T) / 2
    return covariance


def _likeness(a: np.ndarray, b: np.ndarray, length: float) -> np.ndarray:
    """exp(-(genes that differ) / length)."""
    differ = np.array([np.count_nonzero(b != row, axis=1) for row in a], dtype=np.float64)
    return np.exp(-differ / length)
