"""Every (gene, choice) of a space in flat vectors, and the greedy step over them.

Shapes: G genes; P = all (gene, choice) pairs, in gene order.
"""

import random

import numpy as np

from search.sensitivity import SensitivityTable
from search.types import Genome, SearchSpace

LEAST_GAIN = 1e-9  # of the table's mean loss: lets bytes decide between moves that the table calls equal


class Moves:
    """Sizes and losses of all moves, where a move sets one gene to one choice.

    Without a table every byte is worth the same, so that only chance and fit decide.
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
        self._least_gain = LEAST_GAIN * float(np.abs(self.loss).mean()) or LEAST_GAIN

    def pairs(self, genome: Genome) -> np.ndarray:
        """(G,) pair that each gene of ``genome`` is at."""
        return self.offset + np.asarray(genome)

    def file_bytes(self, genome: Genome) -> int:
        return self.fixed_bytes + int(self.size[self.pairs(genome)].sum())

    def predict(self, genome: Genome) -> float:
        return float(self.loss[self.pairs(genome)].sum())

    def deltas(self, genome: Genome) -> tuple[np.ndarray, np.ndarray]:
        """(P,) bytes and (P,) loss that each move adds to ``genome``."""
        here = self.pairs(genome)[self.gene]
        return self.size - self.size[here], self.loss - self.loss[here]

    def noise(self, rng: random.Random | None, temperature: float) -> np.ndarray | float:
        """(P,) log-normal factors around 1 that perturb a ranking; exactly 1 without ``rng``."""
        if rng is None:
            return 1.0
        return np.exp(temperature * np.random.default_rng(rng.getrandbits(64)).standard_normal(len(self.gene)))

    def downgrade(self, genome: Genome, excess: int, noise: np.ndarray | float) -> Genome:
        """``genome`` after the smaller choice that loses least for each byte of ``excess`` (> 0) that it saves.

        Bytes saved beyond the excess count for nothing, which keeps repairs small.
        """
        added, loss = self.deltas(genome)
        useful = np.minimum(-added, excess)
        cost = np.full(len(added), np.inf)
        np.divide((np.maximum(loss, 0) + self._least_gain) * noise, useful, out=cost, where=useful > 0)
        return self.apply(genome, int(np.argmin(cost)))

    def upgrade(self, genome: Genome, slack: int, noise: np.ndarray | float) -> Genome | None:
        """``genome`` after the larger choice within ``slack`` bytes that gains most a byte; None if none fits."""
        added, loss = self.deltas(genome)
        fits = (added > 0) & (added <= slack)
        if not fits.any():
            return None
        gain = np.full(len(added), -np.inf)
        np.divide((np.maximum(-loss, 0) + self._least_gain) * noise, added, out=gain, where=fits)
        return self.apply(genome, int(np.argmax(gain)))

    def apply(self, genome: Genome, pair: int) -> Genome:
        """``genome`` with the gene of ``pair`` at its choice."""
        gene = int(self.gene[pair])
        return (*genome[:gene], int(self.choice[pair]), *genome[gene + 1 :])
