"""The figures that people quote of a quantized model beside its original, each with its standard error over windows.

Each is what ``llama-perplexity --kl-divergence`` prints (``kl_divergence`` and ``log_softmax`` in
tools/perplexity/perplexity.cpp of llama.cpp), of the positions it is given. Standard errors are bootstrapped by whole
windows, since positions of one window are not independent: llama.cpp's own take positions as independent, and it prints
none for percentiles. Shapes: n windows of T positions that count.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np

from bitgenome.common.numbers import LARGEST_LOSS, perplexity_text

RESAMPLES = 1000
QUANTILES = {"median_kl": 0.5, "kl_90": 0.9, "kl_95": 0.95, "kl_99": 0.99, "kl_99_9": 0.999, "maximum_kl": 1.0}


@dataclass(frozen=True)
class PositionErrors:
    """Holds what a quantized model does at each position, beside its original, here called the base.

    ``kl`` (n, T) float64 is KL(base || model) in nats; ``same_top`` (n, T) bool, whether both have the same most likely
    token; ``base_log_prob`` and ``log_prob`` (n, T) float64 are of the token that follows, NaN where none is known.
    """

    kl: np.ndarray
    same_top: np.ndarray
    base_log_prob: np.ndarray
    log_prob: np.ndarray


@dataclass(frozen=True)
class Estimate:
    """Holds a figure and its standard error over windows, which is None for a single window."""

    value: float
    standard_error: float | None = None

    def text(self, scale: float = 1.0, digits: int = 5, unit: str = "") -> str:
        """Return both for people, such as ``98.32 ± 0.11 %``."""
        error = "" if self.standard_error is None else f" ± {scale * self.standard_error:.{digits}f}"
        return f"{scale * self.value:.{digits}f}{error}{unit}"


@dataclass(frozen=True)
class Figures:
    """Holds the figures of a quantized model beside its original, the base.

    KL is KL(base || model) in nats per position; delta p is the change of the true token's probability, from the base's
    to the model's, from -1 to 1; the ratio of perplexities is the model's over the base's.
    """

    windows: int
    positions: int
    mean_kl: Estimate
    median_kl: Estimate
    kl_90: Estimate  # the KL that 90 % of positions do not exceed, interpolated linearly
    kl_95: Estimate
    kl_99: Estimate
    kl_99_9: Estimate
    maximum_kl: Estimate
    mean_delta_p: Estimate
    rms_delta_p: Estimate
    same_top: Estimate  # share of positions
    perplexity: Estimate
    base_perplexity: Estimate
    perplexity_ratio: Estimate
    log_perplexity_ratio: Estimate

    @classmethod
    def of(cls, errors: PositionErrors, seed: int = 0) -> Self:
        """Return the figures of ``errors``; the ``seed`` is that of the bootstrap."""
        n, T = errors.kl.shape
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES) if n > 1 else None
        counts = np.ones((1, n), dtype=np.int64)  # how often each window is in the sample, then in every resample
        counts = counts if drawn is None else np.vstack([counts, drawn])
        followed = np.isfinite(errors.base_log_prob) | np.isfinite(errors.log_prob)
        known = followed.sum(1)

        def mean(values: np.ndarray, of: np.ndarray) -> np.ndarray:
            """Return the mean of ``values`` (n, T) in each sample, over ``of`` (n,) positions of each window."""
            return (counts @ values.sum(1)) / np.maximum(1, counts @ of)

        def of_targets(values: np.ndarray) -> np.ndarray:
            return mean(np.where(followed, values, 0.0), known)

        every = np.full(n, T)
        loss, base_loss = -of_targets(errors.log_prob), -of_targets(errors.base_log_prob)
        delta = np.where(followed, np.exp(errors.log_prob) - np.exp(errors.base_log_prob), 0.0)
        samples = {
            "mean_kl": mean(errors.kl, every),
            **dict(zip(QUANTILES, quantiles(errors.kl, counts, tuple(QUANTILES.values())).T, strict=True)),
            "mean_delta_p": of_targets(delta),
            "rms_delta_p": np.sqrt(of_targets(delta**2)),
            "same_top": mean(errors.same_top.astype(np.float64), every),
            "perplexity": _exp(loss),
            "base_perplexity": _exp(base_loss),
            "perplexity_ratio": _exp(loss - base_loss),
            "log_perplexity_ratio": loss - base_loss,
        }
        return cls(n, n * T, **{name: _estimate(values) for name, values in samples.items()})

    def to_json(self) -> dict[str, Any]:
        """Return all figures by name, each estimate an object of ``value`` and ``standard_error``."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Return the figures of an object of ``to_json``. Raises KeyError or TypeError for another."""
        estimates = {f.name: Estimate(**record[f.name]) for f in fields(cls) if f.type is Estimate}
        return cls(windows=record["windows"], positions=record["positions"], **estimates)

    def rows(self) -> list[tuple[str, str]]:
        """Return each figure's name and value for people, with its standard error, in the order to be read."""
        return [(label, how(self)) for label, how in _ROWS.items()]


