"""The surrogate: its parts by hand, its ranking, its standard deviations, and losses of different text."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import spearmanr

from search.allocation.repair import Repair
from search.allocation.seeds import seed_genomes
from search.allocation.sensitivity import SensitivityTable
from search.strategies import surrogate
from search.strategies.genetic import GeneticStrategy
from search.strategies.surrogate import Surrogate, log_loss, usable
from search.types import Fidelity, Genome, Scored
from tests.search.synthetic import SEARCH, Landscape, middle_budget, random_table, transformer_space

SPACE = transformer_space(5)
OTHER = Fidelity("search", 512, 7)


def neighbourhood(seed: int, interaction: float, count: int = 240) -> tuple[list[Genome], Landscape, SensitivityTable]:
    """Neighbours of the exact solution by one to three swaps, and their true loss."""
    table = random_table(SPACE, seed)
    repair = Repair(SPACE, middle_budget(SPACE, 0.2), table)
    centre = seed_genomes(SPACE, repair.budget, [table])["exact kl"]
    strategy = GeneticStrategy(repair, {}, table)
    genomes = list(dict.fromkeys(strategy._finish(centre, strategy._swap) for _ in range(count)))
    return genomes, Landscape(SPACE, table, interaction, seed), table


def scored(genomes: Sequence[Genome], landscape: Landscape, fidelity: Fidelity = SEARCH) -> list[Scored]:
    return [Scored(genome, landscape.loss(genome), fidelity) for genome in genomes]


def correlation(found: Surrogate, asked: Sequence[Genome], landscape: Landscape) -> float:
    return float(spearmanr([landscape.loss(g) for g in asked], found(asked, SEARCH).mean).statistic)


@pytest.mark.parametrize("seed", range(3))
def test_it_ranks_neighbours_better_than_the_additive_table_alone(seed: int) -> None:
    genomes, landscape, table = neighbourhood(seed, 1.0)
    told, asked = genomes[:120], genomes[120:]
    truth = [landscape.loss(genome) for genome in asked]
    with_table = spearmanr(truth, [table.predict(genome) for genome in asked]).statistic
    assert correlation(Surrogate(scored(told, landscape), table), asked, landscape) > with_table + 0.7 * (
        1 - with_table
    )


def test_it_corrects_a_table_that_is_wrong_and_does_without_one() -> None:
    genomes, landscape, table = neighbourhood(0, 0.0)
    rng = np.random.default_rng(0)
    wrong = SensitivityTable("kl", tuple(loss * np.exp(rng.normal()) for loss in table.loss))
    told, asked = genomes[:120], genomes[120:]
    alone = spearmanr([landscape.loss(g) for g in asked], [wrong.predict(g) for g in asked]).statistic
    assert alone < 0.8
    assert correlation(Surrogate(scored(told, landscape), wrong), asked, landscape) > 0.9
    assert correlation(Surrogate(scored(told, landscape)), asked, landscape) > 0.7


def test_pairs_enter_only_where_genes_interact() -> None:
    for interaction, enter in ((0.0, False), (1.0, True)):
        genomes, landscape, table = neighbourhood(1, interaction, 120)
        found = Surrogate(scored(genomes, landscape), table)
        assert (found._variances[surrogate.PAIRS] > 0) == enter


def test_about_two_thirds_of_losses_lie_within_a_standard_deviation() -> None:
    inside = []
    for seed, interaction in itertools.product(range(3), (0.3, 1.0)):
        genomes, landscape, table = neighbourhood(seed, interaction, 180)
        mean, deviation = Surrogate(scored(genomes[:80], landscape), table)(genomes[80:], SEARCH)
        inside += list(np.abs(log_loss([landscape.loss(g) for g in genomes[80:]]) - mean) < deviation)
    assert 0.55 < np.mean(inside) < 0.8


def test_a_text_of_another_level_does_not_disturb_the_ranking() -> None:
    genomes, landscape, table = neighbourhood(2, 1.0)
    told, asked = genomes[:120], genomes[120:]
    there = [Scored(s.genome, 3 * s.loss, OTHER) for s in scored(told[::2], landscape)]
    found = Surrogate([*there, *scored(told[1::2], landscape)], table)
    assert correlation(found, asked, landscape) > 0.9
    difference = found(asked, OTHER).mean - found(asked, SEARCH).mean
    np.testing.assert_allclose(difference, np.log(3), atol=0.01)
    unknown = found(asked, Fidelity("search", 512, 8))
    np.testing.assert_allclose(np.ptp(unknown.mean - found(asked, SEARCH).mean), 0, atol=1e-9)


def test_each_text_may_have_its_own_opinion_of_a_choice() -> None:
    genomes, landscape, table = neighbourhood(2, 0.0)
    rng = np.random.default_rng(0)
    own = SensitivityTable("kl", tuple(loss * np.exp(0.5 * rng.normal()) for loss in table.loss))
    told, asked = genomes[:120], genomes[120:]
    there = [Scored(genome, own.predict(genome), OTHER) for genome in told[::2]]
    found = Surrogate([*there, *scored(told[1::2], landscape)], table)
    here, elsewhere = found(asked, SEARCH).mean, found(asked, OTHER).mean
    for truth, mine, others in ((landscape.loss, here, elsewhere), (own.predict, elsewhere, here)):
        losses = [truth(genome) for genome in asked]
        assert spearmanr(losses, mine).statistic > max(0.95, spearmanr(losses, others).statistic)


def test_genomes_that_read_less_text_stay_less_certain() -> None:
    genomes, landscape, table = neighbourhood(0, 1.0, 120)
    rng = np.random.default_rng(0)
    told = [s._replace(loss=s.loss * np.exp(0.01 * rng.normal())) for s in scored(genomes, landscape)]
    few = [s._replace(fidelity=Fidelity("search", SEARCH.tokens // 16)) for s in told[::2]]
    found = Surrogate([*few, *told[1::2]], table)
    assert found(genomes[::2], SEARCH).deviation.mean() > 1.1 * found(genomes[1::2], SEARCH).deviation.mean()


def test_only_finite_losses_that_read_text_are_usable() -> None:
    genomes, landscape, _ = neighbourhood(0, 0.0, 3)
    fine = scored(genomes, landscape)
    bad = [fine[0]._replace(loss=np.inf), fine[1]._replace(fidelity=Fidelity("search", 0))]
    assert usable([*bad, *fine]) == fine


@pytest.mark.parametrize("losses", [[0.0, 1e-3, 2.0, 50.0], [-80.0, -2.0, -1.5, -1e-3]])
def test_the_log_keeps_the_order_of_losses_of_either_fitness(losses: list[float]) -> None:
    assert (np.diff(log_loss(losses)) > 0).all()


@pytest.mark.parametrize("genomes", [1, 2, 5])
def test_few_or_equal_losses_are_no_obstacle(genomes: int) -> None:
    found, _, table = neighbourhood(0, 0.0, 40)
    mean, deviation = Surrogate([Scored(g, 1.0, SEARCH) for g in found[:genomes]], table)(found, SEARCH)
    assert np.isfinite(mean).all()
    assert np.isfinite(deviation).all()


def test_the_rounding_of_losses_does_not_change_what_was_fitted() -> None:
    genomes, landscape, table = neighbourhood(1, 1.0)
    told = scored(genomes[:120], landscape)
    rounded = [s._replace(loss=s.loss * (1 + 1e-13 * (-1) ** i)) for i, s in enumerate(told)]
    first, second = (Surrogate(losses, table)(genomes[120:], SEARCH) for losses in (told, rounded))
    np.testing.assert_allclose(first.mean, second.mean, atol=1e-8)


def test_the_parts_are_the_sums_they_stand_for() -> None:
    genomes, landscape, table = neighbourhood(0, 0.0, 12)
    found = Surrogate(scored(genomes[:7], landscape), table)
    a, b = found._features_of(genomes[7:], [SEARCH] * 5), found._features
    for i, j in itertools.product(range(len(a.shares)), range(7)):
        same = a.genomes[i] == b.genomes[j]
        power = (a.shares[i] * b.shares[j]) ** surrogate.CHOICE_POWER
        roots = np.sqrt(a.shares[i] * b.shares[j])
        pairs = sum(roots[k] * roots[m] for k, m in itertools.combinations(range(len(roots)), 2))
        expected = (power[same].sum(), power[same].sum(), np.exp(-np.count_nonzero(~same) / surrogate.LENGTH), pairs)
        for part, value in zip(surrogate._parts(a, b), expected, strict=True):
            assert part[i, j] == pytest.approx(value, rel=1e-6)
    for own, part in zip(surrogate._own(a), surrogate._parts(a, a), strict=True):
        np.testing.assert_allclose(own, np.diag(part), rtol=1e-6)


def test_leaving_one_out_by_formula_is_leaving_it_out() -> None:
    rng = np.random.default_rng(0)
    root, y = rng.normal(size=(8, 8)), rng.normal(size=8)
    kernel, noise = root @ root.T, np.ones(8)
    variances = (0.3, 0.0, 0.0, 0.0, 0.1)
    fit = surrogate._LeaveOneOut(np.ones((8, 8)), [kernel] * 4, noise, y)
    covariance = 1 + 0.3 * kernel + 0.1 * np.eye(8)
    errors, left_out = [], []
    for i in range(8):
        rest = np.delete(np.arange(8), i)
        weights = np.linalg.solve(covariance[np.ix_(rest, rest)], covariance[rest, i])
        errors.append(y[i] - weights @ y[rest])
        left_out.append(covariance[i, i] - weights @ covariance[rest, i])
    scale = np.mean(np.square(errors) / left_out)
    assert fit._misfit(variances) == pytest.approx(4 * (np.log(left_out).mean() + np.log(scale)), abs=1e-3)
