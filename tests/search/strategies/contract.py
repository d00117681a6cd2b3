"""What every strategy must pass; a test class inherits it and says how its strategy is made."""

import dataclasses
import json
from typing import ClassVar

import pytest

from search.budget import Budget
from search.strategies.base import BatchStrategy
from search.types import Evaluation, Fidelity, Genome, SearchSpace
from tests.search.synthetic import Landscape, middle_budget, odd_space, random_table, transformer_space


class StrategyContract:
    space: ClassVar[SearchSpace] = transformer_space(3)
    landscape: ClassVar[Landscape] = Landscape(space, random_table(space, 0), interaction=1.0)
    budget: ClassVar[Budget] = middle_budget(space)

    def make(self, seed: int = 0, space: SearchSpace | None = None, budget: Budget | None = None) -> BatchStrategy:
        """A strategy of about 60 evaluations."""
        raise NotImplementedError

    def tell(self, strategy: BatchStrategy, genomes: list[Genome]) -> None:
        strategy.tell([self.landscape.evaluation(genome) for genome in genomes])

    def finish(self, strategy: BatchStrategy) -> list[Genome]:
        asked = []
        while genomes := strategy.ask():
            asked += genomes
            self.tell(strategy, genomes)
        return asked

    def test_every_genome_keeps_the_budget_and_is_within_half_a_percent_of_it(self) -> None:
        for genome in self.finish(self.make()):
            assert 0.995 * self.budget.file_bytes <= self.space.file_bytes(genome) <= self.budget.file_bytes

    def test_no_genome_is_asked_twice_and_the_count_is_as_expected(self) -> None:
        strategy = self.make()
        asked = self.finish(strategy)
        assert len(set(asked)) == len(asked)
        assert len(asked) == strategy.expected_evaluations

    def test_a_finished_strategy_stays_finished(self) -> None:
        strategy = self.make()
        self.finish(strategy)
        assert strategy.ask() == []

    def test_the_seed_determines_the_run(self) -> None:
        assert self.finish(self.make(seed=3)) == self.finish(self.make(seed=3))
        assert self.finish(self.make(seed=3)) != self.finish(self.make(seed=4))

    def test_asking_again_before_tell_gives_the_same_batch(self) -> None:
        strategy = self.make()
        assert strategy.ask() == strategy.ask()

    @pytest.mark.parametrize("asked_before_saving", [False, True])
    def test_state_survives_json_and_continues_identically(self, asked_before_saving: bool) -> None:
        strategy = self.make()
        self.tell(strategy, strategy.ask())
        if asked_before_saving:
            strategy.ask()
        state = json.loads(json.dumps(strategy.state_dict(), allow_nan=False))
        restored = self.make()
        restored.load_state_dict(state)
        assert restored.state_dict() == strategy.state_dict()
        assert self.finish(restored) == self.finish(strategy)
        assert restored.state_dict() == strategy.state_dict()

    def test_saving_does_not_change_the_run(self) -> None:
        watched, alone = self.make(), self.make()
        watched.state_dict()
        assert watched.ask() == alone.ask()

    def test_forgetting_what_is_on_file_changes_nothing(self) -> None:
        forgetful, alone = self.make(), self.make()
        while genomes := alone.ask():
            assert forgetful.ask() == genomes
            for strategy in (forgetful, alone):
                self.tell(strategy, genomes)
            assert forgetful.state_dict(alone.batches - 1) == alone.state_dict(alone.batches - 1)
            forgetful.forget(alone.batches)
        assert forgetful.ask() == []
        assert forgetful.told == alone.told[-len(forgetful.told) :]
        if len(forgetful.told) < alone.batches:
            with pytest.raises(ValueError, match="are forgotten"):
                forgetful.state_dict()

    def test_tell_refuses_other_genomes_another_order_and_a_missing_one(self) -> None:
        strategy = self.make()
        results = [self.landscape.evaluation(genome) for genome in strategy.ask()]
        other = dataclasses.replace(results[0], genome=self.space.smallest())
        for wrong in ([other, *results[1:]], results[::-1], results[:-1], [*results, results[0]], []):
            with pytest.raises(ValueError, match="genomes of the last ask"):
                strategy.tell(wrong)
        strategy.tell(results)

    def test_tell_refuses_results_that_were_not_asked_for(self) -> None:
        strategy = self.make()
        with pytest.raises(ValueError, match="ask first"):
            strategy.tell([])
        results = [self.landscape.evaluation(genome) for genome in strategy.ask()]
        strategy.tell(results)
        with pytest.raises(ValueError, match="ask first"):
            strategy.tell(results)

    def test_tell_refuses_mixed_text(self) -> None:
        strategy = self.make()
        results = [self.landscape.evaluation(genome) for genome in strategy.ask()]
        for other in ({"draw": 7}, {"split": "validation"}):
            with pytest.raises(ValueError, match="different text"):
                strategy.tell([dataclasses.replace(results[0], **other), *results[1:]])

    def test_genomes_that_stop_on_lower_rungs_change_nothing_of_the_protocol(self) -> None:
        strategy, told = self.make(), 0
        while genomes := strategy.ask():
            rungs = [Fidelity("search", (0, 256, 1024)[min(2, i)]) for i in range(len(genomes))]
            strategy.tell([self.landscape.evaluation(g, rung) for g, rung in zip(genomes, rungs, strict=True)])
            restored = self.make()
            restored.load_state_dict(json.loads(json.dumps(strategy.state_dict(), allow_nan=False)))
            assert restored.ask() == strategy.ask()
            assert restored.incumbents == strategy.incumbents
            told += len(genomes)
        assert told <= strategy.expected_evaluations

    def test_new_text_is_told_with_the_incumbents_on_it_and_not_without(self) -> None:
        strategy, told = self.make(), 0
        while genomes := strategy.ask():
            text = Fidelity("search", 1024, draw=self.draw(told))
            results = [self.landscape.evaluation(genome, text) for genome in genomes]
            rescored = [self.landscape.evaluation(genome, text) for genome in strategy.incumbents]
            if rescored:
                for wrong in ([], rescored[1:], rescored[::-1]):
                    with pytest.raises(ValueError, match="incumbents on the batch's text"):
                        strategy.tell(results, wrong)
            strategy.tell(results, rescored)
            restored = self.make()
            restored.load_state_dict(json.loads(json.dumps(strategy.state_dict(), allow_nan=False)))
            assert restored.ask() == strategy.ask()
            assert restored.incumbents == strategy.incumbents
            told += 1

    def draw(self, batches: int) -> int:
        """Of the text after so many batches."""
        return 1 + batches

    def test_losses_that_are_no_numbers_do_not_stop_the_run_nor_its_state(self) -> None:
        for finite in (3, 10**9):  # every third, or none at all
            strategy = self.make()
            while genomes := strategy.ask():
                strategy.tell([self._broken(genome, i % finite) for i, genome in enumerate(genomes, start=1)])
            json.dumps(strategy.state_dict(), allow_nan=False)

    def test_state_of_another_strategy_is_refused(self) -> None:
        with pytest.raises(ValueError, match="cannot be loaded"):
            self.make().load_state_dict({**self.make().state_dict(), "strategy": "Other"})

    def test_a_space_that_runs_out_of_genomes_ends_the_run_early(self) -> None:
        space = odd_space([64, 64, 64], ("W2", "W3", "W4"))
        budget = Budget(space.file_bytes((1, 1, 1)))
        strategy = self.make(space=space, budget=budget)
        asked = []
        while genomes := strategy.ask():
            asked += genomes
            strategy.tell([Evaluation(g, sum(g), 1.0, 1.0, 1.0, 1.0, space.file_bytes(g), "s", 1) for g in genomes])
        assert len(asked) == len(set(asked)) < 27
        assert all(space.file_bytes(genome) <= budget.file_bytes for genome in asked)

    def _broken(self, genome: Genome, index: int) -> Evaluation:
        loss = self.landscape.loss(genome) if index == 0 else (float("nan"), float("inf"))[index % 2]
        return dataclasses.replace(self.landscape.evaluation(genome), loss=loss)
