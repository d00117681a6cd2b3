"""The search loop: ask the strategy, evaluate up the ladder, tell the strategy, write a checkpoint.

A run that is killed at any point and started again makes the same evaluations and ends the same. The checkpoint holds
the strategy before or after a whole batch, so that it asks for the same genomes again, and the log holds those of their
evaluations that were already made.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitgenome.common.errors import UserError, expecting
from search.allocation.sensitivity import SensitivityTable
from search.loop.archive import EvaluationLog
from search.loop.checkpoint import REMEDY, Checkpoint
from search.loop.ladder import Ladder, promoted
from search.types import Evaluation, Fidelity, Genome, SearchSpace, Strategy, rank

Evaluate = Callable[[Sequence[Genome], Fidelity], Iterator[Evaluation]]  # each genome once, in any order


@dataclass(frozen=True)
class Progress:
    """Says where a search stands after a batch."""

    generation: int  # batches told
    genomes: int  # in the log
    expected: int  # of the whole search
    best: Evaluation  # on the last rung's present text
    diagnostics: Mapping[str, Any]  # the strategy's, on this batch
    answered: int = 0  # times that the log had a genome's evaluation already, since it was opened


def run_search(
    strategy: Strategy,
    evaluate: Evaluate,
    log: EvaluationLog,
    ladder: Ladder,
    *,
    checkpoint: Checkpoint,
    on_progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """Run ``strategy`` to its end and return the best evaluation of the last text.

    It continues from ``checkpoint`` if that has a state, and takes from ``log`` the evaluations that are already there.
    ``on_progress`` is called after every batch, before it is checkpointed, so again for one batch if the run dies in
    between.

    Raises ValueError if ``evaluate`` leaves out a genome or answers one twice, or if no genome has a finite loss.
    """
    saved = checkpoint.load() or {"generation": 0, "strategy": None}
    generation = saved.get("generation", 0)
    if saved.get("strategy") is not None:
        with expecting("the state of this run's strategy", checkpoint.path, REMEDY):
            strategy.load_state_dict(saved["strategy"])
        strategy.forget(checkpoint.told.batches)
        if not log.best(ladder.fidelities(max(0, generation - 1))[-1], 1):
            raise UserError(
                f"expected evaluations of {generation} generations in {log.path}, found none: restore it, or {REMEDY}"
            )
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
    return best_of(log.best(ladder.fidelities(max(0, generation - 1))[-1], 1))


def climb(
    genomes: Sequence[Genome],
    incumbents: Sequence[Genome],
    ladder: Ladder,
    generation: int,
    evaluate: Evaluate,
    log: EvaluationLog,
) -> dict[Genome, Evaluation]:
    """Return each genome's evaluation on the highest rung it reached; incumbents go straight to the last rung."""
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
    """Return ``evaluate`` with fidelities of 0 tokens answered from ``table``: those evaluations know only the loss."""

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
    """Return the evaluations of ``genomes`` in their order, from ``log`` if it has them.

    The others are appended to ``log`` as they come. Raises ValueError if ``evaluate`` leaves out a genome or answers
    one twice.
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


def best_of(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Return the evaluation with the lowest finite loss. Raises ValueError if none is finite."""
    best = min(evaluations, key=rank, default=None)
    if best is None or not math.isfinite(best.loss):
        raise ValueError("none of the evaluated genomes has a finite loss: nothing can be chosen")
    return best
