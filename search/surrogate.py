"""A guess of the loss of genomes not yet evaluated, and how far to trust it, from every evaluation so far.

A Gaussian process (Rasmussen and Williams, Gaussian Processes for Machine Learning) on the logarithm of the loss, which
is the sum of

- a level for each text read and a multiple of the log of the additive table's sum, both with a wide prior;
- choices: a gene's choice may cost more or less than the table says. If it costs l_i (1 + d_i), the log of the sum
  moves by s_i d_i, where s_i = l_i / sum l is its share. The variance of that is s_i^1.5: between relative errors that
  are all alike (2) and absolute ones (1);
- likeness: genomes that differ in few genes deviate alike, exp(-(genes that differ) / 6);
- pairs: quantization moves the logits by d = sum_i d_i, so the KL is nearly d' F d (F: Fisher matrix), whose diagonal
  terms are the table's and whose others are c_ij sqrt(l_i l_j). For unknown independent c_ij the covariance of two
  genomes is the sum over i < j of the products of those roots. It is left out unless the evidence for it is strong;
- noise, by the tokens read.

The variances are those of least leave-one-out predictive density (eq. 5.10 to 5.12), which also sets the scale of the
predicted standard deviations. They come from a coarse grid by coordinate descent rather than from a gradient, so that
the rounding of another BLAS seldom changes them; scikit-learn's regressor has neither that nor the wide effects.

Shapes: N evaluations, M genomes asked about, G genes.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg import solve_triangular
from scipy.linalg.lapack import dpotrf, dpotri

from search.sensitivity import SensitivityTable
from search.types import Fidelity, Genome, Scored

MOST = 320  # evaluations, the latest: the cost is cubic
MOST_FIT = 160  # of these, evenly spread, for the choice of variances
LENGTH = 6.0  # genes, of likeness
CHOICE_POWER = 0.75  # of a share, in a standard deviation
WIDE = 100.0  # prior variance of levels and slope, in units of the data's own
VARIANCES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of a part, in the same units
NOISES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
START = (0.3, 0.3, 0.0, 0.1)  # of the descent: choices, likeness, pairs, noise
SWEEPS = 2
PAIRS = 2  # their place in START
PAIRS_EVIDENCE = 8.0  # nats of leave-one-out density that pairs must gain: with less they cost more than they gave
LEAST_LOSS = 1e-12
LEAST_SPREAD = 1e-9  # of log losses


class Prediction(NamedTuple):
    """Of log_loss: expected values (M,) and standard deviations (M,)."""

    mean: np.ndarray
    deviation: np.ndarray


class _Features(NamedTuple):
    genomes: np.ndarray  # (N, G) int16
    shares: np.ndarray  # (N, G) of the table's sum
    log_sum: np.ndarray  # (N,) of the table, against the median evaluation


def log_loss(losses: Sequence[float] | np.ndarray) -> np.ndarray:
    """(N,) log of positive losses, which keeps their order.

    Losses of the weighted fitness are all negative: minus the log of their magnitude, which keeps it too.
    """
    values = np.asarray(losses, dtype=np.float64)
    logs: np.ndarray = np.log(np.maximum(np.abs(values), LEAST_LOSS))
    return np.where(values < 0, -logs, logs)


def usable(told: Sequence[Scored]) -> list[Scored]:
    """Those with a loss read from text."""
    return [scored for scored in told if math.isfinite(scored.loss) and scored.fidelity.tokens]


class Surrogate:
    """Fitted to ``told``, at least one, all usable; the same for the same evaluations in the same order."""

    def __init__(self, told: Sequence[Scored], table: SensitivityTable | None = None) -> None:
        kept = told[-MOST:]
        self._table = table
        self._reference = 0.0
        self._features = self._features_of([scored.genome for scored in kept])
        self._reference = float(np.median(self._features.log_sum))
        self._features = self._features._replace(log_sum=self._features.log_sum - self._reference)
        self._texts = sorted({scored.fidelity for scored in kept}, key=lambda f: (f.split, f.draw, f.tokens))
        self._text = np.array([self._texts.index(scored.fidelity) for scored in kept])
        tokens = np.array([scored.fidelity.tokens for scored in kept])
        self._noise = tokens.max() / tokens  # (N,)
        logs = log_loss([scored.loss for scored in kept])
        self._centre = float(np.median(logs))
        self._unit = max(float(logs.std()), LEAST_SPREAD)
        self._fit((logs - self._centre) / self._unit)

    def __call__(self, genomes: Sequence[Genome], fidelity: Fidelity) -> Prediction:
        """Expected log losses on the text of ``fidelity``; if none was told of it their common level is unknown."""
        asked = self._features_of(genomes)
        known = self._text == self._texts.index(fidelity) if fidelity in self._texts else np.zeros(len(self._text))
        covariance = WIDE * (known[None, :] + np.outer(asked.log_sum, self._features.log_sum))
        own = WIDE * (float(known.any()) + np.square(asked.log_sum))
        for part, variance in zip(PARTS.values(), self._variances, strict=True):
            if variance:
                covariance += variance * part.covariance(asked, self._features)
                own += variance * part.own(asked)
        whitened = solve_triangular(self._factor, covariance.T, lower=True, check_finite=False)
        variance = np.maximum(own - np.square(whitened).sum(axis=0), 0) + self._noise_variance
        mean = self._centre + self._unit * (covariance @ self._weights)
        return Prediction(mean, self._unit * np.sqrt(self._scale * variance))

    def _features_of(self, genomes: Sequence[Genome]) -> _Features:
        values = np.array(genomes, dtype=np.int16)
        if self._table is None:
            losses = np.ones(values.shape)
        else:
            by_gene = [loss[values[:, g]] for g, loss in enumerate(self._table.loss)]
            losses = np.maximum(np.stack(by_gene, axis=1), 0) + LEAST_LOSS
        total = losses.sum(axis=1)
        return _Features(values, losses / total[:, None], np.log(total) - self._reference)

    def _fit(self, y: np.ndarray) -> None:
        """Variances by an evenly spread part of the data, then weights by all of it."""
        wide = WIDE * ((self._text[:, None] == self._text) + np.outer(self._features.log_sum, self._features.log_sum))
        kernels = [part.covariance(self._features, self._features) for part in PARTS.values()]
        units = [_unit(kernel, part.centred) for kernel, part in zip(kernels, PARTS.values(), strict=True)]
        rows = np.arange(0, len(y), math.ceil(len(y) / MOST_FIT))
        cut = np.ix_(rows, rows)
        scaled = [kernel[cut] / unit for kernel, unit in zip(kernels, units, strict=True)]
        *found, self._noise_variance = _LeaveOneOut(wide[cut], scaled, self._noise[rows], y[rows]).descend()
        self._variances = [variance / unit for variance, unit in zip(found, units, strict=True)]
        covariance = wide + np.diag(self._noise_variance * self._noise)
        for variance, kernel in zip(self._variances, kernels, strict=True):
            covariance += variance * kernel
        self._factor, inverse = _cholesky(covariance)
        self._weights = inverse @ y
        self._scale = float(np.mean(np.square(self._weights) / np.diag(inverse)))


class _LeaveOneOut:
    """The choice of variances for ``y`` (N,), by how well each value is predicted from the others."""

    def __init__(self, wide: np.ndarray, kernels: list[np.ndarray], noise: np.ndarray, y: np.ndarray) -> None:
        self._wide, self._kernels, self._noise, self._y = wide, kernels, noise, y
        self._found: dict[tuple[float, ...], float] = {}

    def descend(self) -> tuple[float, ...]:
        """Variances of PARTS and of the noise."""
        best: tuple[float, ...] = START
        for _ in range(SWEEPS):
            for i in range(len(best)):
                grid = NOISES if i == len(PARTS) else VARIANCES
                best = min(((*best[:i], value, *best[i + 1 :]) for value in grid), key=self._misfit)
        return best

    def _misfit(self, variances: tuple[float, ...]) -> float:
        """Minus the log predictive density in nats, but for a constant, rounded: ties go to the smaller variance."""
        if variances not in self._found:
            covariance = self._wide + np.diag(variances[-1] * self._noise)
            for variance, kernel in zip(variances, self._kernels, strict=False):
                if variance:
                    covariance = covariance + variance * kernel
            _, inverse = _cholesky(covariance)
            left_out = 1 / np.diag(inverse)  # variances
            scale = float(np.mean(np.square(inverse @ self._y) * left_out))
            nats = len(self._y) / 2 * (float(np.log(left_out).mean()) + math.log(max(scale, LEAST_LOSS)))
            self._found[variances] = round(nats + (PAIRS_EVIDENCE if variances[PAIRS] else 0.0), 4)
        return self._found[variances]


def _cholesky(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower factor and inverse of a positive definite matrix."""
    factor, _ = dpotrf(covariance, lower=1, clean=1)
    lower, _ = dpotri(factor, lower=1)
    return factor, lower + np.tril(lower, -1).T


