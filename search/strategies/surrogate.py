"""A surrogate that predicts the loss of genomes not yet evaluated, and how far to trust the prediction.

It is a Gaussian process (Rasmussen and Williams, Gaussian Processes for Machine Learning) fitted to the evaluations so
far. It models the logarithm of the loss as the sum of

- a level for each text read, and a multiple of the log of the additive table's sum, both with a wide prior;
- choices: a gene's choice may cost more or less than the table says. If it costs l_i (1 + d_i), the log of the sum
  moves by s_i d_i, where s_i = l_i / sum l is its share. The variance of that is s_i^1.5, between exponent 2 (all
  relative errors alike) and exponent 1 (absolute errors). Part of it is shared by all texts, part belongs to one text;
- likeness: genomes that differ in few genes deviate alike, exp(-(genes that differ) / 6);
- pairs: quantization moves the logits by d = sum_i d_i, so the KL is nearly d' F d (F: Fisher matrix). Its diagonal
  terms are the table's; the others are c_ij sqrt(l_i l_j). For unknown independent c_ij the covariance of two genomes
  is the sum over i < j of the products of those roots. It is left out unless the evidence for it is strong;
- noise, which depends on the tokens read.

The variances maximize the leave-one-out predictive density (eq. 5.10 to 5.12), which also sets the scale of the
predicted standard deviations. They come from a coarse grid by coordinate descent rather than from a gradient, so that
the rounding of another BLAS seldom changes them; scikit-learn's regressor has neither that nor the wide effects.

Shapes: N evaluations, M genomes asked about, G genes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg import solve_triangular
from scipy.linalg.lapack import dpotrf, dpotri

from search.allocation.sensitivity import SensitivityTable
from search.types import Fidelity, Genome, Scored

MOST = 320  # latest evaluations used: the cost is cubic in their number
MOST_FIT = 160  # of these, evenly spread, used to choose the variances
LENGTH = 6.0  # length scale of likeness, in genes
CHOICE_POWER = 0.75  # power of a share in the standard deviation of its choice
WIDE = 100.0  # prior variance of levels and slope, in units of the data's own
VARIANCES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # grid for the variance of a part, in the same units
NOISES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
PARTS = ("choices", "choices of a text", "likeness", "pairs")
START = (0.3, 0.0, 0.3, 0.0, 0.1)  # of the coordinate descent: PARTS, then noise
SWEEPS = 2
TEXTS, PAIRS = 1, 3  # indices of these in PARTS
PAIRS_EVIDENCE = 8.0  # nats of leave-one-out density that pairs must gain: with less they did more harm than good
NEW_TEXT = -1
LEAST_LOSS = 1e-12
LEAST_SPREAD = 1e-9  # of log losses


class Prediction(NamedTuple):
    """A prediction of log_loss holds expected values (M,) and standard deviations (M,)."""

    mean: np.ndarray
    deviation: np.ndarray


class _Features(NamedTuple):
    """Holds what the covariances need to know of N genomes."""

    genomes: np.ndarray  # (N, G) int16
    shares: np.ndarray  # (N, G) share of each gene in the table's sum
    log_sum: np.ndarray  # (N,) log of the table's sum, relative to the median evaluation
    text: np.ndarray  # (N,) index of the text read; NEW_TEXT: no evaluation has read it


def log_loss(losses: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the logarithm (N,) of positive ``losses`` (N,), which keeps their order.

    Losses of the weighted fitness are all negative; for them it is minus the log of their magnitude, which keeps their
    order too.
    """
    values = np.asarray(losses, dtype=np.float64)
    logs: np.ndarray = np.log(np.maximum(np.abs(values), LEAST_LOSS))
    return np.where(values < 0, -logs, logs)


def usable(told: Sequence[Scored]) -> list[Scored]:
    """Return the scored genomes that have a finite loss measured on text."""
    return [scored for scored in told if math.isfinite(scored.loss) and scored.fidelity.tokens]