def quantiles(values: np.ndarray, counts: np.ndarray, levels: tuple[float, ...]) -> np.ndarray:
    """Return quantiles (R, levels) of ``values`` (n, T), taking window i ``counts[r, i]`` times, interpolated linearly.

    Each row of ``counts`` (R, n) has the same sum. Equals numpy.quantile of the values repeated, which are sorted once.
    """
    order = np.argsort(values, axis=None, kind="stable")
    ordered, window = values.reshape(-1)[order], order // values.shape[1]
    last = int(counts[0].sum()) * values.shape[1] - 1
    place = np.array(levels) * last
    low = np.floor(place).astype(np.int64)
    found = np.empty((len(counts), len(levels)))
    for result, count in zip(found, counts, strict=True):
        reached = np.cumsum(count[window])  # how many values of the sample there are up to each of the ordered
        below, above = (ordered[np.searchsorted(reached, at, side="right")] for at in (low, np.minimum(low + 1, last)))
        result[:] = below + (place - low) * (above - below)
    return found


def _exp(loss: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(loss, LARGEST_LOSS))  # as perplexity_of


def _estimate(samples: np.ndarray) -> Estimate:
    """Return the first of ``samples``, with the standard deviation of the others."""
    value = float(samples[0])
    if len(samples) == 1:
        return Estimate(value)
    with np.errstate(over="ignore", invalid="ignore"):
        error = float(samples[1:].std(ddof=1))
    return Estimate(value, error if math.isfinite(error) else None)


def _perplexity(estimate: Estimate) -> str:
    error = "" if estimate.standard_error is None else f" ± {perplexity_text(estimate.standard_error)}"
    return perplexity_text(estimate.value) + error


_ROWS = {
    "mean KL": lambda f: f.mean_kl.text(digits=6),
    "median KL": lambda f: f.median_kl.text(digits=6),
    "90 % KL": lambda f: f.kl_90.text(digits=6),
    "95 % KL": lambda f: f.kl_95.text(digits=6),
    "99 % KL": lambda f: f.kl_99.text(digits=6),
    "99.9 % KL": lambda f: f.kl_99_9.text(digits=6),
    "maximum KL": lambda f: f.maximum_kl.text(digits=6),
    "mean delta p": lambda f: f.mean_delta_p.text(100, 3, " %"),
    "RMS delta p": lambda f: f.rms_delta_p.text(100, 3, " %"),
    "same top token": lambda f: f.same_top.text(100, 2, " %"),
    "perplexity": lambda f: _perplexity(f.perplexity),
    "perplexity of the original": lambda f: _perplexity(f.base_perplexity),
    "ratio of perplexities": lambda f: f.perplexity_ratio.text(),
}
