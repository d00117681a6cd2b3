"""This module clusters channels or layers into K groups by affinity, and measures each group's redundancy.

Shapes: affinity (C, C), symmetric, not negative; labels (C,), whole numbers 0 .. K - 1 in the order of the groups'
first members.
"""

import warnings
from typing import Literal

import numpy as np
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from sklearn.cluster import SpectralClustering

Clustering = Literal["spectral", "hierarchical"]


def group(affinity: np.ndarray, count: int, clustering: Clustering = "spectral") -> np.ndarray:
    """Return the labels int64 (C,) of exactly ``count`` groups; the result is deterministic.

    Spectral clustering with QR assignment (Damle et al. 2019) may leave a cluster empty: the largest is then split
    by average linkage. Raises ValueError for a count outside of 1 .. C, and for an affinity that is not square, finite
    and non-negative.
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
        warnings.filterwarnings("ignore", "Graph is not fully connected")  # channels may well share nothing
        labels: np.ndarray = clustering.fit_predict(affinity)
    return labels.astype(np.int64)


def _linked(affinity: np.ndarray, count: int) -> np.ndarray:
    """Return labels by average linkage, where distance is the largest affinity less the affinity."""
    if len(affinity) == 1:
        return np.zeros(1, dtype=np.int64)
    distance = affinity.max() - affinity
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), method="average")
    labels: np.ndarray = cut_tree(tree, n_clusters=[count])[:, 0]
    return labels.astype(np.int64)


def renumbered(labels: np.ndarray) -> np.ndarray:
    """Return labels (C,) of the same groups, numbered in the order of their first members."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    result: np.ndarray = np.argsort(np.argsort(first))[inverse]
    return result


def redundancy(affinity: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the mean affinity between members of each group, float64 (K,); 0 for a group of one."""
    result = np.zeros(labels.max() + 1)
    for label in range(len(result)):
        members = np.flatnonzero(labels == label)
        pairs = len(members) * (len(members) - 1)
        if pairs:
            inner = affinity[np.ix_(members, members)]
            result[label] = (inner.sum() - np.trace(inner)) / pairs
    return result
