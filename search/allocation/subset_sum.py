"""The file sizes that a space can reach: a multiple-choice subset sum, kept as bits of one big integer."""

import random
from collections.abc import Sequence
from math import gcd

import numpy as np

from search.types import Genome

MAX_BITS = 1 << 18  # most units that the capacity is counted in; milliseconds and some 20 MB for 600 genes


class ReachableSizes:
    """Holds the sizes, up to ``capacity`` bytes, that some genome has.

    ``sizes`` holds the bytes of each gene at each choice. Sizes are counted in units of the greatest common divisor of
    all steps, hence exactly, unless that gives more than MAX_BITS units. Steps are then rounded up to coarser units:
    what is found still fits, but a size within (genes x unit) of the end of a window may be missed.
    """

    def __init__(self, sizes: Sequence[np.ndarray], capacity: int) -> None:
        self._base = sum(int(s.min()) for s in sizes)
        self._capacity = capacity - self._base
        steps = [[int(size - s.min()) for size in s] for s in sizes]
        exact = gcd(*(step for gene in steps for step in gene)) or 1
        self._unit = max(exact, -(-self._capacity // MAX_BITS))
        self._steps = [[-(-step // self._unit) for step in gene] for gene in steps]
        self._prefix = [1]  # bit t of entry g: the first g genes can take exactly t units
        mask = (1 << (self._capacity // self._unit + 1)) - 1
        for gene in self._steps:
            reached = 0
            for step in set(gene):
                reached |= self._prefix[-1] << step
            self._prefix.append(reached & mask)

    def find(self, low: int, near: Genome, rng: random.Random) -> Genome | None:
        """Return the largest genome from ``low`` bytes to the capacity; None if there is none.

        It keeps the choices of ``near`` where it can; ``rng`` breaks ties.
        """
        target = self._prefix[-1].bit_length() - 1
        if target * self._unit < low - self._base:
            return None
        genome = list(near)
        for g in range(len(near) - 1, -1, -1):
            steps = self._steps[g]
            ways = [c for c, s in enumerate(steps) if s <= target and self._prefix[g] >> (target - s) & 1]
            genome[g] = min(ways, key=lambda c: (abs(c - near[g]), rng.random()))
            target -= steps[genome[g]]
        return tuple(genome)