class Surrogate:
    """A surrogate is fitted to the latest MOST of ``told``, which holds at least one genome, all of them usable.

    It is the same for the same evaluations in the same order. Without a ``table`` all genes have equal shares.
    """

    def __init__(self, told: Sequence[Scored], table: SensitivityTable | None = None) -> None:
        kept = told[-MOST:]
        self._table = table
        self._reference = 0.0
        self._texts = sorted({scored.fidelity for scored in kept}, key=lambda f: (f.split, f.draw, f.tokens))
        features = self._features_of([scored.genome for scored in kept], [scored.fidelity for scored in kept])
        self._reference = float(np.median(features.log_sum))
        self._features = features._replace(log_sum=features.log_sum - self._reference)
        tokens = np.array([scored.fidelity.tokens for scored in kept])
        self._tokens = int(tokens.max())
        self._noise = self._tokens / tokens  # (N,)
        logs = log_loss([scored.loss for scored in kept])
        self._centre = float(np.median(logs))
        self._unit = max(float(logs.std()), LEAST_SPREAD)
        self._fit((logs - self._centre) / self._unit)

    def __call__(self, genomes: Sequence[Genome], fidelity: Fidelity) -> Prediction:
        """Return the expected log losses of M ``genomes`` on the text of ``fidelity``, with their standard deviations.

        If no evaluation has read that text, its level and its own deviations are unknown, and the standard deviations
        do not include them.
        """
        asked = self._features_of(genomes, [fidelity] * len(genomes))
        covariance = _wide(asked, self._features)
        own = WIDE * ((asked.text != NEW_TEXT) + np.square(asked.log_sum))
        for v, part, diagonal in zip(self._variances, _parts(asked, self._features), _own(asked), strict=True):
            covariance += v * part
            own += v * diagonal
        whitened = solve_triangular(self._factor, covariance.T, lower=True, check_finite=False)
        variance = np.maximum(own - np.square(whitened).sum(axis=0), 0)
        variance += self._noise_variance * self._tokens / fidelity.tokens
        mean = self._centre + self._unit * (covariance @ self._weights)
        return Prediction(mean, self._unit * np.sqrt(self._scale * variance))

    def _features_of(self, genomes: Sequence[Genome], texts: Sequence[Fidelity]) -> _Features:
        values = np.array(genomes, dtype=np.int16)
        if self._table is None:
            losses = np.ones(values.shape)
        else:
            by_gene = [loss[values[:, g]] for g, loss in enumerate(self._table.loss)]
            losses = np.maximum(np.stack(by_gene, axis=1), 0) + LEAST_LOSS
        total = losses.sum(axis=1)
        text = np.array([self._texts.index(t) if t in self._texts else NEW_TEXT for t in texts])
        return _Features(values, losses / total[:, None], np.log(total) - self._reference, text)

    def _fit(self, y: np.ndarray) -> None:
        """Choose the variances on an evenly spread part of ``y`` (N,), then compute the weights from all of it."""
        wide = _wide(self._features, self._features)
        kernels = _parts(self._features, self._features)
        units = [_unit(kernel, part != "likeness") for kernel, part in zip(kernels, PARTS, strict=True)]
        rows = np.arange(0, len(y), math.ceil(len(y) / MOST_FIT))
        cut = np.ix_(rows, rows)
        scaled = [kernel[cut] / unit for kernel, unit in zip(kernels, units, strict=True)]
        grids: list[Sequence[float]] = [VARIANCES] * len(PARTS)
        if len(self._texts) == 1:
            grids[TEXTS] = (0.0,)  # with one text it cannot be told from the choices of all texts
        fit = _LeaveOneOut(wide[cut], scaled, self._noise[rows], y[rows])
        *found, self._noise_variance = fit.descend([*grids, NOISES])
        self._variances = [variance / unit for variance, unit in zip(found, units, strict=True)]
        covariance = wide + np.diag(self._noise_variance * self._noise)
        for variance, kernel in zip(self._variances, kernels, strict=True):
            covariance += variance * kernel
        self._factor, inverse = _cholesky(covariance)
        self._weights = inverse @ y
        self._scale = float(np.mean(np.square(self._weights) / np.diag(inverse)))


class _LeaveOneOut:
    """Chooses the variances for ``y`` (N,) by how well each value is predicted from the others."""

    def __init__(self, wide: np.ndarray, kernels: list[np.ndarray], noise: np.ndarray, y: np.ndarray) -> None:
        self._wide, self._kernels, self._noise, self._y = wide, kernels, noise, y
        self._found: dict[tuple[float, ...], float] = {}

    def descend(self, grids: Sequence[Sequence[float]]) -> tuple[float, ...]:
        """Return the variances of PARTS and of the noise, each from its grid."""
        best: tuple[float, ...] = START
        for _ in range(SWEEPS):
            for i, grid in enumerate(grids):
                best = min(((*best[:i], value, *best[i + 1 :]) for value in grid), key=self._misfit)
        return best

    def _misfit(self, variances: tuple[float, ...]) -> float:
        """Return minus the log predictive density in nats, up to a constant.

        It is rounded, so that ties go to the smaller variance.
        """
        if variances not in self._found:
            covariance = self._wide + np.diag(variances[-1] * self._noise)
            for variance, kernel in zip(variances, self._kernels, strict=False):
                if variance:
                    covariance = covariance + variance * kernel
            _, inverse = _cholesky(covariance)
            left_out = 1 / np.diag(inverse)  # leave-one-out variances
            scale = float(np.mean(np.square(inverse @ self._y) * left_out))
            nats = len(self._y) / 2 * (float(np.log(left_out).mean()) + math.log(max(scale, LEAST_LOSS)))
            self._found[variances] = round(nats + (PAIRS_EVIDENCE if variances[PAIRS] else 0.0), 4)
        return self._found[variances]


