"""The loop: ask, look up, evaluate, tell, checkpoint; then the choice of the winner on text the search never saw.

A run killed at any point and started again makes the same evaluations and ends the same: the checkpoint holds the
strategy before or after a whole batch, so that it asks for the same genomes again, and the log holds what of them was
already evaluated.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from search.archive import EvaluationLog
from search.checkpoint import Checkpoint
from search.types import Evaluation, Fidelity, Genome, Strategy

Evaluate = Callable[[Sequence[Genome], Fidelity], Iterator[Evaluation]]  # each genome once, in any order


@dataclass(frozen=True)
class Progress:
    """Where a search stands after a batch."""

    generation: int  # batches told
    evaluations: int  # in the log at this fidelity
    expected: int  # of the whole search
    best: Evaluation


@dataclass(frozen=True)
class Winner:
    """The evaluation that ships, and all that it was chosen from, by validation loss, best first."""

    evaluation: Evaluation
    finalists: tuple[Evaluation, ...]


def run_search(
    strategy: Strategy,
    evaluate: Evaluate,
    log: EvaluationLog,
    fidelity: Fidelity,
    *,
    checkpoint: Checkpoint,
    on_progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """Run ``strategy`` to its end, from ``checkpoint`` where there is one; the best evaluation.

    Raises ValueError if ``evaluate`` leaves out a genome or answers one twice, or if no genome has a finite loss.
    """
    saved = checkpoint.load() or {"generation": 0, "strategy": None}
    generation = saved["generation"]
    if saved["strategy"] is not None:
        strategy.load_state_dict(saved["strategy"])
    while genomes := strategy.ask():
        strategy.tell(evaluate_missing(genomes, fidelity, evaluate, log))
        generation += 1
        checkpoint.save({"generation": generation, "strategy": strategy.state_dict()})
        if on_progress is not None:
            done = log.at(fidelity)
            on_progress(Progress(generation, len(done), strategy.expected_evaluations, min(done, key=rank)))
    return _best(log.at(fidelity))


def evaluate_missing(
    genomes: Sequence[Genome], fidelity: Fidelity, evaluate: Evaluate, log: EvaluationLog
) -> list[Evaluation]:
    """Evaluations of ``genomes`` in their order, from ``log`` where it has them; the others are appended as they come.

    Raises ValueError if ``evaluate`` leaves out a genome or answers one twice.
    """
    missing = [genome for genome in dict.fromkeys(genomes) if log.get(genome, fidelity) is None]
    waiting = set(missing)
    for answer in evaluate(missing, fidelity) if missing else iter(()):
        if answer.genome not in waiting or answer.fidelity != fidelity:
            raise ValueError(f"evaluate must answer each genome once at {fidelity}, found {answer}")
        waiting.remove(answer.genome)
        log.append(answer)
    if waiting:
        raise ValueError(f"evaluate must answer each genome once at {fidelity}, found {len(waiting)} without an answer")
    log.sync()
    found = (log.get(genome, fidelity) for genome in genomes)
    return [evaluation for evaluation in found if evaluation is not None]


def choose_winner(
    log: EvaluationLog,
    evaluate: Evaluate,
    *,
    search: Fidelity,
    validation: Fidelity,
    references: Iterable[Genome],
    keep: int = 8,
) -> Winner:
    """The lowest validation loss among the ``keep`` best genomes of the search and all ``references``.

    With the seeds as references (search.seeds.reference_genomes) the winner is never worse on validation text than
    uniform, greedy and exact genomes. Ties go to the smaller file. Raises ValueError if no loss is finite.
    """
    best = sorted(log.at(search), key=rank)[:keep]
    genomes = list(dict.fromkeys([*(evaluation.genome for evaluation in best), *references]))
    finalists = sorted(evaluate_missing(genomes, validation, evaluate, log), key=rank)
    return Winner(_best(finalists), tuple(finalists))


def pareto_records(evaluations: Iterable[Evaluation]) -> list[dict[str, Any]]:
    """For pareto.json: file_bytes, loss, split, tokens, genome and ``front`` of every evaluation, smallest file first.

    ``front`` says that no evaluation of the same fidelity has a lower loss in as few bytes. Losses that are not finite
    are left out.
    """
    finite = [evaluation for evaluation in evaluations if math.isfinite(evaluation.loss)]
    least: dict[Fidelity, float] = {}
    records = []
    for evaluation in sorted(finite, key=lambda e: (e.file_bytes, rank(e))):
        front = evaluation.loss < least.get(evaluation.fidelity, math.inf)
        if front:
            least[evaluation.fidelity] = evaluation.loss
        record = evaluation.to_json()
        records.append({k: record[k] for k in ("file_bytes", "loss", "split", "tokens", "genome")} | {"front": front})
    return records


def rank(evaluation: Evaluation) -> tuple[float, int, Genome]:
    """Order of evaluations of one fidelity, best first: loss (not finite: last), then bytes, then genome."""
    loss = evaluation.loss if math.isfinite(evaluation.loss) else math.inf
    return loss, evaluation.file_bytes, evaluation.genome


def _best(evaluations: Sequence[Evaluation]) -> Evaluation:
    best = min(evaluations, key=rank, default=None)
    if best is None or not math.isfinite(best.loss):
        raise ValueError(f"none of {len(evaluations)} evaluated genomes has a finite loss: nothing can be chosen")
    return best
