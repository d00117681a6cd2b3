"""A run from configuration to proof: the order of the stages, and what they leave behind."""

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError

from bitgenome.common import layout
from bitgenome.common.errors import UserError
from bitgenome.common.files import atomic_write_json
from bitgenome.config.run import RunConfig
from bitgenome.observe.logs import log_file
from bitgenome.observe.monitoring import Monitor, monitor_run
from bitgenome.observe.progress import track
from bitgenome.run.gene_groups import plan_of_run, with_gene_groups
from bitgenome.run.healing import Healing, heal, shipped_healing
from bitgenome.run.memory import check_memory
from bitgenome.run.plan import Plan, make_plan
from bitgenome.run.prepare import prepare, quantized_plan, read_windows
from bitgenome.run.proof import Proof, differing_floats, differing_tensors, export_winner, prove
from bitgenome.run.search import SearchResult, pool_evaluate, search
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.staged import staged_pool
from bitgenome.storage.worker_limit import WorkerLimit
from evaluators.data.windows import TokenWindows
from evaluators.model.folder import ModelFolder
from evaluators.prepare.bank import Bank, damaged_tensors
from exporters.runtime.llamacpp import LlamaCppError
from search.allocation.seeds import pure_uniform
from search.budget import Budget
from search.loop.archive import EvaluationLog
from search.loop.search import Evaluate, evaluate_missing
from search.loop.winner import Winner
from search.types import Evaluation, Fidelity
from workers.cluster.open_pool import close_cluster, open_pool
from workers.pool.base import Pool
from workers.storage.folders import is_url

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One line of the final table: a genome measured on test text by simulation."""

    name: str
    file_bytes: int
    bits_per_weight: float
    kl: float
    perplexity: float


@dataclass(frozen=True)
class Outcome:
    """Everything that the closing table shows."""

    budget_bytes: int
    winner: Winner
    bits_per_weight: float
    rows: tuple[Row, ...]  # the winner first
    healing: Healing | None  # None: it was off
    proof: Proof
    evaluations: int
    seconds: dict[str, float]  # by stage
    gguf: Path
    recipe: Path
    run: Path


def run(config: RunConfig, console: Console) -> Outcome:
    """Do all of ``config`` that is not done yet in its run directory."""
    plan = make_plan(config)
    check_memory(plan)
    windows = read_windows(plan)  # before there is a directory: text that is too short leaves nothing behind
    plan.folder.check_finite()
    with RunDirectory.owned(config) as directory, log_file(directory.path / layout.EVENTS, config.name):
        settings = config.workers
        try:
            with directory.stage("workers"):
                pool = open_pool(settings, config.name)
            pool.limit = WorkerLimit(directory.path)
            with staged_pool(pool, config, plan.folder) as staged, monitor_run(config, pool) as monitor:
                return run_stages(plan, windows, directory, staged, monitor, console)
        finally:
            close_cluster()


def export_again(place: Path | str) -> Path:
    """Write GGUF and recipe of a finished run from its record and bank. Raises UserError if it is not finished."""
    directory = RunDirectory.open(place)
    with directory.own():
        best = directory.path / layout.BEST
        if not best.is_file():
            raise UserError(
                f"expected a finished run with {layout.BEST}, found none in {place}: bitgenome resume {place}"
            )
        record = json.loads(best.read_text(encoding="utf-8"))
        winner, healing = Evaluation.from_json(record["winner"]), shipped_healing(directory.path, record)
        plan = plan_of_run(directory)
        directory.pin("model", plan.folder.digest)
        plan = quantized_plan(plan, directory)
        bank = directory.artefact("bank")
        if damaged := damaged_tensors(bank):
            raise UserError(f"expected a whole bank, found {damaged[0]} damaged: bitgenome resume {place} rebuilds it")
        return export_winner(plan, bank, directory, winner, healing)


def verify_file(file: Path | str, place: Path | str) -> Proof:
    """Prove a file with the model and test text of its run. Raises UserError for a file or run that cannot serve.

    A file behind a URL is that of its run's mirror.
    """
    directory = RunDirectory.open(place)
    with directory.own() if directory.mirror else nullcontext():
        windows = directory.path / layout.WINDOWS
        if not windows.is_file():
            raise UserError(f"expected {layout.WINDOWS} with the test text in {place}, found none")
        plan = make_plan(directory.config)
        directory.pin("model", plan.folder.digest)
        folder = quantized_plan(plan, directory).folder
        local = directory.path / str(file).rpartition("/")[2] if is_url(file) else Path(file)
        try:
            check_floats(local, folder, directory.path)
            test = TokenWindows.load(windows).windows["test"]
            return prove(local, folder, test, plan.config.evaluation.activations)
        except (ValueError, LlamaCppError, SafetensorError) as error:
            raise UserError(str(error)) from None


def check_floats(file: Path, folder: ModelFolder, run: Path) -> None:
    """Raise UserError unless the run's own file holds the float32 tensors that the run has measured."""
    best = run / layout.BEST
    record = json.loads(best.read_text(encoding="utf-8")) if best.is_file() else {}
    if record.get("gguf") != file.name:
        return
    healing = shipped_healing(run, record)
    if different := differing_floats(file, folder, healing.tensors if healing else {}):
        raise UserError(
            f"expected the float32 tensors of {run} in {file}, found {different[0]} to differ: bitgenome export {run}"
        )


