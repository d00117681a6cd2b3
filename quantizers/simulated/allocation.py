"""Bits for each input channel from a score of its importance: by threshold, by quantile, or to an exact average.

Shapes: C channels, K levels. Scores are not negative; equal scores are served in channel order.
"""

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from math import floor, gcd, isfinite

import numpy as np

MOST_BITS = 8
THREE_LEVELS = (2, 4, 8)
FIVE_LEVELS = (2, 3, 4, 6, 8)
ERROR_FALL = 4.0  # a uniform quantizer's squared error falls so with each bit
WINDOW = 24  # channels around the greedy boundary among which the last bits are placed exactly
ROUNDING = 1e-9  # forgives the float rounding of "average x channels"


def check_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """``levels`` if they can serve. Raises ValueError unless they are two or more rising whole numbers in 1..8."""
    valid = all(isinstance(bits, int) and 1 <= bits <= MOST_BITS for bits in levels)
    if not valid or len(levels) < 2 or any(a >= b for a, b in pairwise(levels)):
        raise ValueError(
            f"expected two or more rising levels of 1 to {MOST_BITS} bits, such as 2, 4, 8, found "
            f"{', '.join(map(str, levels)) or 'none'}"
        )
    return tuple(levels)


def check_score(score: np.ndarray) -> np.ndarray:
    """float64 (C,). Raises ValueError unless it is a vector of finite values that are not negative."""
    if score.ndim != 1 or not len(score) or not np.isfinite(score).all() or (score < 0).any():
        raise ValueError("expected one finite score for each channel, none negative")
    return score.astype(np.float64)


def threshold_bits(
    score: np.ndarray, levels: Sequence[int] = THREE_LEVELS, low: float = 0.5, high: float = 1.2
) -> np.ndarray:
    """int64 (C,): the largest of three levels where score over its mean is above ``high``, the smallest below ``low``.

    Raises ValueError unless there are three levels and 0 <= low <= high.
    """
    if len(check_levels(levels)) != 3:
        raise ValueError(f"expected three levels for thresholds, found {', '.join(map(str, levels))}")
    if not 0 <= low <= high:
        raise ValueError(f"expected thresholds 0 <= low <= high, found {low:g} and {high:g}")
    values = check_score(score)
    relative = values / (values.mean() or 1.0)
    return np.where(relative > high, levels[2], np.where(relative < low, levels[0], levels[1])).astype(np.int64)


def quantile_bits(score: np.ndarray, levels: Sequence[int] = FIVE_LEVELS) -> np.ndarray:
    """int64 (C,): levels in equal parts of the score's own distribution; 2, 3, 4, 6, 8 cut at 20/40/60/80 % of it."""
    chosen = np.array(check_levels(levels), dtype=np.int64)
    rank = np.empty(len(check_score(score)), dtype=np.int64)
    rank[np.argsort(score, kind="stable")] = np.arange(len(score))
    result: np.ndarray = chosen[rank * len(chosen) // len(score)]
    return result


def budget_bits(score: np.ndarray, target: float, levels: Sequence[int] = FIVE_LEVELS) -> np.ndarray:
    """int64 (C,) whose sum is the largest that the levels can represent within ``target`` bits a channel.

    Greedy: the upgrade to the next level that lowers sum(score * 4^-bits) most a bit comes first, O(C K log(C K));
    the last bits, which no single upgrade fits, are placed by an exact search over the channels next in line.
    Raises ValueError for levels that cannot serve and a target outside of them.
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
        bits[np.argsort(-values, kind="stable")] = -np.sort(-bits)  # the same bits, the most to the most important
    return bits


def representable_total(channels: int, target: float, levels: Sequence[int]) -> int:
    """The largest sum of ``channels`` levels within ``target`` bits a channel."""
    coins = [bits - levels[0] for bits in levels[1:]]
    amount = floor(target * channels + ROUNDING * channels) - channels * levels[0]
    fewest = _fewest_coins(coins)
    unit, largest = reduce(gcd, coins), coins[-1]
    amount = min(amount - amount % unit, channels * largest)
    while True:
        whole = max(0, (amount - largest**2) // largest)  # beyond the largest coin's square only it is added
        if whole + fewest[amount - whole * largest] <= channels:
            return channels * levels[0] + amount
        amount -= unit


def _fewest_coins(coins: Sequence[int]) -> list[float]:
    """Coins needed for each amount up to the square of the largest coin and one more of it."""
    fewest = [0.0]
    for amount in range(1, coins[-1] ** 2 + coins[-1] + 1):
        fewest.append(1 + min((fewest[amount - coin] for coin in coins if coin <= amount), default=np.inf))
    return fewest


def _place_rest(
    bits: np.ndarray, rest: int, score: np.ndarray, levels: tuple[int, ...], queue: np.ndarray, taken: int
) -> None:
    """Add ``rest`` bits in place: the channels of the last and next upgrades in ``queue`` are chosen anew, exactly."""
    window = WINDOW
    while True:
        near = np.unique(queue[max(0, taken - window) : taken + window])
        found = _exact_bits(score[near], int(bits[near].sum()) + rest, levels)
        if found is not None:
            bits[near] = found
            return
        window *= 2


def _exact_bits(score: np.ndarray, total: int, levels: tuple[int, ...]) -> np.ndarray | None:
    """Levels of least sum(score * 4^-bits) that sum to ``total``, by dynamic programming; None if none do."""
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
    """int64 (G,) bits of whole groups with an average over ``sizes`` of at most ``target``.

    Greedy as ``budget_bits``, but a group moves as a whole: an upgrade that does not fit is left out with all later
    ones of its group, and the average may stay below the target by less than a group. ``score`` (G,), ``sizes`` (G,).
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
