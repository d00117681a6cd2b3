"""Bits for each channel: exact totals and optimal choices against brute force."""

from itertools import product

import numpy as np
import pytest

from quantizers.simulated.allocation import FIVE_LEVELS, budget_bits, quantile_bits, representable_total, threshold_bits

LEVEL_SETS = [(2, 4, 8), FIVE_LEVELS, (2, 3, 4, 5, 6, 7, 8), (1, 8), (2, 7, 8), (3, 5, 6)]


def scores(channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0.0, 2.0, channels)


def loss(score: np.ndarray, bits: np.ndarray) -> float:
    return float((score * 4.0**-bits).sum())


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
def test_the_budget_is_met_exactly_and_optimally_in_every_small_case(levels: tuple[int, ...]) -> None:
    score = scores(5, seed=3)
    every = np.array(list(product(levels, repeat=5)))
    totals, losses = every.sum(1), (score * 4.0**-every).sum(1)
    for target in np.linspace(levels[0], levels[-1], 41):
        total = totals[totals <= target * 5 + 1e-9].max()
        bits = budget_bits(score, float(target), levels)
        assert bits.sum() == total
        assert loss(score, bits) == pytest.approx(losses[totals == total].min())


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
def test_representable_totals_are_those_of_an_enumeration(levels: tuple[int, ...]) -> None:
    reached = {0}
    for channels in range(1, 13):
        reached = {total + bits for total in reached for bits in levels}
        for wanted in range(channels * levels[0], channels * levels[-1] + 1):
            expected = max(total for total in reached if total <= wanted)
            assert representable_total(channels, wanted / channels, levels) == expected


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
@pytest.mark.parametrize("target", [0.03, 0.37, 0.5, 0.98])
def test_large_budgets_are_exact_near_the_lower_bound_and_never_favour_the_less_important(
    levels: tuple[int, ...], target: float
) -> None:
    score = scores(3001)
    wanted = levels[0] + target * (levels[-1] - levels[0])
    bits = budget_bits(score, wanted, levels)
    assert bits.sum() == representable_total(3001, wanted, levels)
    assert (np.diff(bits[np.argsort(score)]) >= 0).all()
    slack = [loss(score, budget_bits(score, (bits.sum() + d) / 3001, levels)) for d in (-8, 8)]
    assert slack[0] >= loss(score, bits) >= slack[1]


def test_a_large_budget_is_met_in_the_time_of_a_sort() -> None:
    bits = budget_bits(scores(200_000), 4.123456, (2, 3, 4, 5, 6, 7, 8))
    assert bits.sum() == 824691


def test_quantiles_share_the_channels_out_evenly_with_an_average_of_four_point_six() -> None:
    score = scores(1000)
    bits = quantile_bits(score)
    assert [int((bits == level).sum()) for level in FIVE_LEVELS] == [200] * 5
    assert bits.mean() == 4.6
    cuts = np.quantile(score, [0.2, 0.4, 0.6, 0.8])
    assert np.array_equal(bits, np.array(FIVE_LEVELS)[np.searchsorted(cuts, score)])


def test_thresholds_are_relative_to_the_mean() -> None:
    score = np.array([0.4, 0.51, 1.0, 1.19, 1.3, 1.6])
    assert score.mean() == pytest.approx(1.0)
    assert threshold_bits(7 * score).tolist() == [2, 4, 4, 4, 8, 8]


@pytest.mark.parametrize(("target", "levels"), [(1.9, (2, 4, 8)), (8.1, (2, 4, 8)), (float("nan"), (2, 4))])
def test_a_target_out_of_reach_is_answered_with_what_is_valid(target: float, levels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"expected a target from {levels[0]} to {levels[-1]} bits"):
        budget_bits(scores(10), target, levels)


@pytest.mark.parametrize("levels", [(), (4,), (4, 2), (2, 2, 4), (0, 4), (2, 9), (2.5, 4)])
def test_level_sets_that_cannot_serve_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected two or more rising levels of 1 to 8 bits"):
        budget_bits(scores(10), 4.0, levels)


@pytest.mark.parametrize("score", [np.array([1.0, np.nan]), np.array([-1.0, 1.0]), np.zeros((2, 2)), np.zeros(0)])
def test_scores_that_cannot_serve_are_refused(score: np.ndarray) -> None:
    with pytest.raises(ValueError, match="one finite score for each channel"):
        quantile_bits(score)


def test_equal_scores_are_served_in_channel_order() -> None:
    assert budget_bits(np.zeros(4), 3.0, (2, 4)).tolist() == [4, 4, 2, 2]
    assert budget_bits(np.ones(4), 3.0, (2, 4)).tolist() == [4, 4, 2, 2]
