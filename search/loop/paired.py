"""Standard errors of a KL, and of the difference of two, over the windows of text that they were measured on.

A KL is a mean over n windows of text, x_1 .. x_n, and windows are nearly independent samples of all text:

    mean = sum_i x_i / n        standard error = sqrt(sum_i (x_i - mean)^2 / (n (n - 1)))

Two genomes measured on the same windows share what makes a window hard. Their difference is therefore taken window by
window, x_i = a_i - b_i, and is known many times better than either KL. Few windows also estimate their own spread
badly, so intervals that are meant to hold in a given share of cases use Student's t with n - 1 degrees of freedom
instead of the normal.
"""

from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
from scipy.stats import norm, t

from search.types import Evaluation

ONE_SIGMA = float(norm.cdf(1) - norm.cdf(-1))  # 0.683: the confidence of one standard error of a normal


@dataclass(frozen=True)
class Estimate:
    """An estimate is a mean over windows of text, in nats per token, with its standard error.

    The standard error is infinite for a single window.
    """

    mean: float
    standard_error: float
    windows: int

    @classmethod
    def of(cls, values: np.ndarray) -> "Estimate":
        """Return the mean of independent ``values`` (n,), at least one, with its standard error."""
        n = len(values)
        error = float(values.std(ddof=1)) / sqrt(n) if n > 1 else inf
        return cls(float(values.mean()), error, n)

    def margin(self, confidence: float = ONE_SIGMA) -> float:
        """Return half of the interval that holds the mean over all text with ``confidence``: t_{n-1} standard errors.

        It is infinite for fewer than two windows.
        """
        if self.windows < 2:
            return inf
        return float(t.ppf((1 + confidence) / 2, self.windows - 1)) * self.standard_error


def paired_difference(a: Evaluation, b: Evaluation) -> Estimate:
    """Return the KL of ``a`` less that of ``b`` over the windows that both have read.

    The shorter text is a prefix of the longer. Raises ValueError for evaluations of different text, or without KL by
    window.
    """
    if (a.split, a.draw) != (b.split, b.draw):
        raise ValueError(f"expected two evaluations of the same text, found {a.fidelity} and {b.fidelity}")
    windows = min(len(a.window_kl), len(b.window_kl))
    return Estimate.of(_windows(a)[:windows] - _windows(b)[:windows])


def _windows(evaluation: Evaluation) -> np.ndarray:
    """Return the KL of each window, (n,). Raises ValueError if the evaluation has none."""
    if not evaluation.window_kl:
        raise ValueError(f"expected an evaluation with its KL by window, found none at {evaluation.fidelity}")
    return np.array(evaluation.window_kl)
