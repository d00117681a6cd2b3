"""Runs the search, and chooses the winner on text that the search never saw."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

from bitgenome.common import layout
from bitgenome.common.errors import StorageError
from bitgenome.common.files import atomic_write_bytes, atomic_write_json
from bitgenome.observe.logs import GENERATION
from bitgenome.observe.monitoring import Monitor
from bitgenome.observe.progress import Track
from bitgenome.plan.memory import KEPT_GENOMES, MOST_TOGETHER
from bitgenome.plan.plan import Plan
from bitgenome.plan.seeds import StartingGenomes, starting_genomes
from bitgenome.run.prepare import Artefacts
from bitgenome.storage.run_directory import RunDirectory
from evaluators.engine.evaluator import EvaluateGenomes, EvaluatorSetup
from search.allocation.seeds import reference_genomes, seed_genomes
from search.allocation.sensitivity import SensitivityTable
from search.loop.archive import EvaluationLog
from search.loop.checkpoint import Checkpoint
from search.loop.search import Evaluate, Progress, run_search, with_table_rung
from search.loop.settings import SearchSettings
from search.loop.winner import Winner, choose_winner, pareto_records
from search.strategies.factory import make_strategy
from search.strategies.settings import OptunaSettings, RandomSettings, SolverSettings
from search.types import Evaluation, Fidelity, Genome
from workers.pool.base import Pool

log = logging.getLogger(__name__)

FIRST_PARTS = 0.7  # of the remaining genomes go out in one part per worker, then of the rest, and so on


@dataclass(frozen=True)
class SearchResult:
    """Holds the winner and the named genomes that it was compared with."""

    winner: Winner
    seeds: dict[str, Genome]
    strategy: str


def divided(genomes: Sequence[Genome], workers: int) -> list[tuple[Genome, ...]]:
    """Divide ``genomes`` into parts of neighbours: large ones first, then ever smaller ones down to a single genome.

    Large parts share the most work; small ones let all workers end together ("factoring": Hummel, Schonberg and Flynn,
    CACM 35(8), 1992).
    """
    parts: list[tuple[Genome, ...]] = []
    rest = tuple(genomes)
    while rest:
        share = len(rest) / workers
        size = min(MOST_TOGETHER, max(1, round(FIRST_PARTS * share) if workers > 1 else ceil(share)))
        for _ in range(min(workers, ceil(len(rest) / size))):
            parts.append(rest[:size])
            rest = rest[size:]
    return parts


@dataclass(frozen=True)
class SyncedCheckpoint(Checkpoint):
    """A checkpoint that is sent to remote storage, with all that belongs to it, when it is saved."""

    run: RunDirectory

    def save(self, state: Mapping[str, Any]) -> None:
        """Write ``state`` and send it. Raises LeaseLostError if another driver has taken over."""
        self.run.check()
        super().save(state)
        try:
            self.run.sync()
        except StorageError as error:  # at the end of the stage sending must succeed
            log.warning("%s; the next generation tries again", error)


def pool_evaluate(
    setup: EvaluatorSetup, pool: Pool, track: Track, what: str, archive: EvaluationLog | None = None
) -> Evaluate:
    """Return a function that evaluates genomes on the pool, sorted by their genes whatever the number of workers.

    Each worker takes neighbours in that order, which share the most, and keeps the prefixes of the best genomes in
    ``archive``, from which offspring branch off. Tasks' names contain the generation, if there is one; ``what`` names
    the work for ``track``.
    """

    def evaluate(genomes: Sequence[Genome], fidelity: Fidelity) -> Iterator[Evaluation]:
        ordered = tuple(sorted(genomes))
        parts = divided(ordered, pool.size)
        best = archive.best(fidelity, KEPT_GENOMES) if archive else ()
        keep = tuple(evaluation.genome for evaluation in best)
        where = f"g{generation} {fidelity.split}" if (generation := GENERATION.get()) else fidelity.split
        tasks = [
            EvaluateGenomes(setup, part, fidelity, f"eval[{where} {index + 1}/{len(parts)}]", keep)
            for index, part in enumerate(parts)
        ]
        return track(chain.from_iterable(pool.map(tasks)), len(ordered), what)

    return evaluate


def strategy_settings(config: SearchSettings) -> Any:
    """Return the settings of the strategy that ``config`` names."""
    match config.strategy:
        case "genetic":
            return config
        case "optuna":
            return OptunaSettings(config.evaluations, config.population, config.seed)
        case "random":
            return RandomSettings(config.evaluations, config.population, config.seed)
        case _:
            return SolverSettings(seed=config.seed)


def search(
    plan: Plan, artefacts: Artefacts, run: RunDirectory, pool: Pool, track: Track, monitor: Monitor
) -> SearchResult:
    """Run or continue the search, then choose the winner on validation text."""
    config, space = plan.config, plan.space
    tables = artefacts.tables
    given = given_genomes(plan, tables[0], run)
    seeds = {**given.named, **seed_genomes(space, plan.budget, tables)}
    strategy = make_strategy(
        config.search.strategy,
        space,
        plan.budget,
        tables=tables,
        seeds=seeds | {f"given {number}": genome for number, genome in enumerate(given.others)},
        settings=strategy_settings(config.search),
        journal=run.path / layout.JOURNAL,
        prior=artefacts.prior,
    )
    run.record["expected_evaluations"] = strategy.expected_evaluations
    checkpoint = SyncedCheckpoint(run.path / layout.CHECKPOINT, config.digest, run)
    with closing(EvaluationLog(run.path / layout.EVALUATIONS, run.check)) as evaluations:
        with run.stage("search"):
            evaluate = monitor.watch(pool_evaluate(artefacts.setup, pool, track, "searching", evaluations))
            evaluate = with_table_rung(evaluate, space, artefacts.table("reconstruction"))

            def hear(progress: Progress) -> None:
                show_progress(run.path / layout.GENERATIONS, progress)
                monitor.progressed(progress)
                GENERATION.set(progress.generation + 1)

            saved = checkpoint.load()
            generation = GENERATION.set(saved.get("generation", 0) + 1 if saved else 1)
            try:
                run_search(strategy, evaluate, evaluations, config.ladder, checkpoint=checkpoint, on_progress=hear)
            finally:
                GENERATION.reset(generation)
        with run.stage("validation"):
            winner = choose_winner(
                evaluations,
                monitor.watch(pool_evaluate(artefacts.setup, pool, track, "validating")),
                ladder=config.ladder,
                validation=Fidelity("validation", config.text.tokens.validation),
                references=reference_genomes(space, plan.budget, seeds),
                keep=config.search.validation_candidates,
            )
        atomic_write_json(run.path / layout.PARETO, pareto_records(evaluations))
    return SearchResult(winner, seeds, config.search.strategy)


def given_genomes(plan: Plan, table: SensitivityTable, run: RunDirectory) -> StartingGenomes:
    """Return the genomes of ``search.seeds``, as they were read when the run began."""
    if not plan.config.search.seeds:
        return StartingGenomes({})
    return StartingGenomes.from_json(run.record.once("seeds", lambda: starting_genomes(plan, table).to_json()))


def show_progress(path: Path, progress: Progress) -> None:
    """Log one line, and write one to ``path``, in place of what a killed run wrote of this generation."""
    best, found = progress.best, progress.diagnostics
    log.info(
        "generation %d: %d of %d genomes, best loss %.6f (KL %.6f) in %s bytes%s",
        progress.generation, progress.genomes, progress.expected, best.loss, best.kl, f"{best.file_bytes:,}",
        f"; {surrogate_line(found)}" if found else "",
    )  # fmt: skip
    figures = best.to_json()
    record = {"generation": progress.generation, "genomes": progress.genomes}
    record |= {"best_loss": figures["loss"], "best_kl": figures["kl"], **found}
    earlier = path.read_bytes().splitlines()[: progress.generation - 1] if path.exists() else []
    atomic_write_bytes(path, b"".join(line + b"\n" for line in [*earlier, json.dumps(record).encode()]))


def surrogate_line(found: Mapping[str, Any]) -> str:
    """Return a phrase on how well a generation's offspring were predicted, and whether the predictions chose them."""
    chose = "chose" if found["screened"] else "were too poor to choose"
    return (
        f"predicted losses (rank correlation {found['surrogate_correlation']:.2f}, "
        f"{100 * found['surrogate_coverage']:.0f} % within their error) {chose} the offspring"
    )
