"""Solvers against brute force."""

import ctypes
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.allocation.exact import exact, greedy, lagrangian
from search.allocation.seeds import nearest_uniform, pure_uniform, reference_genomes, seed_genomes, uniform
from search.allocation.sensitivity import SensitivityTable
from search.budget import Budget
from search.types import SearchSpace
from tests.search.synthetic import all_genomes, middle_budget, odd_space, random_table, transformer_space


def brute_force(space: SearchSpace, budget: Budget, table: SensitivityTable) -> float:
    fitting = (genome for genome in all_genomes(space) if space.file_bytes(genome) <= budget.file_bytes)
    return min(map(table.predict, fitting))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_exact_is_the_brute_force_optimum(rows: list[int], share: float, seed: int) -> None:
    space = odd_space(rows, ("W2", "W3", "W4", "W8"), fixed_bytes=1000)
    budget, table = middle_budget(space, share), random_table(space, seed)
    solution = exact(space, budget, table)
    assert space.file_bytes(solution.genome) <= budget.file_bytes
    assert solution.loss == table.predict(solution.genome)
    assert solution.loss == pytest.approx(brute_force(space, budget, table), rel=1e-6)
    assert solution.gap == 0.0


@given(st.lists(st.integers(1, 300), min_size=2, max_size=5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_lagrangian_is_optimal_at_the_sizes_of_its_own_multipliers(rows: list[int], seed: int) -> None:
    space = odd_space(rows, ("W2", "W3", "W4", "W8"))
    table = random_table(space, seed)
    for genome in {lagrangian(space, middle_budget(space, share), table) for share in (0.2, 0.5, 0.8)}:
        budget = Budget(space.file_bytes(genome))
        bound = brute_force(space, budget, table)
        assert bound - 1e-15 <= table.predict(lagrangian(space, budget, table)) <= table.predict(genome) + 1e-15


def test_lagrangian_comes_within_a_thousandth_of_exact_on_a_real_shape_and_fills_the_budget() -> None:
    space = transformer_space(28)
    budget, table = middle_budget(space), random_table(space, 1)
    genome, solution = lagrangian(space, budget, table), exact(space, budget, table)
    assert solution.gap == 0.0
    assert solution.loss <= table.predict(genome) <= 1.001 * solution.loss
    assert 0.995 * budget.file_bytes <= space.file_bytes(genome) <= budget.file_bytes


def test_lagrangian_steps_over_a_choice_that_is_not_on_the_hull() -> None:
    space = odd_space([64, 64], ("W2", "W4", "W8"))
    hollow = np.array([1.0, 0.99, 0.0])  # W4 gains almost nothing: only W2 and W8 are on the hull
    table = SensitivityTable("kl", (hollow, hollow * 0.9))
    budget = Budget(space.file_bytes((2, 0)))
    assert lagrangian(space, budget, table) == (2, 0)
    assert exact(space, budget, table).genome == (2, 0)


def test_a_solver_stopped_by_its_limit_says_so_and_is_no_worse_than_lagrangian(
    caplog: pytest.LogCaptureFixture,
) -> None:
    space = transformer_space(28)
    budget, table = middle_budget(space), random_table(space, 1)
    with caplog.at_level(logging.WARNING):
        solution = exact(space, budget, table, time_limit=1e-4)
    assert table.predict(solution.genome) <= table.predict(lagrangian(space, budget, table))
    assert solution.gap > 0
    assert "gap" in caplog.text


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    space = transformer_space(2)
    for seed in (1, 2):  # HiGHS 1.12 finds a solution of them that rounding makes infeasible, and prints a line
        exact(space, middle_budget(space, 0.5), random_table(space, seed))
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == ""


def test_tiny_losses_do_not_drown_in_the_solvers_tolerances() -> None:
    space = transformer_space(2)
    budget, table = middle_budget(space), random_table(space, 1)
    tiny = SensitivityTable("kl", tuple(values * 1e-9 for values in table.loss))
    assert exact(space, budget, tiny).genome == exact(space, budget, table).genome


@pytest.mark.parametrize("solver", [greedy, lagrangian])
def test_solvers_are_never_worse_than_filled_uniform_on_their_own_table(solver) -> None:  # type: ignore[no-untyped-def]
    space = transformer_space(5)
    for seed in range(5):
        budget, table = middle_budget(space), random_table(space, seed)
        assert table.predict(solver(space, budget, table)) <= table.predict(uniform(space, budget, table))


def test_uniform_starts_from_the_largest_level_that_fits() -> None:
    space = transformer_space(3)
    for level, choice in (("W3", 1), ("W4", 2)):
        exactly = Budget(space.file_bytes((choice,) * len(space.genes)))
        assert uniform(space, exactly) == pure_uniform(space, exactly)[level] == (choice,) * len(space.genes)
        roomier = Budget(int(1.01 * exactly.file_bytes))
        filled = uniform(space, roomier)
        assert min(filled) == choice
        assert 0.995 * roomier.file_bytes <= space.file_bytes(filled) <= roomier.file_bytes


def test_the_nearest_uniform_genome_may_be_under_the_budget_or_over_it() -> None:
    space = transformer_space(3)
    three, four = (space.file_bytes((choice,) * len(space.genes)) for choice in (1, 2))
    for share, choice in ((0.4, 1), (0.6, 2)):
        budget = Budget(int(three + share * (four - three)))
        assert nearest_uniform(space, budget) == (choice,) * len(space.genes)


def test_a_uniform_level_takes_the_row_fallback_where_a_tensor_lacks_it() -> None:
    space = SearchSpace.per_tensor({"a": (64, 256), "b": (64, 96)}, ("W2", "W4", "W8"), fixed_bytes=0)
    assert [f.name for f in space.genes[1].formats] == ["Q4_0", "Q5_0", "Q8_0"]
    largest = Budget(space.file_bytes(space.largest()))
    assert pure_uniform(space, largest) == {"W2": (0, 0), "W4": (1, 0), "W5": (2, 1), "W8": (2, 2)}


def test_each_codebook_type_is_a_uniform_level_of_its_own() -> None:
    space = SearchSpace.per_tensor({"a": (4, 256), "b": (4, 512)}, ("W2", "IQ2_XXS", "IQ2_S", "W3", "IQ3_S"), 0)
    names = [f.name for f in space.genes[0].formats]
    genomes = pure_uniform(space, Budget(space.file_bytes(space.largest())))
    assert list(genomes) == ["IQ2_XXS", "IQ2_S", "W2", "IQ3_S", "W3"]
    assert {level: names[genome[0]] for level, genome in genomes.items()} == {
        "IQ2_XXS": "IQ2_XXS", "IQ2_S": "IQ2_S", "W2": "Q2_K", "IQ3_S": "IQ3_S", "W3": "Q3_K"
    }  # fmt: skip
    assert all(len(set(genome)) == 1 for genome in genomes.values())


def test_below_every_uniform_level_the_uniform_seed_is_the_smallest_genome() -> None:
    space = SearchSpace.per_tensor({"a": (64, 256), "b": (64, 512)}, ("W2", "W4"), fixed_bytes=0)
    budget = Budget(space.file_bytes((0, 0)))
    assert uniform(space, budget) == (0, 0)


def test_seeds_and_references_fit_the_budget_and_are_named() -> None:
    space = transformer_space(3)
    budget, tables = middle_budget(space), [random_table(space, 0), random_table(space, 1, "reconstruction")]
    seeds = seed_genomes(space, budget, tables)
    assert list(seeds)[:2] == ["exact kl", "exact reconstruction"]
    references = reference_genomes(space, budget, seeds)
    assert set(seeds) | {"uniform W2", "uniform W3"} <= set(references)
    assert all(space.file_bytes(genome) <= budget.file_bytes for genome in references.values())
