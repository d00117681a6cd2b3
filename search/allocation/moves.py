"""Every (gene, choice) of a space in flat vectors, and the greedy step over them.

Shapes: G genes; P = all (gene, choice) pairs, in gene order.
"""

import random
from typing import NamedTuple

import numpy as np

from search.allocation.sensitivity import SensitivityTable
from search.types import Genome, SearchSpace

LEAST_GAIN = 1e-9  # of the table's mean loss: lets bytes decide between moves that the table calls equal


class _At(NamedTuple):
    """Where a genome stands, for every pair: what it costs to look up for thousands of genomes a generation."""

    genome: Genome
    here: np.ndarray  # (P,) pair that the pair's gene is at
    added: np.ndarray  # (P,) bytes of the move
    file_bytes: int


class Moves:
    """Sizes and losses of all moves, where a move sets one gene to one choice.

    Without a table every byte is worth the same, so that only chance and fit decide. Of the last two genomes it keeps
    what it worked out: a genome is mostly asked about again, or moved on.
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
        """(G,) pair that each gene of ``genome`` is at."""
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
        return self._at(genome).file_bytes

    def steps(self, genome: Genome) -> np.ndarray:
        """(P,) choices that each move is up or down from ``genome``."""
        steps: np.ndarray = self._pairs - self._at(genome).here
        return steps

    def predict(self, genome: Genome) -> float:
        return float(self.loss[self.pairs(genome)].sum())

    def bytes_added(self, genome: Genome) -> np.ndarray:
        """(P,) bytes that each move adds to ``genome``; not to be changed."""
        return self._at(genome).added

    def deltas(self, genome: Genome) -> tuple[np.ndarray, np.ndarray]:
        """(P,) bytes and (P,) loss that each move adds to ``genome``; not to be changed."""
        found = self._at(genome)
        return found.added, self.loss - self.loss[found.here]

    def noise(self, rng: random.Random | None, temperature: float) -> np.ndarray | float:
        """(P,) log-normal factors around 1 that perturb a ranking; exactly 1 without ``rng``."""
        if rng is None:
            return 1.0
        return np.exp(temperature * np.random.default_rng(rng.getrandbits(64)).standard_normal(len(self.gene)))

    def downgrade(self, genome: Genome, excess: int, noise: np.ndarray | float) -> Genome:
        """``genome`` after the smaller choice that loses least for each byte of ``excess`` (> 0) that it saves.

        Bytes saved beyond the excess count for nothing, which keeps repairs small.
        """
        _, here, added, _ = self._at(genome)
        smaller = (added < 0).nonzero()[0]
        factors = noise[smaller] if isinstance(noise, np.ndarray) else noise
        loss = self.loss[smaller] - self.loss[here[smaller]]
        cost = (np.maximum(loss, 0) + self._least_gain) * factors / np.minimum(-added[smaller], excess)
        return self.apply(genome, int(smaller[np.argmin(cost)]))

    def upgrade(self, genome: Genome, slack: int, noise: np.ndarray | float) -> Genome | None:
        """``genome`` after the larger choice within ``slack`` bytes that gains most a byte; None if none fits."""
        _, here, added, _ = self._at(genome)
        fits = ((added > 0) & (added <= slack)).nonzero()[0]
        if not len(fits):
            return None
        factors = noise[fits] if isinstance(noise, np.ndarray) else noise
        loss = self.loss[fits] - self.loss[here[fits]]
        gain = (np.maximum(-loss, 0) + self._least_gain) * factors / added[fits]
        return self.apply(genome, int(fits[np.argmax(gain)]))

    def apply(self, genome: Genome, pair: int) -> Genome:
        """``genome`` with the gene of ``pair`` at its choice."""
        gene = int(self.gene[pair])
        moved = (*genome[:gene], int(self.choice[pair]), *genome[gene + 1 :])
        before = self._at(genome)
        here, added = before.here.copy(), before.added.copy()
        own = slice(self.offset[gene], self._end[gene])
        here[own] = pair
        added[own] = self.size[own] - self.size[pair]
        return self._keep(_At(moved, here, added, before.file_bytes + int(before.added[pair]))).genome
