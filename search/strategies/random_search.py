"""Random search over repaired genomes, the baseline that every other search has to beat."""

from search.allocation.repair import Repair
from search.strategies.base import Batch, BatchStrategy
from search.strategies.settings import RandomSettings
from search.types import Genome


class RandomStrategy(BatchStrategy):
    """Draws every gene independently, then repairs the genome to the budget."""

    def __init__(self, repair: Repair, settings: RandomSettings | None = None) -> None:
        self.settings = settings or RandomSettings()
        super().__init__(repair, self.settings.seed)

    @property
    def expected_evaluations(self) -> int:
        return self.settings.evaluations

    def _learn(self, batch: Batch) -> None:
        """Do nothing: what is asked does not depend on losses."""

    def _propose(self) -> list[Genome]:
        count = min(self.settings.batch_size, self.settings.evaluations - self.evaluations)
        return self._new_ones(self._random, count)
