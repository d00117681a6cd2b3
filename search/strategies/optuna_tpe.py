"""Optuna's tree-structured Parzen estimator (TPE) as a baseline, through ask and tell.

TPE offers its random state only as a Python object, so the sampler works on an in-memory study, which a resumed run
rebuilds by replaying every batch from the seed (25 to 45 ms per trial). Results are also copied to a journal file,
where optuna-dashboard finds them under the study's name.
"""

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from bitgenome.common.files import cut_torn_tail
from search.allocation.repair import Repair
from search.strategies.base import Batch, BatchStrategy
from search.strategies.rng import rng_to_json
from search.strategies.settings import OptunaSettings
from search.types import Fidelity, Genome

STUDY_NAME = "bitgenome"
PROPOSAL_TRIES = 5  # proposals whose repaired genome is already known, before a random genome is used instead


class OptunaStrategy(BatchStrategy):
    """Samples one integer per gene with TPE, and repairs each proposal to the budget.

    The loss goes to the trial of the proposal, which carries the repaired genome as user attribute "genome".
    """

    def __init__(
        self,
        repair: Repair,
        seeds: Mapping[str, Genome],
        settings: OptunaSettings | None = None,
        journal: Path | None = None,
    ) -> None:
        """Start from the genomes of ``seeds``; copy trials to the file ``journal``, if there is one."""
        self.settings = settings or OptunaSettings()
        super().__init__(repair, self.settings.seed)
        self._seeds = tuple(dict.fromkeys(seeds.values()))
        self._journal = journal
        self._start()

    @property
    def expected_evaluations(self) -> int:
        return self.settings.evaluations

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Rebuild the sampler by asking and telling every batch again from the seed.

        Raises ValueError if that does not reproduce ``state``: it belongs to another strategy, space, budget or seed.
        """
        self._check_name(state)
        self._start()
        for batch in self._batches_of(state):
            self._expect([scored.genome for scored in batch])
            self._take(batch)
        if state["batch"] is not None:
            self._expect([tuple(genome) for genome in state["batch"]])
        if rng_to_json(self.rng) != state["rng"]:
            raise ValueError("replaying the optuna search from its seed did not reach the saved random state")

    def _start(self) -> None:
        """Create an empty study with the seeds in its queue."""
        self._reset()
        self.rng = random.Random(self.settings.seed)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=self.settings.seed, n_startup_trials=self.settings.startup)
        self._study = optuna.create_study(study_name=STUDY_NAME, sampler=sampler)
        self._distributions: dict[str, BaseDistribution] = {
            gene.name: IntDistribution(0, len(gene.formats) - 1) for gene in self.space.genes
        }
        self._trials: list[Trial] = []  # trials of the batch, in its order
        for seed in self._seeds:
            self._study.enqueue_trial(self._params(seed))

    def _expect(self, genomes: list[Genome]) -> None:
        """Raise ValueError unless the next ``ask`` returns ``genomes``."""
        if self.ask() != genomes:
            raise ValueError(
                "replaying the optuna search from its seed gave other genomes than the saved state: "
                "expected the space, budget, sensitivities, seeds and settings it was made with"
            )

    def _propose(self) -> list[Genome]:
        count = min(self.settings.batch_size, self.settings.evaluations - self.evaluations)
        asked = [found for found in (self._new_trial() for _ in range(count)) if found is not None]
        self._trials = [trial for trial, _ in asked]
        return [genome for _, genome in asked]

    def _new_trial(self) -> tuple[Trial, Genome] | None:
        """Return a trial and its repaired genome, never proposed before; None if the space has no new one."""
        for _ in range(PROPOSAL_TRIES):
            trial = self._study.ask(self._distributions)
            genome = self._feasible(tuple(trial.params[gene.name] for gene in self.space.genes))
            if self._is_new(genome):
                break
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            immigrant = self._new(self._random)
            if immigrant is None:
                return None
            genome = immigrant
            self._study.enqueue_trial(self._params(genome))
            trial = self._study.ask(self._distributions)
        trial.set_user_attr("genome", list(genome))
        return trial, genome

    def _check_text(self, found: Sequence[Fidelity], rescored: Sequence[Genome]) -> None:
        """Raise ValueError as the base class does, and for another draw of text than before."""
        super()._check_text(found, rescored)
        first = next((s.fidelity for batch in self.told[-1:] for s in batch if s.fidelity.tokens), found[0])
        if found[0].draw != first.draw:
            raise ValueError(f"the estimator ranks all trials together: expected draw {first.draw}, found {found[0]}")

    def _learn(self, batch: Batch) -> None:
        """Tell the study the losses; a genome that did not reach the last rung is a pruned trial.

        TPE ranks pruned trials by their rung, then by their loss.
        """
        last = max(scored.fidelity.tokens for scored in batch)
        for trial, scored in zip(self._trials, batch, strict=True):
            if not math.isfinite(scored.loss):
                self._study.tell(trial, state=TrialState.FAIL)
            elif scored.fidelity.tokens < last:
                trial.report(scored.loss, step=scored.fidelity.tokens)
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                self._study.tell(trial, scored.loss)
        if self._journal is not None:
            self._mirror(self._journal)

    def _mirror(self, journal: Path) -> None:
        """Append to the study on disk the trials that it does not have yet."""
        cut_torn_tail(journal)
        study = optuna.create_study(
            study_name=STUDY_NAME, storage=JournalStorage(JournalFileBackend(str(journal))), load_if_exists=True
        )
        study.add_trials(self._study.get_trials(deepcopy=False)[len(study.get_trials(deepcopy=False)) :])

    def _params(self, genome: Genome) -> dict[str, int]:
        return {gene.name: choice for gene, choice in zip(self.space.genes, genome, strict=True)}
