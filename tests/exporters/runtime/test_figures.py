"""Quoted figures against plain numpy, distributions worked out by hand, and windows that are alike or not."""

import json
import math

import numpy as np
import pytest

from exporters.runtime.figures import RESAMPLES, Estimate, Figures, PositionErrors, quantiles


def errors(n: int, T: int, seed: int = 0) -> PositionErrors:
    rng = np.random.default_rng(seed)
    base, own = -rng.exponential(size=(2, n, T))
    base[:, -1] = own[:, -1] = np.nan
    return PositionErrors(rng.exponential(size=(n, T)) ** 2, rng.random((n, T)) < 0.9, base, own)


def test_figures_are_those_of_plain_numpy() -> None:
    given = errors(6, 11)
    found = Figures.of(given)
    delta = (np.exp(given.log_prob) - np.exp(given.base_log_prob))[:, :-1]
    loss, base = -given.log_prob[:, :-1].mean(), -given.base_log_prob[:, :-1].mean()
    expected = {
        "mean_kl": given.kl.mean(),
        "median_kl": np.median(given.kl),
        "kl_90": np.quantile(given.kl, 0.9),
        "kl_95": np.quantile(given.kl, 0.95),
        "kl_99": np.quantile(given.kl, 0.99),
        "kl_99_9": np.quantile(given.kl, 0.999),
        "maximum_kl": given.kl.max(),
        "mean_delta_p": delta.mean(),
        "rms_delta_p": math.sqrt((delta**2).mean()),
        "same_top": given.same_top.mean(),
        "perplexity": math.exp(loss),
        "base_perplexity": math.exp(base),
        "perplexity_ratio": math.exp(loss - base),
        "log_perplexity_ratio": loss - base,
    }
    assert {name: getattr(found, name).value for name in expected} == pytest.approx(expected, rel=1e-12)
    assert (found.windows, found.positions) == (6, 66)
    assert {row[0] for row in found.rows()} > {"mean KL", "99.9 % KL", "RMS delta p", "same top token"}


def test_resampled_quantiles_are_those_of_the_windows_repeated() -> None:
    rng = np.random.default_rng(1)
    values, counts = rng.integers(0, 9, (5, 7)).astype(float), rng.multinomial(5, [0.2] * 5, size=20)
    levels = (0.0, 0.5, 0.9, 0.999, 1.0)
    plain = [np.quantile(np.repeat(values, count, axis=0), levels) for count in counts]
    np.testing.assert_allclose(quantiles(values, counts, levels), plain, rtol=1e-12)


def test_a_standard_error_is_that_of_windows_and_not_of_positions() -> None:
    """A KL that is the same all over each window: only as many numbers as windows."""
    of_window = np.random.default_rng(2).exponential(size=(400, 1))
    given = errors(400, 16)
    found = Figures.of(
        PositionErrors(np.repeat(of_window, 16, axis=1), given.same_top, given.base_log_prob, given.log_prob)
    )
    assert found.mean_kl.standard_error == pytest.approx(of_window.std(ddof=1) / 20, rel=4 / math.sqrt(2 * RESAMPLES))
    assert found.median_kl.standard_error == pytest.approx(1 / 20, rel=0.3)  # 1 / (2 f(m) sqrt n), f(m) = 1/2


def test_figures_of_a_seed_are_always_the_same_and_survive_json() -> None:
    given = errors(9, 5)
    found = Figures.of(given)
    assert Figures.from_json(json.loads(json.dumps(found.to_json()))) == found == Figures.of(given)
    assert Figures.of(given, seed=1).mean_kl.standard_error != found.mean_kl.standard_error


def test_one_window_has_no_standard_error_and_a_broken_model_no_infinity() -> None:
    given = errors(1, 5)
    assert Figures.of(given).mean_kl == Estimate(given.kl.mean(), None)
    wrong = np.where(np.isnan(given.log_prob), np.nan, -1e4)
    broken = Figures.of(PositionErrors(given.kl, given.same_top, given.base_log_prob, wrong))
    json.dumps(broken.to_json(), allow_nan=False)
    assert dict(broken.rows())["perplexity"] == "1.80e+308"
