"""A prior makes some genes rise more often than others; with it the strategy keeps its whole contract."""

from collections import Counter

import pytest

from search.allocation.repair import Repair
from search.budget import Budget
from search.strategies.base import BatchStrategy
from search.strategies.genetic import GeneticStrategy
from search.strategies.settings import GeneticSettings
from search.types import SearchSpace
from tests.search.strategies.contract import StrategyContract
from tests.search.synthetic import middle_budget, transformer_space


class TestGeneticStrategyWithPrior(StrategyContract):
    def make(self, seed: int = 0, space: SearchSpace | None = None, budget: Budget | None = None) -> BatchStrategy:
        space, budget = space or self.space, budget or self.budget
        prior = [1.0 + gene % 5 for gene in range(len(space.genes))]
        settings = GeneticSettings(population=12, generations=5, seed=seed)
        return GeneticStrategy(Repair(space, budget), {"small": space.smallest()}, None, settings, prior)


def swaps(prior: list[float] | None, count: int = 400) -> tuple[Counter[int], Counter[int]]:
    """How often each gene rises and falls in swaps of a genome in the middle of the space."""
    space = transformer_space(2)
    repair = Repair(space, middle_budget(space, 0.6))
    strategy = GeneticStrategy(repair, {}, None, GeneticSettings(), prior)
    start = repair.fill(repair((3,) * len(space.genes), strategy.rng), strategy.rng)
    raised: Counter[int] = Counter()
    lowered: Counter[int] = Counter()
    for _ in range(count):
        changed = strategy._swap_once(start)
        for gene, (before, after) in enumerate(zip(start, changed, strict=True)):
            raised[gene] += after > before
            lowered[gene] += after < before
    return raised, lowered


def test_genes_of_a_higher_prior_rise_more_often_and_pay_less_often() -> None:
    space = transformer_space(2)
    favoured = [gene for gene in range(len(space.genes)) if gene % 2]
    prior = [4.0 if gene in favoured else 1.0 for gene in range(len(space.genes))]
    (raised, lowered), (raised_before, lowered_before) = swaps(prior), swaps(None)
    assert sum(raised[g] for g in favoured) > 1.3 * sum(raised_before[g] for g in favoured)
    assert sum(lowered[g] for g in favoured) < sum(lowered_before[g] for g in favoured)


def test_the_same_prior_for_all_favours_none() -> None:
    (raised, _), (raised_before, _) = swaps([2.0] * 15, 1500), swaps(None, 1500)
    for gene in range(15):
        assert raised[gene] == pytest.approx(raised_before[gene], abs=60)


@pytest.mark.parametrize("prior", [[1.0], [0.0] * 15, [float("inf")] * 15, [-1.0] * 15])
def test_a_prior_that_cannot_serve_is_refused(prior: list[float]) -> None:
    with pytest.raises(ValueError, match="expected a prior of 15 finite positive values, one a gene"):
        swaps(prior, 1)
