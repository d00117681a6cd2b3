"""Screening: it pays where the surrogate predicts, gives way where it misleads, and comes back."""

import json
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from search.allocation.repair import Repair
from search.allocation.seeds import seed_genomes
from search.allocation.sensitivity import SensitivityTable
from search.strategies.genetic import GeneticStrategy
from search.strategies.screening import FEWEST_JUDGED, UNSCREENED, Screening
from search.strategies.settings import GeneticSettings
from search.types import Genome, Scored
from tests.search.synthetic import SEARCH, Landscape, middle_budget, random_table, transformer_space

SPACE = transformer_space(3)
BUDGET = middle_budget(SPACE)
PLACES = 14
TRUTH = random_table(SPACE, 0)
Loss = Callable[[Genome], float]


def noise(genome: Genome) -> float:
    """A loss that no other genome's tells anything of."""
    return float(np.exp(0.1 * np.random.default_rng(list(genome)).normal()))


def reversed_table(table: SensitivityTable) -> SensitivityTable:
    """The genes that cost least there cost most here."""
    least = np.array([loss[-1] for loss in table.loss])
    swapped = np.empty(len(least))
    swapped[np.argsort(least)] = np.sort(least)[::-1]
    return SensitivityTable(
        "kl", tuple(loss * new / old for loss, new, old in zip(table.loss, swapped, least, strict=True))
    )


def rough_table(table: SensitivityTable) -> SensitivityTable:
    """Every loss wrong by a factor of its own."""
    rng = np.random.default_rng(1)
    return SensitivityTable("kl", tuple(loss * np.exp(rng.normal()) for loss in table.loss))


def finished(loss: Loss, table: SensitivityTable, brood: int, seed: int, generations: int = 6) -> GeneticStrategy:
    settings = GeneticSettings(population=16, generations=generations, brood=brood, seed=seed)
    strategy = GeneticStrategy(Repair(SPACE, BUDGET, table), seed_genomes(SPACE, BUDGET, [table]), table, settings)
    landscape = Landscape(SPACE, table)
    landscape.loss = loss  # type: ignore[method-assign]
    while genomes := strategy.ask():
        strategy.tell([landscape.evaluation(genome) for genome in genomes])
    return strategy


def best(strategy: GeneticStrategy) -> float:
    return min(scored.loss for batch in strategy.told for scored in batch)


@pytest.mark.parametrize("seed", range(2))
def test_on_an_additive_landscape_it_stays_on_and_finds_more_than_a_search_without(seed: int) -> None:
    loss, table = Landscape(SPACE, TRUTH, 0.0).loss, rough_table(TRUTH)
    screened = finished(loss, table, 16, seed)
    assert all(score.screened for score in screened._screening.scores)
    assert np.mean([score.correlation for score in screened._screening.scores]) > 0.7
    assert best(screened) < 0.99 * best(finished(loss, table, 1, seed))


def test_on_a_landscape_of_noise_it_switches_itself_off_and_costs_nothing() -> None:
    ratios = []
    for seed in range(3):
        screened = finished(noise, TRUTH, 16, seed)
        states = [score.screened for score in screened._screening.scores]
        assert states[:FEWEST_JUDGED] == [True] * FEWEST_JUDGED
        assert not any(states[FEWEST_JUDGED:])
        ratios.append(best(screened) / best(finished(noise, TRUTH, 1, seed)))
    assert np.exp(np.mean(np.log(ratios))) < 1.05  # the best of a run scatters by 4 %


def test_a_table_that_orders_genes_the_wrong_way_round_does_no_harm() -> None:
    loss, table = Landscape(SPACE, TRUTH, 1.0).loss, reversed_table(TRUTH)
    ratios = [best(finished(loss, table, 16, seed)) / best(finished(loss, table, 1, seed)) for seed in range(2)]
    assert np.mean(ratios) < 1.02


def told(genomes: list[Genome], losses: list[float]) -> list[Scored]:
    return [Scored(genome, loss, SEARCH) for genome, loss in zip(genomes, losses, strict=True)]


