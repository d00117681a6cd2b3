"""Groups by affinity: found where they are planted, exactly as many as asked, and the same each time."""

from itertools import product

import numpy as np
import pytest

from quantizers.simulated.allocation import group_bits
from quantizers.statistics.clustering import group, redundancy, renumbered


def planted(sizes: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An affinity with blocks near 0.8 on a floor near 0.1, members shuffled, and the labels planted."""
    rng = np.random.default_rng(seed)
    labels = renumbered(rng.permutation(np.repeat(np.arange(len(sizes)), sizes)))
    affinity = np.where(labels[:, None] == labels, 0.8, 0.1) + rng.uniform(-0.05, 0.05, (len(labels), len(labels)))
    affinity = (affinity + affinity.T) / 2
    np.fill_diagonal(affinity, 1.0)
    return affinity, labels


@pytest.mark.parametrize("clustering", ["spectral", "hierarchical"])
def test_planted_groups_are_found(clustering: str) -> None:
    affinity, labels = planted((12, 7, 20, 3))
    assert np.array_equal(group(affinity, 4, clustering), labels)  # type: ignore[arg-type]


@pytest.mark.parametrize("clustering", ["spectral", "hierarchical"])
@pytest.mark.parametrize("kind", ["planted", "zeros", "identity"])
def test_there_are_exactly_as_many_groups_as_asked_each_time_the_same(clustering: str, kind: str) -> None:
    affinity = {"planted": planted((6, 5, 5))[0], "zeros": np.zeros((16, 16)), "identity": np.eye(16)}[kind]
    for count in (1, 2, 5, 15, 16):
        labels = group(affinity, count, clustering)  # type: ignore[arg-type]
        assert sorted(set(labels)) == list(range(count))
        assert np.array_equal(labels, renumbered(labels))
        assert np.array_equal(labels, group(affinity.copy(), count, clustering))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 17])
def test_a_count_out_of_reach_is_answered_with_what_is_valid(count: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 to 16 groups for 16 members, found {count}"):
        group(np.eye(16), count)


def test_redundancy_is_the_mean_over_pairs_of_a_group() -> None:
    affinity = np.array([[1, 0.5, 0.1, 0.2], [0.5, 1, 0.3, 0.4], [0.1, 0.3, 1, 0.6], [0.2, 0.4, 0.6, 1]])
    assert redundancy(affinity, np.array([0, 0, 0, 1])).tolist() == pytest.approx([0.3, 0])


def test_whole_groups_get_bits_within_the_target_the_independent_more() -> None:
    rng = np.random.default_rng(0)
    levels = (2, 4, 8)
    for _ in range(20):
        score, sizes = rng.lognormal(0, 2, 4), rng.integers(1, 9, 4)
        bits = group_bits(score, sizes, 4.0, levels)
        assert (bits * sizes).sum() <= 4 * sizes.sum()
        wider = [
            (score * sizes * 4.0 ** -np.array(b)).sum()
            for b in product(levels, repeat=4)
            if (np.array(b) * sizes).sum() <= 4 * sizes.sum()
        ]
        assert (score * sizes * 4.0**-bits).sum() <= 16 * min(wider), "within two bits of the best"
    assert group_bits(np.array([0.001, 1.0, 0.001]), np.ones(3), 4.0, levels).tolist() == [2, 8, 2]
    with pytest.raises(ValueError, match="expected a target from 2 to 8 bits"):
        group_bits(np.ones(2), np.ones(2), 1.0, levels)