def run_stages(
    plan: Plan, windows: TokenWindows, directory: RunDirectory, pool: Pool, monitor: Monitor, console: Console
) -> Outcome:
    def tracked(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
        return track(items, total, what, console)

    plan = with_gene_groups(plan, windows, directory, pool, tracked)
    artefacts = prepare(plan, windows, directory, pool, tracked)
    plan = artefacts.plan
    directory.record |= {"bank": str(artefacts.setup.bank), "workers": pool.size}
    directory.record |= {"weights": plan.space.weights, "budget_bytes": plan.budget.file_bytes}
    result = search(plan, artefacts, directory, pool, tracked, monitor)
    winner = result.winner.evaluation
    with directory.stage("healing"):
        shape = windows.windows["calibration"].shape
        healing = heal(plan, artefacts.setup, winner, shape, directory, pool, tracked)
    shipped = healing if healing and healing.applied else None
    with directory.stage("test"):
        evaluate = monitor.watch(pool_evaluate(artefacts.setup.in_float32, pool, tracked, "measuring on test text"))
        with closing(EvaluationLog(directory.path / layout.EVALUATIONS, directory.check)) as archive:
            rows = comparison_rows(plan, result, shipped, evaluate, archive)
            evaluations = len(archive)
    pool.close()  # the rest runs here: a cluster may shrink meanwhile
    with directory.stage("export"):
        gguf = export_winner(plan, artefacts.setup.bank, directory, winner, shipped)
        formats = plan.space.formats_of(winner.genome)
        different = differing_tensors(gguf, plan.folder, Bank(artefacts.setup.bank), formats)
        if different := different + differing_floats(gguf, plan.folder, shipped.tensors if shipped else {}):
            raise UserError(
                f"expected the file to decode to the weights that were scored, found {different[0]} to differ"
            )
    with directory.stage("proof"):
        try:
            proof = prove(gguf, plan.folder, windows.windows["test"], plan.config.evaluation.activations)
        except LlamaCppError as error:
            raise UserError(f"expected llama.cpp to run {gguf}, found: {error}") from None
    outcome = Outcome(
        budget_bytes=plan.budget.file_bytes,
        winner=result.winner,
        bits_per_weight=plan.space.bits_per_weight(winner.genome),
        rows=rows,
        healing=healing,
        proof=proof,
        evaluations=evaluations,
        seconds=directory.seconds,
        gguf=gguf,
        recipe=directory.path / layout.RECIPE,
        run=directory.path,
    )
    save_outcome(directory, outcome, plan)
    return outcome


def comparison_rows(
    plan: Plan, result: SearchResult, healing: Healing | None, evaluate: Evaluate, archive: EvaluationLog
) -> tuple[Row, ...]:
    """Winner, seeds and every uniform level, whatever its size, on test text; each genome once, with all its names.

    The winner comes first, and the healed one, if there is one, behind it.
    """
    space = plan.space
    levels = pure_uniform(space, Budget(space.file_bytes(space.largest())))
    named = {
        "searched": result.winner.evaluation.genome,
        **result.seeds,
        **{f"uniform {level}": genome for level, genome in levels.items()},
    }
    genomes = list(dict.fromkeys(named.values()))
    fidelity = Fidelity("test", plan.config.text.tokens.test)
    rows = []
    for e in evaluate_missing(genomes, fidelity, evaluate, archive):
        name = " = ".join(key for key, value in named.items() if value == e.genome)
        rows.append(Row(name, e.file_bytes, space.bits_per_weight(e.genome), e.kl, e.perplexity))
    if healing and (after := healing.figures["test"].after):
        rows.insert(1, replace(rows[0], name="healed", kl=after.kl, perplexity=after.perplexity))
    return tuple(rows)


def save_outcome(directory: RunDirectory, outcome: Outcome, plan: Plan) -> None:
    winner = outcome.winner
    record = {
        "winner": winner.evaluation.to_json(),
        "validation": validation_record(winner),
        "formats": {name: f.name for name, f in plan.space.formats_of(winner.evaluation.genome).items()},
        "budget_bytes": outcome.budget_bytes,
        "bits_per_weight": outcome.bits_per_weight,
        "rows": [asdict(row) for row in outcome.rows],
        "healing": outcome.healing and outcome.healing.to_json(),
        "proof": outcome.proof.to_json(),
        "gguf": outcome.gguf.name,
    }
    atomic_write_json(directory.path / layout.BEST, record)


def validation_record(winner: Winner) -> dict[str, Any]:
    """For best.json: KL of the winner less the best reference's on validation text, paired, in nats per token.

    A standard error of one window is null, and so is all of a lead where the winner is itself the reference.
    """
    lead = winner.lead
    error = lead.standard_error if lead and isfinite(lead.standard_error) else None
    return {
        "reference": winner.reference,
        "kl_difference": lead and lead.mean,
        "standard_error": error,
        "windows": lead and lead.windows,
        "ties": winner.ties,
    }
