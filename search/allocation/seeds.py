"""Seed genomes, which a search starts from and is never allowed to end worse than."""

from collections.abc import Sequence

from quantizers.formats.table import FORMATS, LEVEL_FORMATS
from search.allocation.exact import exact, greedy, lagrangian
from search.allocation.repair import Repair
from search.allocation.sensitivity import SensitivityTable
from search.budget import Budget
from search.types import Gene, Genome, SearchSpace


def pure_uniform(space: SearchSpace, budget: Budget) -> dict[str, Genome]:
    """Return the genomes with every gene at one level, by level ("W3"), smallest first, that are within the budget.

    A gene without the level takes its next larger format, as llama.cpp does for rows that do not divide into blocks, or
    else its largest. These genomes may leave much of the budget unused.
    """
    genomes = _all_uniform(space)
    return {level: genome for level, genome in genomes.items() if space.file_bytes(genome) <= budget.file_bytes}


def nearest_uniform(space: SearchSpace, budget: Budget) -> Genome:
    """Return the genome with every gene at one level, as in pure_uniform, whose file is nearest to the budget.

    The file may be over the budget.
    """
    return min(_all_uniform(space).values(), key=lambda genome: abs(space.file_bytes(genome) - budget.file_bytes))


def uniform(space: SearchSpace, budget: Budget, table: SensitivityTable | None = None) -> Genome:
    """Return the largest uniform level that fits, filled to the budget.

    It is filled by gain per byte in ``table``, or in gene order without one.
    """
    levels = pure_uniform(space, budget)
    base = list(levels.values())[-1] if levels else space.smallest()
    return Repair(space, budget, table).fill(base)


def seed_genomes(space: SearchSpace, budget: Budget, tables: Sequence[SensitivityTable] = ()) -> dict[str, Genome]:
    """Return named genomes for the first generation: exact, Lagrangian and greedy by each table, then uniform.

    Different names may hold the same genome. The exact one of the first table is the strongest known start.
    """
    seeds = {f"exact {table.measure}": exact(space, budget, table).genome for table in tables}
    seeds |= {f"lagrangian {table.measure}": lagrangian(space, budget, table) for table in tables}
    seeds |= {f"greedy {table.measure}": greedy(space, budget, table) for table in tables}
    return seeds | {"uniform": uniform(space, budget, tables[0] if tables else None)}


def reference_genomes(space: SearchSpace, budget: Budget, seeds: dict[str, Genome]) -> dict[str, Genome]:
    """Return ``seeds`` and the pure uniform genomes that fit, with which choose_winner compares the winner."""
    return seeds | {f"uniform {level}": genome for level, genome in pure_uniform(space, budget).items()}


def _all_uniform(space: SearchSpace) -> dict[str, Genome]:
    """Return the genome of every level in the space, by level, smallest first."""
    found = {quant_format.level for gene in space.genes for quant_format in gene.formats}
    levels = sorted(found, key=lambda level: (_bits(level), level))
    return {level: tuple(_choice_at(gene, level) for gene in space.genes) for level in levels}


def _bits(level: str) -> float:
    """Return the bits per weight of the level's own type."""
    return FORMATS[LEVEL_FORMATS[level]].bits_per_weight


def _choice_at(gene: Gene, level: str) -> int:
    """Return the choice of ``gene`` at ``level``, else the first with at least its bits, else the largest."""
    if level in (levels := [quant_format.level for quant_format in gene.formats]):
        return levels.index(level)
    enough = (c for c, quant_format in enumerate(gene.formats) if quant_format.bits_per_weight >= _bits(level))
    return next(enough, len(gene.formats) - 1)
