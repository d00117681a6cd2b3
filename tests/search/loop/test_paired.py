"""Standard errors of means over windows, and of differences that are taken window by window."""

import math
from dataclasses import replace

import numpy as np
import pytest

from search.loop.paired import ONE_SIGMA, Estimate, paired_difference
from search.types import Evaluation

WINDOW = 256  # tokens


def evaluation(*kl: float, split: str = "search", draw: int = 0) -> Evaluation:
    mean = float(np.mean(kl))
    return Evaluation((0,), mean, mean, 0.0, 1.0, 0.0, 10, split, WINDOW * len(kl), draw=draw, window_kl=kl)


def test_the_standard_error_is_the_spread_over_the_root_of_the_windows() -> None:
    found = Estimate.of(np.array([1.0, 2.0, 3.0, 6.0]))
    assert (found.mean, found.windows) == (3.0, 4)
    assert found.standard_error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4))


def test_a_difference_is_paired_so_hard_windows_cancel() -> None:
    a, b = evaluation(1.1, 5.2, 9.1, 20.2), evaluation(1.0, 5.0, 9.0, 20.0)
    found = paired_difference(a, b)
    assert found.mean == pytest.approx(0.15)
    assert found.standard_error == pytest.approx(math.sqrt(4 * 0.05**2 / 3 / 4))
    assert found.standard_error < Estimate.of(np.array(a.window_kl)).standard_error / 50
    assert paired_difference(b, a).mean == -found.mean


def test_nested_text_is_compared_over_what_both_have_read() -> None:
    short, long = evaluation(1.0, 2.0), evaluation(0.5, 1.0, 99.0, 99.0)
    assert paired_difference(short, long) == paired_difference(short, evaluation(0.5, 1.0))
    assert paired_difference(short, long).windows == 2


def test_a_single_window_says_nothing_of_the_spread() -> None:
    found = paired_difference(evaluation(2.0), evaluation(1.0))
    assert found.mean == 1.0
    assert found.standard_error == found.margin() == math.inf


@pytest.mark.parametrize("changes", [{"split": "validation"}, {"draw": 1}])
def test_evaluations_of_different_text_are_not_compared(changes: dict) -> None:
    with pytest.raises(ValueError, match="expected two evaluations of the same text, found"):
        paired_difference(evaluation(1.0, 2.0, 3.0, 4.0), evaluation(1.0, 2.0, 3.0, 4.0, **changes))


def test_evaluations_without_windows_are_not_compared() -> None:
    with pytest.raises(ValueError, match="KL by window"):
        paired_difference(evaluation(1.0, 2.0), replace(evaluation(1.0, 2.0), window_kl=()))


@pytest.mark.parametrize("windows", [3, 8, 200])
def test_the_margin_holds_the_true_mean_as_often_as_it_says_however_few_windows(windows: int) -> None:
    rng = np.random.default_rng(windows)
    estimates = [Estimate.of(rng.normal(1.0, 0.3, size=windows)) for _ in range(2000)]
    for confidence in (ONE_SIGMA, 0.95):
        held = np.mean([abs(e.mean - 1.0) <= e.margin(confidence) for e in estimates])
        assert held == pytest.approx(confidence, abs=0.03)
