"""Repair of genomes: it finds the nearest good genome that keeps the budget and fills it.

There are four steps, each only where the one before was not enough: downgrade until the file fits, upgrade while
something fits, exchange one upgrade for one downgrade, and finally the exact subset sum over all genes.
"""

import random

import numpy as np

from search.allocation.moves import Moves
from search.allocation.sensitivity import SensitivityTable
from search.allocation.subset_sum import ReachableSizes
from search.budget import Budget
from search.types import Genome, SearchSpace

TOLERANCE = 0.005  # share of the budget by which a genome may stay below it
TEMPERATURE = 0.3  # of the log-normal noise on losses per byte; lets equal proposals get different repairs


class Repair:
    """A repair makes any genome of ``space`` feasible: never over ``budget``, within 0.5 % under it if any genome is.

    ``table`` decides what to give up and what to gain; without it every byte is worth the same. Raises ValueError if
    not even the smallest genome fits.
    """

    def __init__(self, space: SearchSpace, budget: Budget, table: SensitivityTable | None = None) -> None:
        self.space = space
        self.budget = budget
        self.moves = Moves(space, table)
        smallest = self.moves.file_bytes(space.smallest())
        if smallest > budget.file_bytes:
            raise ValueError(f"budget of {budget.file_bytes:,} bytes is below the smallest file ({smallest:,} bytes)")
        self._most = np.array([len(gene.formats) - 1 for gene in space.genes])
        self._slack_allowed = int(TOLERANCE * budget.file_bytes)
        self._reachable: ReachableSizes | None = None

    def slack(self, genome: Genome) -> int:
        """Return the bytes left under the budget; negative if ``genome`` is over it."""
        return self.budget.file_bytes - self.moves.file_bytes(genome)

    def is_tight(self, genome: Genome) -> bool:
        """Return whether ``genome`` keeps the budget and is within 0.5 % under it."""
        return 0 <= self.slack(genome) <= self._slack_allowed

    def __call__(self, genome: Genome, rng: random.Random) -> Genome:
        """Return a feasible genome close to ``genome``, or ``genome`` itself if it is feasible and tight.

        Raises ValueError if it does not belong to the space.
        """
        values = np.asarray(genome)
        if values.shape != self._most.shape or ((values < 0) | (values > self._most)).any():
            self.space.check(genome)
        if self.is_tight(genome):
            return genome
        noise = self.moves.noise(rng, TEMPERATURE)
        while (slack := self.slack(genome)) < 0:
            genome = self.moves.downgrade(genome, -slack, noise)
        while (slack := self.slack(genome)) > self._slack_allowed:
            larger = self.moves.upgrade(genome, slack, noise)
            if larger is None:
                return self._exchange(genome, rng) or self._subset_sum(genome, rng) or genome
            genome = larger
        return genome

    def fit(self, genome: Genome) -> Genome:
        """Return the feasible genome that ``genome`` becomes by the least costly downgrades, then filled; no chance."""
        while (slack := self.slack(genome)) < 0:
            genome = self.moves.downgrade(genome, -slack, 1.0)
        return self.fill(genome)

    def fill(self, genome: Genome, rng: random.Random | None = None) -> Genome:
        """Return a feasible ``genome``, upgraded until nothing more fits; deterministic without ``rng``."""
        noise = self.moves.noise(rng, TEMPERATURE)
        while (larger := self.moves.upgrade(genome, self.slack(genome), noise)) is not None:
            genome = larger
        return genome

    def _exchange(self, genome: Genome, rng: random.Random) -> Genome | None:
        """Return ``genome`` made tight by one upgrade and one downgrade of different genes; None if none are found."""
        added, loss = self.moves.deltas(genome)
        slack = self.slack(genome)
        ups, downs = np.flatnonzero(added > 0), np.flatnonzero(added < 0)
        downs = downs[np.argsort(added[downs], kind="stable")]
        first = np.searchsorted(added[downs], slack - self._slack_allowed - added[ups], side="left")
        last = np.searchsorted(added[downs], slack - added[ups], side="right")
        found = np.flatnonzero(last > first)
        draws = np.random.default_rng(rng.getrandbits(64)).random(len(found))
        partner = downs[first[found] + (draws * (last - first)[found]).astype(np.int64)]
        up = ups[found]
        apart = self.moves.gene[up] != self.moves.gene[partner]
        if not apart.any():
            return None
        up, partner = up[apart], partner[apart]
        best = int(np.argmin(loss[up] + loss[partner]))
        return self.moves.apply(self.moves.apply(genome, int(up[best])), int(partner[best]))

    def _subset_sum(self, genome: Genome, rng: random.Random) -> Genome | None:
        """Return a tight genome found by the exact subset sum; None if the space has none."""
        capacity = self.budget.file_bytes - self.moves.fixed_bytes
        if self._reachable is None:
            self._reachable = ReachableSizes(self.space.sizes(), capacity)
        found = self._reachable.find(capacity - self._slack_allowed, genome, rng)
        return found if found is not None and self.is_tight(found) else None
