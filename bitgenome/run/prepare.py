"""Prepares a search: text, Hessians, scaling, bank, sensitivities. Each stage leaves an artefact for the next one.

Artefacts that several runs can share (Hessians, bank, sensitivities) are under
``<storage_path>/shared/<kind>/<digest>``; a stage whose artefact is there and complete is skipped.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from bitgenome.common import layout
from bitgenome.common.digests import digest_of
from bitgenome.common.files import atomic_write_bytes, atomic_write_text
from bitgenome.observe.progress import Track
from bitgenome.plan.disk import keeps_hessians
from bitgenome.plan.imatrix import imatrix_digest
from bitgenome.plan.memory import heaviest_load
from bitgenome.plan.objective import objective_line, rounds_by_loss
from bitgenome.plan.plan import Plan, compensation_settings
from bitgenome.plan.template import file_layout, template_digest
from bitgenome.run.activations import choose_activations, plan_as_decided, with_activations
from bitgenome.run.bank import build_bank
from bitgenome.run.calibration import calibrate, has_hessians, measure_outputs
from bitgenome.run.compute import RECORDED as RECORDED_COMPUTE
from bitgenome.run.compute import choose_compute
from bitgenome.run.compute_floor import log_compute_floor
from bitgenome.run.sensitivities import measure_sensitivities, table_of
from bitgenome.run.streamed_bank import build_streamed
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.shared import build_once, shared_directory
from evaluators.data.windows import (
    TokenWindows,
)
from evaluators.engine.evaluator import EvaluatorSetup
from evaluators.model.folder import ModelFolder
from evaluators.prepare import bank as banks
from evaluators.prepare import scaling
from evaluators.prepare.input_group import group_file, mean_squares, positions_of
from evaluators.prepare.tensor_importance import MeasureImportance, gene_importance
from exporters.files.imatrix import write_imatrix
from search.allocation.sensitivity import SensitivityTable
from workers.pool.base import Pool

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artefacts:
    """Holds what the search reads."""

    plan: Plan  # of the model that is quantized: the scaled one if channels are scaled
    setup: EvaluatorSetup
    sensitivities: pd.DataFrame  # one row per gene and choice: the configured measure, reconstruction, relative
    prior: tuple[float, ...] | None = None  # one value per gene, if the configuration asks for it

    def table(self, measure: str) -> SensitivityTable:
        """Return the additive table of one measure."""
        return table_of(self.setup.space, self.sensitivities, measure)

    @property
    def tables(self) -> list[SensitivityTable]:
        """The tables that seed the search, the most trusted first."""
        return [self.table(measure) for measure in (self.plan.config.sensitivity.measure, "reconstruction")]


def record_inputs(plan: Plan, windows: TokenWindows, run: RunDirectory) -> None:
    """Write token windows and digests into the run directory.

    Raises UserError if the run was started with another text or model.
    """
    run.record.pin("text", windows.digest)
    run.record.pin("model", plan.folder.digest)
    if digest := template_digest(plan.config):
        run.record.pin("template", digest)
        file_layout(plan.config, plan.folder)  # among what the run uses, now that it has begun
    if digest := imatrix_digest(plan.config.quantization):
        run.record.pin("imatrix", digest)
    atomic_write_bytes(run.path / layout.WINDOWS, windows.to_bytes())


def save_imatrix(plan: Plan, windows: TokenWindows, groups: Sequence[Path], path: Path) -> None:
    """Write the importance matrix of the blocks to ``path``, for llama-quantize.

    ``groups`` are the calibration files of the input groups. The head is left out, as llama-imatrix leaves it out.
    """
    squares = {tensor: group for group in groups for tensor in banks.group_tensors(group)}
    importance, counts = {}, {}
    for tensor in plan.file.searched:
        sources = tensor.gather.names if tensor.gather else ()
        if tensor.name.startswith("blk.") and all(name in squares for name in sources):
            importance[tensor.name] = np.stack([mean_squares(squares[name]).numpy() for name in sources])
            counts[tensor.name] = [positions_of(squares[name]) for name in sources]
    text = windows.windows["calibration"]
    write_imatrix(path, importance, text.size, text.shape[1], plan.config.text.names, counts)


def scale_channels(
    plan: Plan, calibration: Path, groups: list[str], run: RunDirectory, pool: Pool, track: Track
) -> tuple[Plan, Path]:
    """Scale channels if that is not done; return the plan of the scaled model, and the directory of its input groups.

    The choices are written to the run's scaling.json.
    """
    settings, compensation = plan.config.quantization.scaling, compensation_settings(plan)
    parts = (plan.folder.digest, calibration.name, settings.model_dump(), asdict(compensation))
    digest = digest_of(scaling.SCHEMA, *parts)
    directory = shared_directory(plan.config, layout.SCALING_KIND, digest)

    def missing() -> list[str]:
        return [group for group in groups if not scaling.scaling_done(directory, group)]

    def build() -> None:
        tasks = [
            scaling.ScaleGroup(plan.folder.path, group_file(calibration, group), directory, settings, compensation)
            for group in missing()
        ]
        for _ in track(pool.map(tasks), len(tasks), "scaling channels"):
            pass
        scaling.write_scaled_model(plan.folder, directory, groups)

    build_once(
        plan.config,
        directory,
        "the scaling",
        lambda: not missing() and scaling.view_done(plan.folder, directory),
        build,
    )
    folder = ModelFolder(directory / layout.SCALED_MODEL)
    records = [scaling.scaling_record(directory, group) for group in groups]
    atomic_write_text(run.path / layout.SCALING, json.dumps(records, indent=1))
    run.record["scaled_model"] = str(folder.path)
    return replace(plan, folder=folder), directory


def quantized_plan(plan: Plan, run: RunDirectory) -> Plan:
    """Return ``plan`` as the run went on with it: with its scaled channels and the activations it decided on."""
    plan = plan_as_decided(plan, run)
    return replace(plan, folder=ModelFolder(run.artefact("scaled_model"))) if "scaled_model" in run.record else plan


def evaluator_setup(plan: Plan, run: RunDirectory, bank: Path) -> EvaluatorSetup:
    """Return what workers need to evaluate genomes."""
    fitness = plan.config.fitness
    windows = (run.path / layout.WINDOWS).resolve()
    evaluation = plan.config.evaluation
    key = digest_of(str(bank), str(windows), plan.config.digest, evaluation.memory)
    how = evaluation.model_dump() | {"activations": "q8" if evaluation.activations == "q8" else "float"}
    if RECORDED_COMPUTE in run.record:
        how |= {"compute": run.record[RECORDED_COMPUTE]["type"], "chosen": evaluation.compute == "auto"}
    return EvaluatorSetup(
        plan.folder.path.resolve(), bank.resolve(), windows, plan.space, fitness, key, load=heaviest_load(plan), **how
    )


def prepare(plan: Plan, windows: TokenWindows, run: RunDirectory, pool: Pool, track: Track) -> Artefacts:
    """Make all artefacts of a run in order; each stage is timed in the run's record."""
    record_inputs(plan, windows, run)
    device = choose_compute(plan, run, pool)["device"]
    upstream = plan.config.quantization.upstream_level
    if keeps_hessians(plan) or has_hessians(plan, windows, upstream, plan.file.left_out):
        with run.stage("calibration"):
            calibration, groups = calibrate(plan, windows, pool, track, upstream, plan.file.left_out)
            save_imatrix(plan, windows, [group_file(calibration, name) for name in groups], run.path / layout.IMATRIX)
        if plan.config.quantization.scaling.active:
            with run.stage("scaling"):
                plan, calibration = scale_channels(plan, calibration, groups, run, pool, track)
        outputs = output_factors(plan, windows, run, pool, track)
        with run.stage("bank"):
            bank = build_bank(plan, calibration, groups, pool, track, device, outputs)
    else:
        outputs = output_factors(plan, windows, run, pool, track)
        calibration, groups, bank = build_streamed(plan, windows, run, pool, track, outputs)
        save_imatrix(plan, windows, [group_file(calibration, name) for name in groups], run.path / layout.IMATRIX)
    with run.stage("sensitivity"):
        plan = with_activations(plan, choose_activations(plan, evaluator_setup(plan, run, bank), run, pool))
        setup = evaluator_setup(plan, run, bank)
        log_compute_floor(setup, plan.config.text.tokens.sensitivity, pool)
        sensitivities = measure_sensitivities(plan, setup, windows, run, pool, track)
    return Artefacts(plan, setup, sensitivities, mutation_prior(plan, calibration, groups, pool, track))


def output_factors(plan: Plan, windows: TokenWindows, run: RunDirectory, pool: Pool, track: Track) -> Path | None:
    """Return the directory of the output factors, None unless rounding looks at the loss; the log says which it is."""
    log.info("%s", objective_line(plan))
    if not rounds_by_loss(plan):
        return None
    with run.stage("calibration"):
        return measure_outputs(plan, windows, pool, track)


def mutation_prior(
    plan: Plan, calibration: Path, groups: list[str], pool: Pool, track: Track
) -> tuple[float, ...] | None:
    """Return the five-dimensional importance of every gene, or None if the configuration does not ask for it."""
    if plan.config.search.mutation_prior == "none":
        return None
    damping = plan.config.quantization.damping
    tasks = [MeasureImportance(plan.folder.path, group_file(calibration, group), damping) for group in groups]
    found = list(track(pool.map(tasks), len(tasks), "measuring importance"))
    return gene_importance(plan.space, {name: values for part in found for name, values in part.items()})
