"""Hashes rows of weights, so that a row can be looked up in another tensor."""

import numpy as np

WORDS_AT_ONCE = 1 << 20  # of 32 bits, which are widened to 64 while they are hashed


def row_hashes(rows: np.ndarray) -> np.ndarray:
    """Return a hash, uint64 (n,), of each row of ``rows``, uint8 (n, row_bytes) with an even number of bytes a row.

    A sum over a row's words, each times a random odd number. Rows that differ may have one hash: compare them after.
    """
    words: np.ndarray = rows.view(np.uint32 if rows.shape[1] % 4 == 0 else np.uint16)
    numbers = np.random.default_rng(words.shape[1])
    factors = numbers.integers(1 << 63, size=words.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    step, hashes = max(1, WORDS_AT_ONCE // words.shape[1]), np.empty(len(words), np.uint64)
    for start in range(0, len(words), step):
        hashes[start : start + step] = (words[start : start + step].astype(np.uint64) * factors).sum(axis=1)
    return hashes


def pairing(theirs: np.ndarray, ours: np.ndarray) -> np.ndarray | None:
    """Return for each of ``theirs`` the place of an equal one in ``ours``, int64 (n,), each place once.

    Where several are equal their order is kept. None unless both hold the same values.
    """
    if len(theirs) != len(ours):
        return None
    if np.array_equal(theirs, ours):
        return np.arange(len(ours))
    from_order, to_order = np.argsort(theirs, kind="stable"), np.argsort(ours, kind="stable")
    if not np.array_equal(theirs[from_order], ours[to_order]):
        return None
    places = np.empty(len(ours), np.int64)
    places[from_order] = to_order
    return places
