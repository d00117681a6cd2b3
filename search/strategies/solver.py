"""A strategy without a search: the solvers' genomes, and near-optimal alternatives around them."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from search.allocation.exact import lagrangian
from search.allocation.repair import Repair
from search.allocation.sensitivity import SensitivityTable
from search.strategies.base import Batch, BatchStrategy
from search.strategies.settings import SolverSettings
from search.types import Genome


class SolverStrategy(BatchStrategy):
    """Proposes one batch: the seeds (uniform, greedy, Lagrangian and exact by each table), then the alternatives.

    Near the optimum the true loss differs from an additive table by noise and interactions. The optima of perturbed
    tables are the genomes that such a difference could make better. Raises ValueError without seeds.
    """

    def __init__(
        self,
        repair: Repair,
        seeds: Mapping[str, Genome],
        tables: Sequence[SensitivityTable] = (),
        settings: SolverSettings | None = None,
    ) -> None:
        if not seeds:
            raise ValueError("the exact strategy has no genomes to try: expected seeds, found none")
        self.settings = settings or SolverSettings()
        self._seeds = tuple(dict.fromkeys(seeds.values()))
        self._tables = tuple(tables)
        super().__init__(repair, self.settings.seed)

    @property
    def expected_evaluations(self) -> int:
        return len(self._seeds) + (self.settings.alternatives if self._tables else 0)

    def _learn(self, batch: Batch) -> None:
        """Do nothing: what is asked does not depend on losses."""

    def _propose(self) -> list[Genome]:
        if self.told:
            return []
        seeds = [genome for genome in (self.repair(seed, self.rng) for seed in self._seeds) if self._is_new(genome)]
        wanted = self.settings.alternatives if self._tables else 0
        found = (self._new(partial(self._alternative, i % len(self._tables)), tries=4) for i in range(wanted))
        return [*seeds, *(genome for genome in found if genome is not None)]

    def _alternative(self, index: int) -> Genome:
        """Return the repaired Lagrangian genome of a noisy copy of table ``index``."""
        table = self._tables[index]
        noise = np.random.default_rng(self.rng.getrandbits(64))
        loss = tuple(v * np.exp(self.settings.spread * noise.standard_normal(len(v))) for v in table.loss)
        genome = lagrangian(self.space, self.repair.budget, SensitivityTable(table.measure, loss))
        return self.repair(genome, self.rng)
