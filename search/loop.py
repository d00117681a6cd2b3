"""The loop: ask, climb the ladder, tell, checkpoint; then the choice of the winner on text the search never saw.

A run killed at any point and started again makes the same evaluations and ends the same: the checkpoint holds the
strategy before or after a whole batch, so that it asks for the same genomes again, and the log holds what of them was
already evaluated.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Any

from search.archive import EvaluationLog
from search.checkpoint import Checkpoint
from search.ladder import Ladder, promoted
from search.paired import Estimate, paired_difference
from search.sensitivity import SensitivityTable
from search.types import Evaluation, Fidelity, Genome, SearchSpace, Strategy, rank

Evaluate = Callable[[Sequence[Genome], Fidelity], Iterator[Evaluation]]  # each genome once, in any order
PARETO_FIELDS = ("file_bytes", "loss", "split", "tokens", "draw", "genome")


@dataclass(frozen=True)
class Progress:
    """Where a search stands after a batch."""

    generation: int  # batches told
    genomes: int  # in the log
    expected: int  # of the whole search
    best: Evaluation  # on the last rung's present text
    diagnostics: Mapping[str, Any]  # the strategy's, on this batch
    answered: int = 0  # times that the log had a genome's evaluation already, since it was opened


@dataclass(frozen=True)
class Winner:
    """The evaluation that ships, and all that it was chosen from, by validation loss, best first.

    ``lead`` is its KL less that of ``reference``, the best of the references on validation text, if that is another
    genome; ``ties`` counts the other finalists whose KL is within one standard error of the winner's, paired.
    """

    evaluation: Evaluation
    finalists: tuple[Evaluation, ...]
    reference: str
    lead: Estimate | None
    ties: int


def run_search(
    strategy: Strategy,
    evaluate: Evaluate,
    log: EvaluationLog,
    ladder: Ladder,
    *,
    checkpoint: Checkpoint,
    on_progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """Run ``strategy`` to its end, from ``checkpoint`` where there is one; the best evaluation of the last text.

    ``on_progress`` hears of every batch before it is checkpointed: of one batch again if the run dies in between.

    Raises ValueError if ``evaluate`` leaves out a genome or answers one twice, or if no genome has a finite loss.
    """
    saved = checkpoint.load() or {"generation": 0, "strategy": None}
    generation = saved["generation"]
    if saved["strategy"] is not None:
        strategy.load_state_dict(saved["strategy"])
        strategy.forget(checkpoint.told.batches)
    while genomes := strategy.ask():
        incumbents = strategy.incumbents if ladder.turns_to_new_text(generation) else []
        found = climb(genomes, incumbents, ladder, generation, evaluate, log)
        strategy.tell([found[genome] for genome in genomes], [found[genome] for genome in incumbents])
        generation += 1
        if on_progress is not None:
            seen = log.genomes(ladder.split)
            (best,) = log.best(ladder.fidelities(generation - 1)[-1], 1)
            expected, found_out = strategy.expected_evaluations, strategy.diagnostics
            on_progress(Progress(generation, seen, expected, best, found_out, log.answered))
        checkpoint.save({"generation": generation, "strategy": strategy.state_dict(checkpoint.told.batches)})
        strategy.forget(checkpoint.told.batches)
    return _best(log.best(ladder.fidelities(max(0, generation - 1))[-1], 1))


def climb(
    genomes: Sequence[Genome],
    incumbents: Sequence[Genome],
    ladder: Ladder,
    generation: int,
    evaluate: Evaluate,
    log: EvaluationLog,
) -> dict[Genome, Evaluation]:
    """Every genome with its evaluation on the highest rung it reached; incumbents go to the last at once."""
    *lower, last = ladder.fidelities(generation)
    found: list[Evaluation] = []
    standing = list(genomes)
    for fidelity in lower:
        rung = evaluate_missing(standing, fidelity, evaluate, log)
        standing = promoted(rung, ladder.promotion)
        found += rung
    found += evaluate_missing([*incumbents, *standing], last, evaluate, log)
    return {evaluation.genome: evaluation for evaluation in found}


def with_table_rung(evaluate: Evaluate, space: SearchSpace, table: SensitivityTable) -> Evaluate:
    """``evaluate``, with fidelities of 0 tokens answered from ``table``: only the loss is known then."""

    def answer(genomes: Sequence[Genome], fidelity: Fidelity) -> Iterator[Evaluation]:
        if fidelity.tokens:
            return evaluate(genomes, fidelity)
        nan = math.nan
        return (
            Evaluation(g, table.predict(g), nan, nan, nan, nan, space.file_bytes(g), fidelity.split, 0) for g in genomes
        )

    return answer


def evaluate_missing(
    genomes: Sequence[Genome], fidelity: Fidelity, evaluate: Evaluate, log: EvaluationLog
) -> list[Evaluation]:
    """Evaluations of ``genomes`` in their order, from ``log`` where it has them; the others are appended as they come.

    Raises ValueError if ``evaluate`` leaves out a genome or answers one twice.
    """
    known = {genome: log.get(genome, fidelity) for genome in genomes}
    missing = [genome for genome, evaluation in known.items() if evaluation is None]
    log.answered += len(genomes) - len(missing)
    waiting = set(missing)
    for answer in evaluate(missing, fidelity) if missing else iter(()):
        if answer.genome not in waiting or answer.fidelity != fidelity:
            raise ValueError(f"evaluate must answer each genome once at {fidelity}, found {answer}")
        waiting.remove(answer.genome)
        log.append(answer)
        known[answer.genome] = answer
    if waiting:
        raise ValueError(f"evaluate must answer each genome once at {fidelity}, found {len(waiting)} without an answer")
    log.sync()
    found = (known[genome] for genome in genomes)
    return [evaluation for evaluation in found if evaluation is not None]


def choose_winner(
    log: EvaluationLog,
    evaluate: Evaluate,
    *,
    ladder: Ladder,
    validation: Fidelity,
    references: Mapping[str, Genome],
    keep: int = 8,
) -> Winner:
    """The lowest validation loss among the search's best (``search_best``) and all ``references``, at least one.

    With the seeds as references (search.seeds.reference_genomes) the winner is never worse on validation text than
    uniform, greedy and exact genomes. Where finalists tie within the noise of that text the lowest mean is still the
    best guess; ``ties`` tells how many do. Equal losses go to the smaller file. Raises ValueError if none is finite.
    """
    genomes = list(dict.fromkeys([*search_best(log, ladder, keep), *references.values()]))
    finalists = sorted(evaluate_missing(genomes, validation, evaluate, log), key=rank)
    winner = _best(finalists)
    reference = next(e for e in finalists if e.genome in references.values())
    name = next(name for name, genome in references.items() if genome == reference.genome)
    lead = None if reference is winner else paired_difference(winner, reference)
    return Winner(winner, tuple(finalists), name, lead, sum(_ties(e, winner) for e in finalists[1:]))


def search_best(log: EvaluationLog, ladder: Ladder, keep: int) -> list[Genome]:
    """The ``keep`` best on the last rung's present text, and the best one of each of the ``keep`` texts before it."""
    *former, present = [f for f in log.fidelities if (f.split, f.tokens) == (ladder.split, ladder.rungs[-1])]
    best = nsmallest(keep, log.at(present), key=rank) + [log.best(text, 1)[0] for text in former[-keep:]]
    return list(dict.fromkeys(evaluation.genome for evaluation in best))


def pareto_records(evaluations: Iterable[Evaluation]) -> list[dict[str, Any]]:
    """For pareto.json: the fields PARETO_FIELDS and ``front`` of every evaluation on text, smallest file first.

    ``front`` says that no evaluation of the same fidelity has a lower loss in as few bytes. Losses that are not finite
    are left out.
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


def _best(evaluations: Sequence[Evaluation]) -> Evaluation:
    best = min(evaluations, key=rank, default=None)
    if best is None or not math.isfinite(best.loss):
        raise ValueError("none of the evaluated genomes has a finite loss: nothing can be chosen")
    return best


def _ties(evaluation: Evaluation, winner: Evaluation) -> bool:
    """Whether validation text leaves open which of the two has the lower KL."""
    if not math.isfinite(evaluation.loss):
        return False
    difference = paired_difference(evaluation, winner)
    return abs(difference.mean) <= difference.margin()
