"""Choice of the genome that ships, on text that the search never saw, and the Pareto front of all evaluations."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import nsmallest
from typing import Any

from search.loop.archive import EvaluationLog
from search.loop.ladder import Ladder
from search.loop.paired import Estimate, paired_difference
from search.loop.search import Evaluate, best_of, evaluate_missing
from search.types import Evaluation, Fidelity, Genome, rank

PARETO_FIELDS = ("file_bytes", "loss", "split", "tokens", "draw", "genome")


@dataclass(frozen=True)
class Winner:
    """A winner is the evaluation that ships, with all finalists it was chosen from, by validation loss, best first.

    ``lead`` is its KL less that of ``reference``, the best of the references on validation text; None if that is the
    winner itself. ``ties`` counts the other finalists whose KL is within one standard error of the winner's, paired.
    """

    evaluation: Evaluation
    finalists: tuple[Evaluation, ...]
    reference: str
    lead: Estimate | None
    ties: int


def choose_winner(
    log: EvaluationLog,
    evaluate: Evaluate,
    *,
    ladder: Ladder,
    validation: Fidelity,
    references: Mapping[str, Genome],
    keep: int = 8,
) -> Winner:
    """Return the lowest validation loss among the search's best (``search_best``) and all ``references``, at least one.

    ``validation`` is the text to compare them on; ``keep`` is passed to search_best. With the seeds as references
    (search.allocation.seeds.reference_genomes) the winner is never worse on validation text than uniform, greedy and
    exact genomes. If finalists tie within the noise of that text, the lowest mean is still the best guess; ``ties``
    tells how many do. Equal losses go to the smaller file. Raises ValueError if no loss is finite.
    """
    genomes = list(dict.fromkeys([*search_best(log, ladder, keep), *references.values()]))
    finalists = sorted(evaluate_missing(genomes, validation, evaluate, log), key=rank)
    winner = best_of(finalists)
    reference = next(e for e in finalists if e.genome in references.values())
    name = next(name for name, genome in references.items() if genome == reference.genome)
    lead = None if reference is winner else paired_difference(winner, reference)
    return Winner(winner, tuple(finalists), name, lead, sum(_ties(e, winner) for e in finalists[1:]))


def search_best(log: EvaluationLog, ladder: Ladder, keep: int) -> list[Genome]:
    """Return the ``keep`` best genomes on the last rung's present text, and the best one of each earlier text.

    Only the latest ``keep`` earlier texts count.
    """
    *former, present = [f for f in log.fidelities if (f.split, f.tokens) == (ladder.split, ladder.rungs[-1])]
    best = nsmallest(keep, log.at(present), key=rank) + [log.best(text, 1)[0] for text in former[-keep:]]
    return list(dict.fromkeys(evaluation.genome for evaluation in best))


def pareto_records(evaluations: Iterable[Evaluation]) -> list[dict[str, Any]]:
    """Return the records of pareto.json: the fields PARETO_FIELDS and ``front`` for every evaluation on text.

    They are sorted by file size, smallest first. ``front`` says that no evaluation of the same fidelity has a lower
    loss in as few bytes. Losses that are not finite are left out.
    """
    finite = [evaluation for evaluation in evaluations if evaluation.tokens and math.isfinite(evaluation.loss)]
    least: dict[Fidelity, float] = {}
    records = []
    for evaluation in sorted(finite, key=lambda e: (e.file_bytes, rank(e))):
        front = evaluation.loss < least.get(evaluation.fidelity, math.inf)
        if front:
            least[evaluation.fidelity] = evaluation.loss
        record = evaluation.to_json()
        records.append({k: record[k] for k in PARETO_FIELDS} | {"front": front})
    return records


def _ties(evaluation: Evaluation, winner: Evaluation) -> bool:
    """Return whether validation text leaves open which of the two has the lower KL."""
    if not math.isfinite(evaluation.loss):
        return False
    difference = paired_difference(evaluation, winner)
    return abs(difference.mean) <= difference.margin()
