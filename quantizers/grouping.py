"""Channels or layers in K groups by an affinity matrix, and what a group's own redundancy says of its bits.

Shapes: affinity (C, C), symmetric, not negative; labels (C,) whole numbers 0 .. K - 1, numbered by first member.
"""

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from sklearn.cluster import SpectralClustering

from quantizers.allocation import ERROR_FALL, ROUNDING, check_levels, check_score

Clustering = Literal["spectral", "hierarchical"]


def group(affinity: np.ndarray, count: int, clustering: Clustering = "spectral") -> np.ndarray:
    """Labels of exactly ``count`` groups, the same for the same affinity.

    Spectral clustering with QR assignment (Damle et al. 2019) may leave a cluster empty: the largest is then divided
    by average linkage. Raises ValueError for a count outside of 1 .. C and an affinity that is not one.
    """
    C = len(affinity)
    if affinity.shape != (C, C) or not np.isfinite(affinity).all() or (affinity < 0).any():
        raise ValueError(f"expected a square affinity, finite and not negative, found shape {affinity.shape}")
    if not 1 <= count <= C:
        raise ValueError(f"expected 1 to {C} groups for {C} members, found {count}")
    if count in {1, C}:
        return np.arange(C) if count == C else np.zeros(C, dtype=np.int64)
    labels = _spectral(affinity, count) if clustering == "spectral" else _linked(affinity, count)
    while (found := len(np.unique(labels))) < count:
        values, sizes = np.unique(labels, return_counts=True)
        members = np.flatnonzero(labels == values[np.argmax(sizes)])
        halves = _linked(affinity[np.ix_(members, members)], min(len(members), count - found + 1))
        labels[members] = labels.max() + 1 + halves
    return renumbered(labels)


def _spectral(affinity: np.ndarray, count: int) -> np.ndarray:
    clustering = SpectralClustering(count, affinity="precomputed", assign_labels="cluster_qr", random_state=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Graph is not fully connected")  # channels that share nothing are no mistake
        labels: np.ndarray = clustering.fit_predict(affinity)
    return labels.astype(np.int64)


def _linked(affinity: np.ndarray, count: int) -> np.ndarray:
    """Average linkage on the distance from the largest affinity."""
    if len(affinity) == 1:
        return np.zeros(1, dtype=np.int64)
    distance = affinity.max() - affinity
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), method="average")
    labels: np.ndarray = cut_tree(tree, n_clusters=[count])[:, 0]
    return labels.astype(np.int64)


def renumbered(labels: np.ndarray) -> np.ndarray:
    """The same groups, numbered in the order of their first members."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    result: np.ndarray = np.argsort(np.argsort(first))[inverse]
    return result


def redundancy(affinity: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """By group the mean affinity of its pairs, float64 (K,); 0 for a group of one."""
    result = np.zeros(labels.max() + 1)
    for label in range(len(result)):
        members = np.flatnonzero(labels == label)
        pairs = len(members) * (len(members) - 1)
        if pairs:
            inner = affinity[np.ix_(members, members)]
            result[label] = (inner.sum() - np.trace(inner)) / pairs
    return result


def group_bits(score: np.ndarray, sizes: np.ndarray, target: float, levels: Sequence[int]) -> np.ndarray:
    """int64 (K,) bits of whole groups with an average over ``sizes`` of at most ``target``.

    Greedy as ``quantizers.allocation.budget_bits``, but a group moves as a whole: an upgrade that does not fit is left
    out with all later ones of its group, and the average may stay below the target by less than a group.
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