def _unit(kernel: np.ndarray, centred: bool) -> float:
    """Mean variance of a part over the evaluations; 1 where there is none."""
    variance = float(np.trace(kernel)) / len(kernel) - (float(kernel.mean()) if centred else 0.0)
    return variance if variance > LEAST_SPREAD else 1.0


def _coincidence(a: _Features, b: _Features, weight_a: np.ndarray, weight_b: np.ndarray) -> np.ndarray:
    """(N, M) sums, over the genes whose choice is the same in both, of the products of their weights (N, G), (M, G)."""
    offset = (1 + int(max(a.genomes.max(), b.genomes.max()))) * np.arange(b.genomes.shape[1])
    held, column = np.unique(b.genomes + offset, return_inverse=True)  # the P pairs (gene, choice) that b has
    dense_b = np.zeros((len(b.genomes), len(held)), dtype=weight_b.dtype)
    np.put_along_axis(dense_b, column.reshape(b.genomes.shape), weight_b, axis=1)
    pairs = a.genomes + offset
    column = np.minimum(np.searchsorted(held, pairs), len(held) - 1)
    rows, genes = np.nonzero(held[column] == pairs)
    dense_a = np.zeros((len(a.genomes), len(held)), dtype=weight_a.dtype)
    dense_a[rows, column[rows, genes]] = weight_a[rows, genes]
    sums: np.ndarray = dense_a @ dense_b.T
    return sums


