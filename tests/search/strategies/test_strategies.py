"""Every strategy passes the contract; each has claims of its own."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from search.allocation.repair import Repair
from search.allocation.seeds import seed_genomes
from search.allocation.sensitivity import SensitivityTable
from search.budget import Budget
from search.strategies.base import BatchStrategy
from search.strategies.factory import make_strategy
from search.strategies.genetic import GeneticStrategy, global_random
from search.strategies.optuna_tpe import STUDY_NAME, OptunaStrategy
from search.strategies.random_search import RandomStrategy
from search.strategies.settings import GeneticSettings, OptunaSettings, RandomSettings, SolverSettings
from search.strategies.solver import SolverStrategy
from search.types import Fidelity, Genome, SearchSpace
from tests.search.strategies.contract import StrategyContract
from tests.search.synthetic import SEARCH, Landscape, middle_budget, random_table, transformer_space


def seeded(space: SearchSpace, budget: Budget) -> tuple[dict[str, Genome], SensitivityTable]:
    table = random_table(space, 0)
    return seed_genomes(space, budget, [table]), table


class TestRandomStrategy(StrategyContract):
    def make(self, seed: int = 0, space: SearchSpace | None = None, budget: Budget | None = None) -> BatchStrategy:
        return RandomStrategy(
            Repair(space or self.space, budget or self.budget), RandomSettings(evaluations=60, batch_size=25, seed=seed)
        )


class TestSolverStrategy(StrategyContract):
    def make(self, seed: int = 0, space: SearchSpace | None = None, budget: Budget | None = None) -> BatchStrategy:
        space, budget = space or self.space, budget or self.budget
        seeds, table = seeded(space, budget)
        return SolverStrategy(Repair(space, budget, table), seeds, [table], SolverSettings(spread=0.5, seed=seed))

    def test_no_genome_is_asked_twice_and_the_count_is_as_expected(self) -> None:
        strategy = self.make()
        asked = self.finish(strategy)
        assert len(asked) == len(set(asked)) <= strategy.expected_evaluations

    def test_needs_seeds(self) -> None:
        with pytest.raises(ValueError, match="expected seeds"):
            SolverStrategy(Repair(self.space, self.budget), {})


class TestGeneticStrategy(StrategyContract):
    def make(self, seed: int = 0, space: SearchSpace | None = None, budget: Budget | None = None) -> BatchStrategy:
        space, budget = space or self.space, budget or self.budget
        seeds, table = seeded(space, budget)
        settings = GeneticSettings(population=12, generations=5, elites=4, seed=seed)
        return GeneticStrategy(Repair(space, budget, table), seeds, table, settings)

    @pytest.mark.parametrize("crossover", ["one_point", "two_point", "uniform"])
    def test_runs_with_each_crossover_and_without_a_table(self, crossover: str) -> None:
        settings = GeneticSettings(population=8, generations=3, crossover=crossover)  # type: ignore[arg-type]
        assert len(set(self.finish(GeneticStrategy(Repair(self.space, self.budget), {}, None, settings)))) == 24

    def test_only_evaluations_that_proposals_look_at_stay_and_the_search_goes_on_the_same(self) -> None:
        seeds, table = seeded(self.space, self.budget)
        settings = GeneticSettings(population=60, generations=9, brood=3)
        forgetful, alone = (
            GeneticStrategy(Repair(self.space, self.budget, table), seeds, table, settings) for _ in range(2)
        )
        while genomes := alone.ask():
            assert forgetful.ask() == genomes
            for strategy in (forgetful, alone):
                self.tell(strategy, genomes)
            forgetful.forget(alone.batches)
        assert sum(map(len, forgetful.told)) < 320 + 60 < sum(map(len, alone.told))
        assert forgetful.ask() == []

    def test_the_seeds_are_in_the_first_generation(self) -> None:
        seeds, _ = seeded(self.space, self.budget)
        assert set(seeds.values()) <= set(self.make().ask())

    def test_a_genome_that_stopped_low_is_no_elite_whatever_its_loss(self) -> None:
        strategy = self.make()
        low, high = Fidelity("search", 256), Fidelity("search", 1024)
        results = [self.landscape.evaluation(g, high if i < 6 else low) for i, g in enumerate(strategy.ask())]
        strategy.tell([replace(r, loss=r.loss / 1000) if r.tokens == low.tokens else r for r in results])
        best = sorted(results[:6], key=lambda r: r.loss)[:4]
        assert strategy.incumbents == [r.genome for r in best]

    def test_on_new_text_elites_are_ranked_by_their_losses_there_alone(self) -> None:
        strategy = self.make()
        self.tell(strategy, strategy.ask())
        elites = strategy.incumbents
        text = Fidelity("search", 1024, draw=1)
        newcomers = [self.landscape.evaluation(genome, text) for genome in strategy.ask()]
        rescored = [replace(self.landscape.evaluation(genome, text), loss=1e9 + i) for i, genome in enumerate(elites)]
        strategy.tell(newcomers, rescored)
        assert not set(strategy.incumbents) & set(elites)

    def test_the_global_random_state_is_left_alone(self) -> None:
        random.seed(5)
        expected = random.Random(5).random()
        self.finish(self.make())
        assert random.random() == expected

    def test_the_global_random_state_comes_back_after_an_error(self) -> None:
        before = random.getstate()
        with pytest.raises(KeyError), global_random(random.Random(1)):
            random.random()
            raise KeyError
        assert random.getstate() == before

    def test_a_swap_changes_two_genes_for_each_swap_and_little_of_the_size(self) -> None:
        strategy = self.make()
        assert isinstance(strategy, GeneticStrategy)
        start = strategy._random()
        for _ in range(50):
            swapped = strategy._swap(start)
            assert sum(a != b for a, b in zip(start, swapped, strict=True)) <= 6
            assert self.space.file_bytes(swapped) <= 1.1 * self.budget.file_bytes

    @pytest.mark.parametrize(
        "settings", [{"crossover": "none"}, {"population": 0}, {"swap_rate": 1.5}, {"immigrants": 20}, {"elites": 0}]
    )
    def test_settings_out_of_range_are_refused(self, settings: dict) -> None:
        with pytest.raises(ValueError, match=next(iter(settings))):
            GeneticSettings(**settings)


class TestOptunaStrategy(StrategyContract):
    def make(self, seed: int = 0, space: SearchSpace | None = None, budget: Budget | None = None) -> BatchStrategy:
        space, budget = space or self.space, budget or self.budget
        seeds, table = seeded(space, budget)
        settings = OptunaSettings(evaluations=40, batch_size=16, startup=16, seed=seed)
        return OptunaStrategy(Repair(space, budget, table), seeds, settings)

    def test_the_journal_holds_every_trial_once_even_after_a_torn_write_and_a_resume(self, tmp_path: Path) -> None:
        journal = tmp_path / "optuna.log"
        settings = OptunaSettings(evaluations=24, batch_size=8, startup=8)
        repair = Repair(self.space, self.budget)
        first = OptunaStrategy(repair, {}, settings, journal)
        self.tell(first, first.ask())
        state = first.state_dict()
        self.tell(first, first.ask())
        with journal.open("ab") as stream:
            stream.write(b'{"op_code": 4, "torn')
        resumed = OptunaStrategy(repair, {}, settings, journal)
        resumed.load_state_dict(state)
        self.finish(resumed)
        trials = optuna.load_study(
            study_name=STUDY_NAME, storage=JournalStorage(JournalFileBackend(str(journal)))
        ).trials
        told = [scored.genome for batch in resumed.told for scored in batch]
        assert [tuple(t.user_attrs["genome"]) for t in trials if t.state.name == "COMPLETE"] == told

    def draw(self, batches: int) -> int:
        return 1  # the estimator ranks all trials

    def test_new_text_is_refused(self) -> None:
        strategy = self.make()
        self.tell(strategy, strategy.ask())
        text = Fidelity("search", 1024, draw=1)
        with pytest.raises(ValueError, match="ranks all trials together"):
            strategy.tell([self.landscape.evaluation(genome, text) for genome in strategy.ask()])

    def test_a_genome_that_stops_low_is_a_pruned_trial_with_its_loss_at_its_rung(self) -> None:
        strategy = self.make()
        assert isinstance(strategy, OptunaStrategy)
        rungs = [Fidelity("search", 256 if i else 1024) for i, _ in enumerate(strategy.ask())]
        results = [self.landscape.evaluation(g, rung) for g, rung in zip(strategy.ask(), rungs, strict=True)]
        strategy.tell(results)
        trials = strategy._study.trials
        assert [t.state.name for t in trials] == ["COMPLETE"] + ["PRUNED"] * (len(rungs) - 1)
        assert [t.intermediate_values for t in trials[1:]] == [{256: result.loss} for result in results[1:]]

    def test_a_state_of_another_seed_is_refused(self) -> None:
        strategy = self.make(seed=1)
        self.tell(strategy, strategy.ask())
        with pytest.raises(ValueError, match="replaying the optuna search"):
            self.make(seed=2).load_state_dict(strategy.state_dict())


def best_of(name: str, seed: int, interaction: float) -> tuple[float, float]:
    """Lowest loss of a default run, and of its seeds, on a landscape of 36 genes."""
    space = transformer_space(5)
    budget, table = middle_budget(space), random_table(space, seed)
    landscape = Landscape(space, table, interaction, seed)
    seeds = seed_genomes(space, budget, [table])
    strategy = make_strategy(name, space, budget, tables=[table], seeds=seeds)
    least = np.inf
    while genomes := strategy.ask():
        evaluations = list(landscape(genomes, SEARCH))
        strategy.tell(evaluations)
        least = min(least, *(e.loss for e in evaluations))
    return least, min(map(landscape.loss, seeds.values()))


@pytest.mark.parametrize("seed", range(3))
def test_the_default_genetic_search_beats_its_seeds_where_genes_interact(seed: int) -> None:
    found, seeds = best_of("genetic", seed, interaction=1.0)
    assert found < 0.95 * seeds


def test_the_default_genetic_search_ties_the_exact_solution_where_they_do_not() -> None:
    found, seeds = best_of("genetic", 0, interaction=0.0)
    assert found == pytest.approx(seeds, rel=1e-12)


def test_the_factory_names_the_strategies_it_knows() -> None:
    space = transformer_space(1)
    with pytest.raises(ValueError, match="genetic, optuna, exact, random"):
        make_strategy("annealing", space, middle_budget(space))
    with pytest.raises(ValueError, match="expects RandomSettings, found GeneticSettings"):
        make_strategy("random", space, middle_budget(space), settings=GeneticSettings())
