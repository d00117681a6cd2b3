"""The best genomes of an additive table at many sizes at once, by dynamic programming.

This is the multiple-choice knapsack of search.allocation.exact, solved for every capacity in one pass over the genes
(Kellerer, Pferschy and Pisinger, Knapsack Problems, 11.5). Bytes are counted in units: where sizes have a common
divisor that is coarse enough the result is exact, else every size is rounded up, by less than MOST_UNITS-th of the
range per gene, and what that leaves is filled.
"""

from collections.abc import Sequence
from math import gcd

import numpy as np

from search.allocation.repair import Repair
from search.allocation.sensitivity import SensitivityTable
from search.budget import Budget
from search.types import Genome, SearchSpace

MOST_UNITS = 1 << 16  # 0.2 s for 200 genes of six choices, and a byte of memory for each gene


def best_by_size(space: SearchSpace, table: SensitivityTable, sizes: Sequence[int]) -> list[Genome]:
    """Return, for each file size in bytes, the genome of least loss in ``table`` that is no larger.

    Raises ValueError if the smallest genome is larger than one of ``sizes``, or the table does not fit the space.
    """
    table.check(space)
    least = [int(gene.min()) for gene in space.sizes()]
    steps = [gene - low for gene, low in zip(space.sizes(), least, strict=True)]
    smallest = space.fixed_bytes + sum(least)
    span = sum(int(step.max()) for step in steps)
    unit = max(gcd(*(int(value) for step in steps for value in step)) or 1, -(-span // MOST_UNITS))
    capacities = [min(size - smallest, span) // unit for size in sizes]
    if min(capacities, default=0) < 0:
        raise ValueError(f"expected sizes from {smallest:,} bytes on, found {min(sizes):,}")
    units = [-(-step // unit) for step in steps]
    choices = _choices(units, table.loss, 1 + max(capacities, default=0))
    found = []
    for size, capacity in zip(sizes, capacities, strict=True):
        genome = _traced(choices, units, capacity)
        found.append(Repair(space, Budget(size), table).fill(genome))
    return found


def _choices(units: Sequence[np.ndarray], losses: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Return, for each gene, its best choice at each capacity, uint8 (count,), with the genes before it at theirs."""
    total, found = np.zeros(count), []
    for steps, loss in zip(units, losses, strict=True):
        best, chosen = np.full(count, np.inf), np.zeros(count, np.uint8)
        for choice in np.argsort(steps, kind="stable"):  # of equal losses the smallest
            step = int(steps[choice])
            if step >= count:
                break
            reached = total[: count - step] + loss[choice]
            better = reached < best[step:]
            best[step:][better] = reached[better]
            chosen[step:][better] = choice
        total = best
        found.append(chosen)
    return found


def _traced(choices: Sequence[np.ndarray], units: Sequence[np.ndarray], capacity: int) -> Genome:
    """Return the genome that ``choices`` lead to from ``capacity``, followed from the last gene to the first."""
    genome = []
    for chosen, steps in zip(reversed(choices), reversed(units), strict=True):
        choice = int(chosen[capacity])
        genome.append(choice)
        capacity -= int(steps[choice])
    return tuple(reversed(genome))