def _choices(a: _Features, b: _Features) -> np.ndarray:
    return _coincidence(a, b, a.shares**CHOICE_POWER, b.shares**CHOICE_POWER)


def _likeness(a: _Features, b: _Features) -> np.ndarray:
    one_a, one_b = (np.ones(features.genomes.shape, dtype=np.float32) for features in (a, b))  # counts are exact
    same = _coincidence(a, b, one_a, one_b).astype(np.float64)
    covariance: np.ndarray = np.exp((same - a.genomes.shape[1]) / LENGTH)
    return covariance


def _pairs(a: _Features, b: _Features) -> np.ndarray:
    """Half of (r . s)^2 less its diagonal, over the roots r, s of the shares."""
    covariance: np.ndarray = (np.square(np.sqrt(a.shares) @ np.sqrt(b.shares).T) - a.shares @ b.shares.T) / 2
    return covariance


class _Part(NamedTuple):
    covariance: Callable[[_Features, _Features], np.ndarray]  # (N, M)
    own: Callable[[_Features], np.ndarray]  # (N,), its diagonal
    centred: bool  # its unit is what it varies by around its mean over the evaluations


PARTS = {
    "choices": _Part(_choices, lambda f: (f.shares ** (2 * CHOICE_POWER)).sum(axis=1), True),
    "likeness": _Part(_likeness, lambda f: np.ones(len(f.shares)), False),
    "pairs": _Part(_pairs, lambda f: (1 - np.square(f.shares).sum(axis=1)) / 2, True),
}
