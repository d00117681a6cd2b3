"""This module allocates bits to input channels by importance score: by threshold, by quantile, or to an exact average.

Shapes: C channels, K levels, G groups. Scores are not negative; among equal scores the first channels come first.
"""

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from math import floor, gcd, isfinite

import numpy as np

MOST_BITS = 8
THREE_LEVELS = (2, 4, 8)
FIVE_LEVELS = (2, 3, 4, 6, 8)
ERROR_FALL = 4.0  # factor by which each bit lowers a uniform quantizer's squared error
WINDOW = 24  # channels around the greedy boundary among which the last bits are placed exactly
ROUNDING = 1e-9  # bits per channel; absorbs the float rounding of target * channels


def check_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """Return ``levels`` as a tuple. Raises ValueError unless they are two or more rising whole numbers in 1..8."""
    valid = all(isinstance(bits, int) and 1 <= bits <= MOST_BITS for bits in levels)
    if not valid or len(levels) < 2 or any(a >= b for a, b in pairwise(levels)):
        raise ValueError(
            f"expected two or more rising levels of 1 to {MOST_BITS} bits, such as 2, 4, 8, found "
            f"{', '.join(map(str, levels)) or 'none'}"
        )
    return tuple(levels)


def check_score(score: np.ndarray) -> np.ndarray:
    """Return ``score`` as float64 (C,). Raises ValueError unless it is a vector of finite, non-negative values."""
    if score.ndim != 1 or not len(score) or not np.isfinite(score).all() or (score < 0).any():
        raise ValueError("expected one finite score for each channel, none negative")
    return score.astype(np.float64)


def threshold_bits(
    score: np.ndarray, levels: Sequence[int] = THREE_LEVELS, low: float = 0.5, high: float = 1.2
) -> np.ndarray:
    """Return bits int64 (C,), one of three levels for each channel, by its score relative to the mean score.

    Channels above ``high`` get the largest level, channels below ``low`` the smallest, the others the middle one.
    Raises ValueError unless there are three levels and 0 <= low <= high, and as ``check_levels`` and ``check_score``.
    """
    if len(check_levels(levels)) != 3:
        raise ValueError(f"expected three levels for thresholds, found {', '.join(map(str, levels))}")
    if not 0 <= low <= high:
        raise ValueError(f"expected thresholds 0 <= low <= high, found {low:g} and {high:g}")
    values = check_score(score)
    relative = values / (values.mean() or 1.0)
    return np.where(relative > high, levels[2], np.where(relative < low, levels[0], levels[1])).astype(np.int64)