def _cholesky(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower Cholesky factor and the inverse of a positive definite matrix."""
    factor, _ = dpotrf(covariance, lower=1, clean=1)
    lower, _ = dpotri(factor, lower=1)
    return factor, lower + np.tril(lower, -1).T


def _unit(kernel: np.ndarray, centred: bool) -> float:
    """Return the mean variance of a part over the evaluations; 1 if it has none."""
    variance = float(np.trace(kernel)) / len(kernel) - (float(kernel.mean()) if centred else 0.0)
    return variance if variance > LEAST_SPREAD else 1.0


def _coincidence(a: _Features, b: _Features, weight_a: np.ndarray, weight_b: np.ndarray) -> np.ndarray:
    """Return sums (N, M), over the genes whose choice is the same in both, of the products of their weights.

    ``weight_a`` is (N, G), ``weight_b`` is (M, G).
    """
    genes, choices = b.genomes.shape[1], 1 + int(max(a.genomes.max(), b.genomes.max()))
    held = np.zeros(genes * choices, dtype=bool)  # the P pairs (gene, choice) that b has
    held[(b.genomes + choices * np.arange(genes)).ravel()] = True
    column = np.where(held, np.cumsum(held) - 1, held.sum())  # the last column is for pairs that b does not have
    dense = []
    for features, weight in ((a, weight_a), (b, weight_b)):
        matrix = np.zeros((len(weight), int(held.sum()) + 1), dtype=weight.dtype)
        np.put_along_axis(matrix, column[features.genomes + choices * np.arange(genes)], weight, axis=1)
        dense.append(matrix[:, :-1])
    sums: np.ndarray = dense[0] @ dense[1].T
    return sums


def _wide(a: _Features, b: _Features) -> np.ndarray:
    """Return the covariance (N, M) of levels and slope."""
    covariance: np.ndarray = WIDE * ((a.text[:, None] == b.text) + np.outer(a.log_sum, b.log_sum))
    return covariance


def _choices(a: _Features, b: _Features) -> np.ndarray:
    """Return the sum (N, M), over genes of equal choice, of the products of shares^CHOICE_POWER."""
    return _coincidence(a, b, a.shares**CHOICE_POWER, b.shares**CHOICE_POWER)


def _likeness(a: _Features, b: _Features) -> np.ndarray:
    """Return exp(-(genes that differ) / LENGTH), (N, M)."""
    one_a, one_b = (np.ones(features.genomes.shape, dtype=np.float32) for features in (a, b))  # counts are exact
    same = _coincidence(a, b, one_a, one_b).astype(np.float64)
    covariance: np.ndarray = np.exp((same - a.genomes.shape[1]) / LENGTH)
    return covariance


def _pairs(a: _Features, b: _Features) -> np.ndarray:
    """Return half of (r . s)^2 less its diagonal, (N, M), where r and s are the roots of the shares."""
    covariance: np.ndarray = (np.square(np.sqrt(a.shares) @ np.sqrt(b.shares).T) - a.shares @ b.shares.T) / 2
    return covariance


def _parts(a: _Features, b: _Features) -> tuple[np.ndarray, ...]:
    """Return the covariances (N, M) of PARTS between ``a`` and ``b``, not yet scaled by their variances."""
    choices = _choices(a, b)
    return choices, choices * (a.text[:, None] == b.text), _likeness(a, b), _pairs(a, b)


def _own(a: _Features) -> tuple[np.ndarray, ...]:
    """Return the diagonals (N,) of _parts(a, a)."""
    choices = (a.shares ** (2 * CHOICE_POWER)).sum(axis=1)
    pairs = (1 - np.square(a.shares).sum(axis=1)) / 2
    return choices, choices * (a.text != NEW_TEXT), np.ones(len(choices)), pairs
