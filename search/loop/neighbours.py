"""Genomes near those that another search has evaluated, brought to a new budget."""

from collections.abc import Sequence
from heapq import nsmallest

from search.allocation.repair import Repair
from search.allocation.sensitivity import SensitivityTable
from search.strategies.surrogate import MOST, Surrogate, usable
from search.types import Evaluation, Genome, Scored, rank

LEAST_FIT = 8  # evaluations that a surrogate is fitted to; with fewer the table alone predicts


def near_evaluated(
    evaluations: Sequence[Evaluation], repair: Repair, table: SensitivityTable, count: int
) -> list[Genome]:
    """Return the ``count`` most promising feasible genomes that ``evaluations`` become by repair.

    Each of the best evaluated genomes is brought to the budget by as few steps as that takes. They are ranked by the
    surrogate of those evaluations, which knows where ``table`` and text differ, or by the table where there are few.
    All ``evaluations`` are of the space of ``repair``.
    """
    best = nsmallest(MOST, evaluations, key=rank)
    told = usable([Scored.of(evaluation) for evaluation in reversed(best)])
    if not told:
        return []
    genomes = list(dict.fromkeys(repair.fit(scored.genome) for scored in reversed(told)))
    if len(told) < LEAST_FIT:
        losses = [table.predict(genome) for genome in genomes]
    else:
        losses = Surrogate(told, table)(genomes, told[-1].fidelity).mean.tolist()
    return [genome for _, genome in nsmallest(count, zip(losses, genomes, strict=True))]
