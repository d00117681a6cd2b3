"""The dynamic program over all sizes against the exact solver, one size at a time."""

from unittest.mock import patch

import numpy as np
import pytest

from search.allocation import front
from search.allocation.exact import exact
from search.allocation.front import best_by_size
from search.allocation.sensitivity import SensitivityTable
from search.budget import Budget
from search.types import SearchSpace


def problem(genes: int, columns: int) -> tuple[SearchSpace, SensitivityTable]:
    rng = np.random.default_rng(genes)
    shapes = {f"t{i}": (int(rng.integers(1, 4)) * 64 + i, columns) for i in range(genes)}
    space = SearchSpace.per_tensor(shapes, ("W2", "W3", "W4", "W6", "W8"), 1000)
    loss = tuple(np.sort(rng.lognormal(size=len(gene.formats)))[::-1].copy() for gene in space.genes)
    return space, SensitivityTable("kl", loss)


@pytest.mark.parametrize("most_units", [front.MOST_UNITS, 4096])
def test_every_size_has_the_genome_that_the_exact_solver_finds_for_it(most_units: int) -> None:
    space, table = problem(12, 256)
    low, high = space.file_bytes(space.smallest()), space.file_bytes(space.largest())
    sizes = np.linspace(low, high, 9).astype(int).tolist()
    with patch.object(front, "MOST_UNITS", most_units):
        genomes = best_by_size(space, table, sizes)
    assert genomes[0] == space.smallest() and genomes[-1] == space.largest()
    for size, genome in zip(sizes, genomes, strict=True):
        assert space.file_bytes(genome) <= size
        best = exact(space, Budget(size), table).loss
        assert table.predict(genome) <= best * (1 + (1e-9 if most_units == front.MOST_UNITS else 0.03))


def test_a_size_below_the_smallest_file_is_refused() -> None:
    space, table = problem(3, 256)
    with pytest.raises(ValueError, match="expected sizes from"):
        best_by_size(space, table, [space.file_bytes(space.smallest()) - 1])
