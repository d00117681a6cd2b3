"""Compares sensitivity measures: what each costs, how it ranks genomes, and what the exact solver makes of it."""

import math
import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau, spearmanr

from bitgenome.common import layout
from bitgenome.common.errors import UserError
from bitgenome.common.files import atomic_write_bytes, atomic_write_text
from bitgenome.config.run import RunConfig
from bitgenome.observe.progress import Track, tracker
from bitgenome.plan.memory import check_memory
from bitgenome.plan.plan import Plan, make_plan
from bitgenome.plan.text import ready_windows
from bitgenome.run.gene_groups import with_gene_groups
from bitgenome.run.prepare import Artefacts, prepare
from bitgenome.run.search import pool_evaluate
from bitgenome.run.sensitivities import GRADIENTS, Measurement, table_of
from bitgenome.run.session import open_session
from bitgenome.run.writing import written_windows
from bitgenome.storage.opened import note_model
from bitgenome.storage.run_directory import RunDirectory
from evaluators.data.windows import TokenWindows
from search.allocation.exact import exact
from search.allocation.repair import Repair
from search.allocation.sensitivity import SensitivityTable
from search.budget import Budget
from search.loop.archive import EvaluationLog
from search.loop.search import evaluate_missing
from search.types import Fidelity, Genome, SearchSpace
from workers.pool.base import Pool

OF_THE_BANK = ("reconstruction", "relative")  # computed without running any text
SHOWN_RANKS = ("spearman_spread", "spearman_budget")
MEASURED_BY = {  # measure -> the measurement whose frame holds it
    **dict.fromkeys((*OF_THE_BANK, "logit_mse", "kl"), "kl"),
    **{measure: measure for measure in (*GRADIENTS, "around_base")},
}


@dataclass(frozen=True)
class Measured:
    """Holds a measure's table, and what it cost."""

    table: SensitivityTable
    seconds: float
    tokens: int

    def ranking(self, sample: str, genomes: Sequence[Genome], kl: Sequence[float]) -> dict[str, float]:
        """Return the rank correlations of the table's predictions with the KLs of ``genomes``.

        ``sample`` is part of the keys.
        """
        predicted = [self.table.predict(genome) for genome in genomes]
        return {
            f"spearman_{sample}": float(spearmanr(predicted, kl).statistic),
            f"kendall_{sample}": float(kendalltau(predicted, kl).statistic),
        }


def compare_sensitivities(
    config: RunConfig, count: int, bits: Sequence[float], console: Console
) -> tuple[Path, pd.DataFrame]:
    """Return the run directory of ``config``, and the rows of ``comparison_rows`` as a frame.

    The frame is also written to sensitivity-comparison.parquet and .csv. Everything measured is kept and reused.
    ``count`` is the number of random genomes per sample. ``bits`` are budgets of the exact solver in bits per weight;
    none: the configuration's. Raises UserError for a budget that cannot be met.
    """
    plan = make_plan(config)
    budgets_of(plan, bits)  # raises before any work
    check_memory(plan)
    windows = ready_windows(plan)
    plan.folder.check_values(name for gene in plan.space.genes for name in gene.tensors)
    with RunDirectory.owned(config) as directory:
        note_model(config, plan.folder)
        return directory.path, comparison(plan, windows, directory, count, bits, console)


def comparison(
    plan: Plan, ready: TokenWindows | None, directory: RunDirectory, count: int, bits: Sequence[float], console: Console
) -> pd.DataFrame:
    """Measure what is not measured yet, write sensitivity-comparison.parquet and .csv, and return their frame."""
    track = tracker(console)
    with open_session(plan.config, plan.folder, directory.path) as pool:
        windows = written_windows(plan, ready, pool, track, directory.stage)
        plan = with_gene_groups(plan, windows, directory, pool, track)
        artefacts = prepare(plan, windows, directory, pool, track)
        measured = measure_all(artefacts, windows, pool, track)
        with closing(EvaluationLog(directory.path / layout.COMPARISON_LOG, directory.check)) as log:
            rows = comparison_rows(artefacts, measured, count, bits, pool, track, log)
    frame = pd.DataFrame(rows)
    atomic_write_bytes(directory.path / layout.COMPARISON, frame.to_parquet(index=False))
    atomic_write_text(directory.path / layout.COMPARISON_CSV, frame.to_csv(index=False))
    return frame


def budgets_of(plan: Plan, bits: Sequence[float]) -> list[Budget]:
    """Return the budgets of ``bits`` per weight, or the plan's. Raises UserError for one that the space cannot meet."""
    try:
        return [Budget.from_bits_per_weight(plan.space, b) for b in bits] or [plan.budget]
    except ValueError as error:
        raise UserError(str(error)) from None