def broods(count: int) -> list[list[Genome]]:
    """Broods of 8 for each place, and before them some genomes to learn from."""
    random.seed(1)  # which breeding draws from
    strategy = GeneticStrategy(Repair(SPACE, BUDGET, TRUTH), seed_genomes(SPACE, BUDGET, [TRUTH]), TRUTH)
    landscape = Landscape(SPACE, TRUTH)
    strategy.tell([landscape.evaluation(genome) for genome in strategy.ask()])
    return [strategy._new_ones(strategy._breed, 8 * PLACES) for _ in range(count)]


def test_it_goes_off_while_predictions_are_reversed_and_comes_back_when_they_hold() -> None:
    first, *rest = broods(9)
    loss = Landscape(SPACE, TRUTH).loss
    screening, seen = Screening(TRUTH), told(first, [loss(genome) for genome in first])
    for generation, brood in enumerate(rest):
        batch = screening.choose(brood, PLACES, seen)
        sign = -1 if generation < 3 else 1
        screening.learn(told(batch, [loss(genome) ** sign for genome in batch]))
    states = [score.screened for score in screening.scores]
    assert states == [True, True, False, False, False, True, True, True]
    assert [score.correlation > 0 for score in screening.scores] == [False] * 3 + [True] * 5


def test_some_places_are_always_left_to_chance_and_all_of_them_once_it_is_off() -> None:
    first, brood = broods(2)
    screening = Screening(TRUTH)
    seen = told(first, [Landscape(SPACE, TRUTH).loss(genome) for genome in first])
    by_chance = brood[::8]
    left = round(UNSCREENED * PLACES)
    chosen = screening.choose(brood, PLACES, seen)
    assert chosen[:left] == by_chance[:left]
    assert sum(a != b for a, b in zip(chosen[left:], by_chance[left:], strict=True)) > PLACES / 2
    misled = Screening(TRUTH)
    for _ in range(FEWEST_JUDGED):
        batch = misled.choose(brood, PLACES, seen)
        misled.learn(told(batch, [noise(genome) for genome in batch]))
    assert not misled.active
    assert misled.choose(brood, PLACES, seen) == by_chance


def test_its_state_survives_json_before_and_after_an_evaluation() -> None:
    first, brood, another = broods(3)
    screening, loss = Screening(TRUTH), Landscape(SPACE, TRUTH, 1.0).loss
    seen = told(first, [loss(genome) for genome in first])
    batch = screening.choose(brood, PLACES, seen)
    resumed = Screening(TRUTH)
    resumed.load_state_dict(json.loads(json.dumps(screening.state_dict(), allow_nan=False)))
    for one in (screening, resumed):
        one.learn(told(batch, [loss(genome) for genome in batch]))
    assert resumed.scores == screening.scores
    assert len(screening.scores) == 1
    assert resumed.choose(another, PLACES, seen) == screening.choose(another, PLACES, seen)
    assert resumed.state_dict() == screening.state_dict()


def test_who_reached_a_higher_rung_counts_as_better_and_text_of_unknown_level_covers_as_any() -> None:
    first, brood = broods(2)
    screening, loss = Screening(TRUTH), Landscape(SPACE, TRUTH).loss
    batch = screening.choose(brood, PLACES, told(first, [loss(genome) for genome in first]))
    order = sorted(batch, key=loss)
    high, low = replace(SEARCH, draw=5), replace(SEARCH, draw=5, tokens=SEARCH.tokens // 4)
    better = order[: PLACES // 2]
    screening.learn([Scored(g, 9 * loss(g), high) if g in better else Scored(g, 2 * loss(g), low) for g in batch])
    assert screening.scores[0].correlation > 0.9
    assert screening.scores[0].coverage > 0.5


def test_losses_that_are_not_finite_are_left_out_of_the_comparison() -> None:
    first, brood = broods(2)
    screening = Screening(TRUTH)
    assert screening.choose(brood, PLACES, told(first, [np.inf] * len(first))) == brood[::8]
    screening.learn(told(brood[::8], [1.0] * PLACES))
    assert screening.scores == []
    batch = screening.choose(brood, PLACES, told(first, [Landscape(SPACE, TRUTH).loss(genome) for genome in first]))
    screening.learn(told(batch, [np.inf, *(1.0 for _ in batch[1:])]))
    assert [(score.offspring, score.correlation) for score in screening.scores] == [(PLACES - 1, 0.0)]
