"""Every (gene, choice) pair of a space in flat vectors, and the greedy steps over them.

Shapes: G genes; P (gene, choice) pairs in all, in gene order.
"""

import random
from typing import NamedTuple

import numpy as np

from search.allocation.sensitivity import SensitivityTable
from search.types import Genome, SearchSpace

LEAST_GAIN = 1e-9  # share of the table's mean loss: lets bytes decide between moves that the table calls equal


class _At(NamedTuple):
    """Holds, for every pair, where a genome stands: what is costly to look up for thousands of genomes a generation."""

    genome: Genome
    here: np.ndarray  # (P,) pair that the gene of each pair is at
    added: np.ndarray  # (P,) bytes that each move adds
    file_bytes: int


class Moves:
    """Holds the sizes and losses of all moves, where a move sets one gene to one choice.

    Without a table every byte is worth the same, so that only chance and fit decide. The results for the last two
    genomes are cached, because a genome is mostly asked about again, or moved on. Raises ValueError if the table does
    not fit the space.
    """

    def __init__(self, space: SearchSpace, table: SensitivityTable | None = None) -> None:
        if table is not None:
            table.check(space)
        sizes = space.sizes()
        counts = np.array([len(s) for s in sizes])
        self.offset = np.concatenate(([0], np.cumsum(counts)[:-1]))  # (G,) first pair of each gene
        self.gene = np.repeat(np.arange(len(sizes)), counts)  # (P,)
        self.choice = np.arange(len(self.gene)) - self.offset[self.gene]  # (P,)
        self.size = np.concatenate(sizes)  # (P,) bytes
        self.loss = np.concatenate(table.loss) if table else -self.size.astype(np.float64)  # (P,)
        self.fixed_bytes = space.fixed_bytes
        self._end = self.offset + counts  # (G,)
        self._pairs = np.arange(len(self.gene))
        self._latest: tuple[_At, ...] = ()
        self._least_gain = LEAST_GAIN * float(np.abs(self.loss).mean()) or LEAST_GAIN

    def pairs(self, genome: Genome) -> np.ndarray:
        """Return the pair that each gene of ``genome`` is at, (G,)."""
        return self.offset + np.asarray(genome)

    def _at(self, genome: Genome) -> _At:
        for known in self._latest:
            if known.genome is genome:
                return known
        pairs = self.pairs(genome)
        here = pairs[self.gene]
        size = self.fixed_bytes + int(self.size[pairs].sum())
        return self._keep(_At(genome, here, self.size - self.size[here], size))

    def _keep(self, found: _At) -> _At:
        self._latest = (found, *self._latest[:1])
        return found

    def file_bytes(self, genome: Genome) -> int:
        """Return the size of the file of ``genome`` in bytes."""
        return self._at(genome).file_bytes

    def steps(self, genome: Genome) -> np.ndarray:
        """Return how many choices up or down from ``genome`` each move goes, (P,)."""
        steps: np.ndarray = self._pairs - self._at(genome).here
        return steps

    def predict(self, genome: Genome) -> float:
        """Return the additive loss of ``genome``."""
        return float(self.loss[self.pairs(genome)].sum())

    def bytes_added(self, genome: Genome) -> np.ndarray:
        """Return the bytes that each move adds to ``genome``, (P,); do not modify the array."""
        return self._at(genome).added

    def deltas(self, genome: Genome) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes and the loss that each move adds to ``genome``, both (P,); do not modify the bytes."""
        found = self._at(genome)
        return found.added, self.loss - self.loss[found.here]

    def noise(self, rng: random.Random | None, temperature: float) -> np.ndarray | float:
        """Return log-normal factors (P,) around 1 that perturb a ranking; exactly 1 without ``rng``.

        ``temperature`` is the standard deviation of their logarithm.
        """
        if rng is None:
            return 1.0
        return np.exp(temperature * np.random.default_rng(rng.getrandbits(64)).standard_normal(len(self.gene)))

    def downgrade(self, genome: Genome, excess: int, noise: np.ndarray | float) -> Genome:
        """Return ``genome`` after the smaller choice that loses least for each byte of ``excess`` (> 0) that it saves.

        Bytes saved beyond the excess count for nothing, which keeps repairs small. ``noise`` multiplies the costs.
        """
        _, here, added, _ = self._at(genome)
        smaller = (added < 0).nonzero()[0]
        factors = noise[smaller] if isinstance(noise, np.ndarray) else noise
        loss = self.loss[smaller] - self.loss[here[smaller]]
        cost = (np.maximum(loss, 0) + self._least_gain) * factors / np.minimum(-added[smaller], excess)
        return self.apply(genome, int(smaller[np.argmin(cost)]))

    def upgrade(self, genome: Genome, slack: int, noise: np.ndarray | float) -> Genome | None:
        """Return ``genome`` after the larger choice within ``slack`` bytes that gains most per byte; None if none fits.

        ``noise`` multiplies the gains.
        """
        _, here, added, _ = self._at(genome)
        fits = ((added > 0) & (added <= slack)).nonzero()[0]
        if not len(fits):
            return None
        factors = noise[fits] if isinstance(noise, np.ndarray) else noise
        loss = self.loss[fits] - self.loss[here[fits]]
        gain = (np.maximum(-loss, 0) + self._least_gain) * factors / added[fits]
        return self.apply(genome, int(fits[np.argmax(gain)]))

    def apply(self, genome: Genome, pair: int) -> Genome:
        """Return ``genome`` with the gene of ``pair`` set to the choice of ``pair``."""
        gene = int(self.gene[pair])
        moved = (*genome[:gene], int(self.choice[pair]), *genome[gene + 1 :])
        before = self._at(genome)
        here, added = before.here.copy(), before.added.copy()
        own = slice(self.offset[gene], self._end[gene])
        here[own] = pair
        added[own] = self.size[own] - self.size[pair]
        return self._keep(_At(moved, here, added, before.file_bytes + int(before.added[pair]))).genome