def measure_all(artefacts: Artefacts, windows: TokenWindows, pool: Pool, track: Track) -> dict[str, Measured]:
    """Return table and cost of every measure of MEASURED_BY."""
    space = artefacts.setup.space
    found = {}
    for measure, by in MEASURED_BY.items():
        measurement = Measurement(artefacts.plan, artefacts.setup, windows, by)
        table = table_of(space, measurement.frame(pool, track), measure)
        free = measure in OF_THE_BANK
        found[measure] = Measured(table, 0.0 if free else measurement.seconds, 0 if free else measurement.tokens_run)
    return found


def comparison_rows(
    artefacts: Artefacts,
    measured: dict[str, Measured],
    count: int,
    bits: Sequence[float],
    pool: Pool,
    track: Track,
    log: EvaluationLog,
) -> list[dict[str, Any]]:
    """Return one row per measure and budget, with KLs on validation text.

    Rank correlations are over ``count`` random genomes of sizes spread from the smallest file to the largest
    ("spread"), and over as many at the plan's budget ("budget").
    """
    plan, space = artefacts.plan, artefacts.setup.space
    rng = random.Random(plan.config.search.seed)
    samples = {
        "spread": random_genomes(space, spread_budgets(space, count), rng),
        "budget": random_genomes(space, [plan.budget] * count, rng),
    }
    budgets = budgets_of(plan, bits)
    solved = {(measure, b): exact(space, b, m.table).genome for measure, m in measured.items() for b in budgets}
    genomes = dict.fromkeys([*samples["spread"], *samples["budget"], *solved.values()])
    fidelity = Fidelity("validation", plan.config.text.tokens.validation)
    evaluate = pool_evaluate(artefacts.setup.in_float32, pool, track, "evaluating genomes")
    kl = {e.genome: e.kl for e in evaluate_missing(list(genomes), fidelity, evaluate, log)}
    rows = []
    for measure, m in measured.items():
        row: dict[str, Any] = {"measure": measure, "seconds": m.seconds, "tokens": m.tokens}
        for sample, members in samples.items():
            row |= m.ranking(sample, members, [kl[genome] for genome in members])
        for budget in budgets:
            genome = solved[measure, budget]
            size = {"bits_per_weight": space.bits_per_weight(genome), "file_bytes": space.file_bytes(genome)}
            rows.append(row | size | {"kl": kl[genome]})
    return rows


def spread_budgets(space: SearchSpace, count: int) -> list[Budget]:
    """Return ``count`` budgets at equal distances between the smallest file and the largest."""
    smallest, largest = space.file_bytes(space.smallest()), space.file_bytes(space.largest())
    return [Budget(smallest + (2 * i + 1) * (largest - smallest) // (2 * count)) for i in range(count)]


def random_genomes(space: SearchSpace, budgets: Sequence[Budget], rng: random.Random) -> list[Genome]:
    """Return one genome for each budget: uniformly random choices, then repaired without any table."""
    drawn = []
    for budget in budgets:
        genome = tuple(rng.randrange(len(gene.formats)) for gene in space.genes)
        drawn.append(Repair(space, budget)(genome, rng))
    return drawn


def show_comparison(frame: pd.DataFrame, path: Path, console: Console) -> None:
    """Show the table of ``bitgenome sensitivity``, one line per measure; it fits into 80 columns with two budgets."""
    budgets = [f"KL@{bits:.2f}" for bits in frame[frame.measure == frame.measure.iloc[0]].bits_per_weight]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("measure", no_wrap=True)
    for name in ("s", "tokens", "ranks", "at budget", *budgets):
        table.add_column(name, justify="right")
    for measure, rows in frame.groupby("measure", sort=False):
        row = rows.iloc[0]
        ranks = [f"{row[name]:.4f}" for name in SHOWN_RANKS]
        seconds = "" if math.isnan(row.seconds) else f"{row.seconds:.1f}"
        table.add_row(str(measure), seconds, f"{row.tokens:,}", *ranks, *(f"{kl:.5f}" for kl in rows.kl))
    console.print("How well each sensitivity measure ranks genomes, and the KL of what it allocates", soft_wrap=True)
    console.print(table)
    for line in (
        "ranks: Spearman's correlation of predicted with measured KL, over random",
        "genomes of all sizes, and over such at the budget; Kendall's is in the table",
        "KL@: of the exact allocation by that measure, at so many bits per weight",
    ):
        console.print(line, soft_wrap=True)
    for file in (layout.COMPARISON_CSV, layout.COMPARISON):
        console.print(f"table  {path / file}", soft_wrap=True)
