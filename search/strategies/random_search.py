"""Repaired random genomes: the baseline that a search has to beat."""

from dataclasses import dataclass

from search.allocation.repair import Repair
from search.strategies.base import Batch, BatchStrategy
from search.types import Genome


@dataclass(frozen=True)
class RandomSettings:
    evaluations: int = 240
    batch_size: int = 20
    seed: int = 0


class RandomStrategy(BatchStrategy):
    """Draws every gene on its own, then repairs."""

    def __init__(self, repair: Repair, settings: RandomSettings | None = None) -> None:
        self.settings = settings or RandomSettings()
        super().__init__(repair, self.settings.seed)

    @property
    def expected_evaluations(self) -> int:
        return self.settings.evaluations

    def _learn(self, batch: Batch) -> None:
        """Nothing: what is asked does not depend on losses."""

    def _propose(self) -> list[Genome]:
        count = min(self.settings.batch_size, self.settings.evaluations - self.evaluations)
        return self._new_ones(self._random, count)
