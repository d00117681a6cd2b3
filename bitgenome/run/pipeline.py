"""Runs all stages in order, from configuration to proof."""

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial

from rich.console import Console

from bitgenome.common import layout
from bitgenome.common.errors import UserError
from bitgenome.config.run import RunConfig
from bitgenome.observe.monitoring import Monitor, monitor_run
from bitgenome.observe.progress import Track, tracked, tracker
from bitgenome.plan.forecast import duration, forecast, rates_task
from bitgenome.plan.memory import check_memory
from bitgenome.plan.plan import Plan, make_plan
from bitgenome.plan.seeds import check_seeds
from bitgenome.plan.text import keep_windows, ready_windows, windows_of_run
from bitgenome.report.run_page import try_report
from bitgenome.run.export import export_winner, shipped_file, wanted_shards, write_shards
from bitgenome.run.gene_groups import with_gene_groups
from bitgenome.run.healing import decide_variant, heal
from bitgenome.run.outcome import Outcome, comparison_rows, proved, save_outcome
from bitgenome.run.prepare import Artefacts, prepare
from bitgenome.run.proof import prove
from bitgenome.run.search import pool_evaluate, search
from bitgenome.run.session import open_session
from bitgenome.run.writing import written_windows
from bitgenome.storage.opened import note_model, open_model
from bitgenome.storage.run_directory import RunDirectory
from evaluators.data.windows import TokenWindows
from exporters.runtime.llamacpp import LlamaCppError
from exporters.runtime.nearest import nearest_mix
from exporters.template.layout import TemplateLayout
from search.loop.archive import EvaluationLog
from workers.pool.base import Pool

log = logging.getLogger(__name__)


def run(config: RunConfig, console: Console) -> Outcome:
    """Do everything of ``config`` that is not done yet in its run directory, and return the outcome.

    Raises UserError for what the user can fix, and TaskError or WorkersLostError if the workers fail.
    """
    plan = make_plan(config, weights=False)
    check_memory(plan)
    # before the directory is created: text that is too short leaves nothing behind
    resumed = windows_of_run(config)
    if resumed is None:
        check_seeds(plan)
    ready = resumed or ready_windows(plan)
    plan = with_weights(plan, console)
    plan.folder.check_values(name for gene in plan.space.genes for name in gene.tensors)
    with (
        RunDirectory.owned(config) as directory,
        open_session(config, plan.folder, directory.path, directory.stage("workers")) as pool,
        monitor_run(config, pool) as monitor,
    ):
        note_model(config, plan.folder)
        windows = written_windows(plan, ready, pool, tracker(console), directory.stage)
        if resumed is None:
            keep_windows(plan, windows)
        return run_stages(plan, windows, directory, pool, monitor, console)


def with_weights(plan: Plan, console: Console) -> Plan:
    """Return ``plan`` with the weights of its model, of which it may have read no more than a GGUF file's headers.

    Says what full precision means for a model that is not of floats.
    """
    if not plan.folder.parts:
        return plan  # all of a folder's weights were there for planning
    name = plan.folder.parts[0]
    folder = tracked(tracker(console), f"opening {name}", partial(open_model, plan.config))
    if folder.full_precision:
        log.warning("full precision here is %s: that is what genomes are compared with", folder.full_precision)
    if isinstance(plan.file, TemplateLayout):
        return tracked(tracker(console), "comparing with the template", partial(make_plan, plan.config))
    return replace(plan, folder=folder)


def run_stages(
    plan: Plan,
    windows: TokenWindows,
    directory: RunDirectory,
    pool: Pool,
    monitor: Monitor,
    console: Console,
    make_artefacts: Callable[[Plan, TokenWindows, RunDirectory, Pool, Track], Artefacts] = prepare,
) -> Outcome:
    """Run all stages in order; each reads what those before it left, and skips what is there and complete.

    ``make_artefacts`` returns what the search reads. Raises UserError if llama.cpp cannot run the file.
    """
    track = tracker(console)
    expected = expected_seconds(plan, directory, pool)
    variant = decide_variant(plan, directory, pool)  # while no worker holds anything
    plan = with_gene_groups(plan, windows, directory, pool, track)
    unscaled = plan.folder
    artefacts = make_artefacts(plan, windows, directory, pool, track)
    plan, setup = artefacts.plan, artefacts.setup
    directory.record |= {"bank": str(setup.bank), "workers": pool.size}
    directory.record |= {"weights": plan.space.weights, "budget_bytes": plan.budget.file_bytes}
    result = search(plan, artefacts, directory, pool, track, monitor)
    winner = result.winner.evaluation
    with directory.stage("healing"):
        shape = windows.windows["calibration"].shape
        healing = heal(plan, setup, winner, shape, directory, pool, track, variant)
    applied = healing if healing and healing.applied else None
    with directory.stage("test"):
        evaluate = monitor.watch(pool_evaluate(setup.in_float32, pool, track, "measuring on test text"))
        with closing(EvaluationLog(directory.path / layout.EVALUATIONS, directory.check)) as archive:
            rows = comparison_rows(plan, result, applied, evaluate, archive)
            evaluations = len(archive)
    pool.close()  # the rest runs in this process: a cluster may shrink meanwhile
    with directory.stage("export"):
        export = partial(export_winner, plan, setup.bank, directory, winner, applied)
        gguf = tracked(track, "exporting", export)
        shipped = shipped_file(gguf)
        limits = wanted_shards(plan.config.export)
        loaded = write_shards(gguf, limits)[0] if limits else None
    outcome = Outcome(
        budget_bytes=plan.budget.file_bytes,
        winner=result.winner,
        bits_per_weight=plan.space.bits_per_weight(winner.genome),
        rows=rows,
        healing=healing,
        proof=None,
        evaluations=evaluations,
        seconds=directory.record.seconds,
        expected=expected,
        file=shipped,
        gguf=gguf,
        recipe=directory.path / layout.RECIPE,
        run=directory.path,
        full_precision=plan.folder.full_precision,
    )
    if not proved(directory, shipped):  # llama.cpp may refuse the file: what was searched is kept
        save_outcome(directory, outcome, plan)
    with directory.stage("proof"):
        how = plan.config.evaluation
        prove_file = partial(prove, gguf, plan.folder, windows, how.activations, how.memory, plan.file)
        size, imatrix, wanted = gguf.stat().st_size, directory.path / layout.IMATRIX, plan.config.llamacpp_mix
        try:
            with nearest_mix(wanted, plan.space.weights, unscaled, plan.file, size, imatrix) as mix:
                proof = tracked(track, "proving", partial(prove_file, loaded=loaded, beside=mix))
        except (LlamaCppError, FloatingPointError) as error:
            raise UserError(f"expected llama.cpp to run {gguf}, found: {error}") from None
    outcome = replace(outcome, proof=proof, seconds=directory.record.seconds)
    save_outcome(directory, outcome, plan)
    directory.check()
    try_report(directory.path)
    return outcome


def expected_seconds(plan: Plan, directory: RunDirectory, pool: Pool) -> dict[str, float]:
    """Return the seconds that each stage is expected to take, as found at the run's first start and recorded."""

    def probe() -> dict[str, float]:
        with directory.stage("forecast"):
            (rates,) = pool.map([rates_task(plan)])
            stages = forecast(plan, rates, pool.size)
        log.info("expected to take %s on %d workers", duration(sum(s.seconds for s in stages)), pool.size)
        return {stage.stage: round(stage.seconds, 2) for stage in stages}

    return directory.record.once("forecast", probe)
