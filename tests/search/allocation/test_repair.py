"""Repair against brute force: never over the budget, full whenever any genome is, and little changed."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.allocation import subset_sum
from search.allocation.repair import Repair
from search.allocation.sensitivity import SensitivityTable
from search.allocation.subset_sum import ReachableSizes
from search.budget import Budget
from search.types import Genome, SearchSpace
from tests.search.synthetic import all_genomes, middle_budget, odd_space, random_genome, random_table, transformer_space


@st.composite
def repairs(draw: st.DrawFn) -> tuple[SearchSpace, Budget, SensitivityTable | None, Genome, int]:
    """A space of up to 5 genes and 3 levels, a budget it can meet, a genome and a seed."""
    rows = draw(st.lists(st.integers(1, 400), min_size=1, max_size=5))
    space = odd_space(rows, ("W2", "W4", "W8"), fixed_bytes=draw(st.integers(0, 5000)))
    budget = Budget(draw(st.integers(space.file_bytes(space.smallest()), space.file_bytes(space.largest()))))
    table = random_table(space, draw(st.integers(0, 9))) if draw(st.booleans()) else None
    genome = tuple(draw(st.integers(0, len(gene.formats) - 1)) for gene in space.genes)
    return space, budget, table, genome, draw(st.integers(0, 2**32))


@given(repairs())
@settings(max_examples=200, deadline=None)
def test_repair_keeps_the_budget_and_fills_it_whenever_any_genome_does(
    case: tuple[SearchSpace, Budget, SensitivityTable | None, Genome, int],
) -> None:
    space, budget, table, genome, seed = case
    repair = Repair(space, budget, table)
    repaired = repair(genome, random.Random(seed))
    assert space.file_bytes(repaired) <= budget.file_bytes
    possible = any(
        0 <= budget.file_bytes - space.file_bytes(g) <= 0.005 * budget.file_bytes for g in all_genomes(space)
    )
    assert repair.is_tight(repaired) == possible


@given(repairs())
@settings(max_examples=100, deadline=None)
def test_a_tight_genome_is_left_alone(
    case: tuple[SearchSpace, Budget, SensitivityTable | None, Genome, int],
) -> None:
    space, budget, table, genome, seed = case
    repair, rng = Repair(space, budget, table), random.Random(seed)
    repaired = repair(genome, rng)
    if repair.is_tight(repaired):
        assert repair(repaired, rng) == repaired


@given(repairs())
@settings(max_examples=100, deadline=None)
def test_after_fill_no_single_upgrade_fits(
    case: tuple[SearchSpace, Budget, SensitivityTable | None, Genome, int],
) -> None:
    space, budget, table, genome, seed = case
    repair, rng = Repair(space, budget, table), random.Random(seed)
    full = repair.fill(repair(genome, rng), rng)
    added, _ = repair.moves.deltas(full)
    assert 0 <= repair.slack(full) < min((int(a) for a in added if a > 0), default=repair.slack(full) + 1)


@pytest.mark.parametrize("layers", [5, 28, 85])
@pytest.mark.parametrize("guided", [False, True])
def test_forty_to_six_hundred_genes_take_milliseconds(layers: int, guided: bool) -> None:
    space = transformer_space(layers)
    repair, rng = Repair(space, middle_budget(space), random_table(space, 0) if guided else None), random.Random(0)
    genomes = [random_genome(space, rng) for _ in range(5)]
    started = time.process_time()
    repaired = [repair(genome, rng) for genome in genomes]
    assert (time.process_time() - started) / len(genomes) < 0.2  # 1 to 25 ms; the rest is for a busy machine
    assert all(map(repair.is_tight, repaired))


def test_a_genome_a_little_over_the_budget_changes_in_few_genes() -> None:
    space = transformer_space(28)
    repair, rng = Repair(space, middle_budget(space), random_table(space, 0)), random.Random(0)
    full = repair.fill(repair(random_genome(space, rng), rng))
    for gene, choice in enumerate(full):
        if choice + 1 < len(space.genes[gene].formats):
            repaired = repair((*full[:gene], choice + 1, *full[gene + 1 :]), rng)
            assert sum(a != b for a, b in zip(full, repaired, strict=True)) <= 10


def test_repairs_of_one_genome_differ_by_the_random_state_and_only_by_it() -> None:
    space = transformer_space(5)
    repair = Repair(space, middle_budget(space), random_table(space, 0))
    repaired = [repair(space.largest(), random.Random(seed)) for seed in range(8)]
    assert len(set(repaired)) > 4
    assert repaired == [repair(space.largest(), random.Random(seed)) for seed in range(8)]


def test_repair_gives_up_what_the_table_says_costs_least() -> None:
    space = transformer_space(5)
    budget, table = middle_budget(space), random_table(space, 0)
    guided, blind = Repair(space, budget, table), Repair(space, budget)
    rngs = random.Random(0), random.Random(0)
    losses = [
        [table.predict(r(space.largest(), rng)) for _ in range(5)] for r, rng in zip((guided, blind), rngs, strict=True)
    ]
    assert max(losses[0]) < min(losses[1])


def test_a_budget_below_the_smallest_file_is_refused() -> None:
    space = transformer_space(1)
    with pytest.raises(ValueError, match="below the smallest file"):
        Repair(space, Budget(space.file_bytes(space.smallest()) - 1))


def test_a_table_of_another_space_is_refused() -> None:
    space = transformer_space(2)
    with pytest.raises(ValueError, match="does not fit the space"):
        Repair(space, middle_budget(space), random_table(transformer_space(1), 0))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_the_subset_sum_finds_the_largest_size_that_fits(rows: list[int], share: float) -> None:
    space = odd_space(rows, ("W2", "W3", "W6"))
    capacity = middle_budget(space, share).file_bytes
    largest = max(size for genome in all_genomes(space) if (size := space.file_bytes(genome)) <= capacity)
    found = ReachableSizes(space.sizes(), capacity).find(0, space.smallest(), random.Random(0))
    assert found is not None
    assert space.file_bytes(found) == largest


def test_the_subset_sum_in_coarse_units_still_keeps_the_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subset_sum, "MAX_BITS", 1000)
    space = transformer_space(5)
    capacity = middle_budget(space).file_bytes - space.fixed_bytes
    found = ReachableSizes(space.sizes(), capacity).find(int(0.95 * capacity), space.smallest(), random.Random(0))
    assert found is not None
    assert 0.95 * capacity <= space.file_bytes(found) - space.fixed_bytes <= capacity