def quantile_bits(score: np.ndarray, levels: Sequence[int] = FIVE_LEVELS) -> np.ndarray:
    """Return bits int64 (C,) that give each level to an equal share of the channels, in order of score.

    Levels 2, 3, 4, 6, 8 change at the 20, 40, 60 and 80 % quantiles. Raises ValueError as ``check_levels`` and
    ``check_score``.
    """
    chosen = np.array(check_levels(levels), dtype=np.int64)
    rank = np.empty(len(check_score(score)), dtype=np.int64)
    rank[np.argsort(score, kind="stable")] = np.arange(len(score))
    result: np.ndarray = chosen[rank * len(chosen) // len(score)]
    return result


def budget_bits(score: np.ndarray, target: float, levels: Sequence[int] = FIVE_LEVELS) -> np.ndarray:
    """Return bits int64 (C,) whose sum is the largest that the levels can represent within ``target`` bits per channel.

    Greedy: the upgrade to the next level that lowers sum(score * 4^-bits) most per bit comes first, O(C K log(C K)).
    The last bits, which no single upgrade fits, are placed by an exact search over the channels next in the order.
    Raises ValueError for a target outside of the levels, and as ``check_levels`` and ``check_score``.
    """
    levels = check_levels(levels)
    if not (isfinite(target) and levels[0] - ROUNDING <= target <= levels[-1] + ROUNDING):
        raise ValueError(f"expected a target from {levels[0]} to {levels[-1]} bits, the levels' own, found {target:g}")
    values = check_score(score)
    total = representable_total(len(values), target, levels)
    costs = np.array([ERROR_FALL**-bits for bits in levels])
    steps = np.diff(levels)
    gains = np.outer(values, -np.diff(costs) / steps)  # (C, K - 1); falls along a row, as 4^-bits is convex
    channel, step = (index.ravel() for index in np.indices(gains.shape))
    order = np.lexsort((channel, step, -gains.ravel()))
    spent = len(values) * levels[0] + np.cumsum(steps[step[order]])
    taken = int(np.searchsorted(spent, total, side="right"))
    choice = np.bincount(channel[order[:taken]], minlength=len(values))
    bits = np.array(levels)[choice]
    if rest := total - int(bits.sum()):
        _place_rest(bits, rest, values, levels, channel[order], taken)
        bits[np.argsort(-values, kind="stable")] = -np.sort(-bits)  # same bits, sorted: the most important get the most
    return bits


def representable_total(channels: int, target: float, levels: Sequence[int]) -> int:
    """Return the largest sum, in bits, of one level for each of ``channels``, within ``target`` bits per channel."""
    coins = [bits - levels[0] for bits in levels[1:]]
    amount = floor(target * channels + ROUNDING * channels) - channels * levels[0]
    fewest = _fewest_coins(coins)
    unit, largest = reduce(gcd, coins), coins[-1]
    amount = min(amount - amount % unit, channels * largest)
    while True:
        whole = max(0, (amount - largest**2) // largest)  # above the largest coin's square, only that coin is used
        if whole + fewest[amount - whole * largest] <= channels:
            return channels * levels[0] + amount
        amount -= unit


def _fewest_coins(coins: Sequence[int]) -> list[float]:
    """Return the fewest coins for each amount from 0 to c^2 + c, c the largest coin; infinite where there are none."""
    fewest = [0.0]
    for amount in range(1, coins[-1] ** 2 + coins[-1] + 1):
        fewest.append(1 + min((fewest[amount - coin] for coin in coins if coin <= amount), default=np.inf))
    return fewest


def _place_rest(
    bits: np.ndarray, rest: int, score: np.ndarray, levels: tuple[int, ...], queue: np.ndarray, taken: int
) -> None:
    """Add ``rest`` bits to ``bits`` in place.

    An exact search reallocates the channels around position ``taken`` of ``queue``, the channels in order of upgrade.
    """
    window = WINDOW
    while True:
        near = np.unique(queue[max(0, taken - window) : taken + window])
        found = _exact_bits(score[near], int(bits[near].sum()) + rest, levels)
        if found is not None:
            bits[near] = found
            return
        window *= 2


def _exact_bits(score: np.ndarray, total: int, levels: tuple[int, ...]) -> np.ndarray | None:
    """Return levels of least sum(score * 4^-bits) that sum to ``total``, by dynamic programming; None if none do."""
    rest = total - len(score) * levels[0]
    coins = [bits - levels[0] for bits in levels]
    best = np.full(rest + 1, np.inf)
    best[0] = 0.0
    choices = np.zeros((len(score), rest + 1), dtype=np.int64)
    for c, value in enumerate(score):
        options = np.full((len(levels), rest + 1), np.inf)
        for k, coin in enumerate(coins):
            if coin <= rest:
                options[k, coin:] = best[: rest + 1 - coin] + value * ERROR_FALL ** -levels[k]
        choices[c] = options.argmin(0)
        best = options.min(0)
    if not np.isfinite(best[rest]):
        return None
    bits = np.empty(len(score), dtype=np.int64)
    for c in range(len(score) - 1, -1, -1):
        k = choices[c, rest]
        bits[c], rest = levels[k], rest - coins[k]
    return bits


def group_bits(score: np.ndarray, sizes: np.ndarray, target: float, levels: Sequence[int]) -> np.ndarray:
    """Return bits int64 (G,) of whole groups, whose average weighted by ``sizes`` is at most ``target``.

    ``score`` is (G,), ``sizes`` (G,) in channels. Greedy as ``budget_bits``, but all channels of a group are upgraded
    together. An upgrade that does not fit is left out with all later ones of its group, so the average may stay below
    the target, by less than one group's upgrade. Raises ValueError as ``budget_bits``.
    """
    levels = check_levels(levels)
    if not levels[0] - ROUNDING <= target <= levels[-1] + ROUNDING:
        raise ValueError(f"expected a target from {levels[0]} to {levels[-1]} bits, the levels' own, found {target:g}")
    values, steps = check_score(score), np.diff(levels)
    gains = np.outer(values, -np.diff([ERROR_FALL**-bits for bits in levels]) / steps)
    groups, step = (index.ravel() for index in np.indices(gains.shape))
    left = target * sizes.sum() + ROUNDING * sizes.sum() - levels[0] * sizes.sum()
    choice = np.zeros(len(values), dtype=np.int64)
    for upgrade in np.lexsort((groups, step, -gains.ravel())):
        g, k = groups[upgrade], step[upgrade]
        cost = steps[k] * sizes[g]
        if choice[g] == k and cost <= left:
            choice[g], left = k + 1, left - cost
    result: np.ndarray = np.array(levels)[choice]
    return result
