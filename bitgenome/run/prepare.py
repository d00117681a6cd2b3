"""Prepares a search: text, Hessians, scaling, bank, sensitivities. Each stage leaves an artefact for the next one.

Artefacts that several runs can share (Hessians, bank, sensitivities) are under
``<storage_path>/shared/<kind>/<digest>``; a stage whose artefact is there and complete is skipped.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import pandas as pd

from bitgenome.common import layout
from bitgenome.common.digests import digest_of
from bitgenome.common.files import atomic_write_bytes, atomic_write_text
from bitgenome.observe.progress import Track
from bitgenome.plan.memory import heaviest_load
from bitgenome.plan.plan import Plan, compensation_settings
from bitgenome.plan.text import ModelAndText
from bitgenome.run.activations import choose_activations, plan_as_decided, with_activations
from bitgenome.run.compute_floor import log_compute_floor
from bitgenome.run.sensitivities import measure_sensitivities, table_of
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.shared import build_once, shared_directory
from evaluators.data.windows import (
    TokenWindows,
)
from evaluators.engine.evaluator import EvaluatorSetup
from evaluators.model.folder import ModelFolder
from evaluators.prepare import bank as banks
from evaluators.prepare import scaling
from evaluators.prepare.activation_samples import SampleActivations
from evaluators.prepare.activation_samples import readable as samples_readable
from evaluators.prepare.calibration import LOOKUP_WEIGHT, Calibrate, group_file, group_readable, mean_squares
from evaluators.prepare.tensor_importance import MeasureImportance, gene_importance
from exporters.files.imatrix import write_imatrix
from exporters.metadata.tensor_names import tensor_table
from search.allocation.sensitivity import SensitivityTable
from workers.pool.base import Pool

log = logging.getLogger(__name__)

CALIBRATION_SCHEMA = 2  # raise when the content of a group's file changes


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
    atomic_write_bytes(run.path / layout.WINDOWS, windows.to_bytes())


def all_readable(done: Path, readable: Callable[[Path], bool]) -> bool:
    """Return whether the list of groups ``done`` exists, and the file of each group beside it is ``readable``."""
    if not done.is_file():
        return False
    names = group_names(done)
    damaged = [name for name in names if not readable(group_file(done.parent, name))]
    if damaged or not names:
        log.warning("rebuilding %s: %s is damaged", done.parent, damaged[0] if damaged else done.name)
    return bool(names) and not damaged


def group_names(done: Path) -> list[str]:
    """Return the names in a list of groups, [] if the file is damaged."""
    try:
        names = json.loads(done.read_bytes())
    except ValueError:
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def calibrate(
    plan: ModelAndText, windows: TokenWindows, pool: Pool, track: Track, upstream_level: str | None = None
) -> tuple[Path, list[str]]:
    """Compute the input groups' Hessians if they are missing; return their directory and the groups' names in order.

    ``upstream_level`` is the level of the blocks before the one that is calibrated; None: full precision.
    """
    calibration = windows.windows["calibration"]
    text = hashlib.sha256(calibration.tobytes()).hexdigest()
    inputs = plan.folder.digest, text, calibration.shape, LOOKUP_WEIGHT, upstream_level
    digest = digest_of(CALIBRATION_SCHEMA, *inputs)
    directory = shared_directory(plan.config, layout.CALIBRATION_KIND, digest)
    done = directory / layout.GROUPS

    def build() -> None:
        windows_file = directory / layout.WINDOWS
        atomic_write_bytes(windows_file, windows.to_bytes())
        task = Calibrate(plan.folder.path, windows_file, directory, upstream_level)
        (groups,) = track(pool.map([task]), 1, "calibrating")
        atomic_write_text(done, json.dumps(groups))

    build_once(plan.config, directory, "the calibration", lambda: all_readable(done, group_readable), build)
    return directory, group_names(done)


def sample_activations(
    plan: ModelAndText, calibration: Path, groups: Sequence[str], windows: Path, samples: int, pool: Pool, track: Track
) -> Path:
    """Sample the activations of the input groups if they are missing, and return the samples' directory.

    ``calibration`` is the directory of the Hessians, ``windows`` the file of token windows, ``samples`` the number of
    positions.
    """
    directory = shared_directory(plan.config, layout.SAMPLES_KIND, digest_of(calibration.name, samples))
    files = tuple(group_file(calibration, name) for name in groups)
    done = directory / layout.GROUPS

    def build() -> None:
        task = SampleActivations(plan.folder.path, windows.resolve(), files, directory, samples)
        for _ in track(pool.map([task]), 1, "sampling activations"):
            pass
        taken = [name for name in groups if group_file(directory, name).is_file()]
        atomic_write_text(done, json.dumps(taken))

    build_once(plan.config, directory, "the activation samples", lambda: all_readable(done, samples_readable), build)
    return directory


def save_imatrix(plan: Plan, windows: TokenWindows, groups: Sequence[Path], path: Path) -> None:
    """Write the importance matrix of the blocks to ``path``, for llama-quantize.

    ``groups`` are the calibration files of the input groups. The head is left out, as llama-imatrix leaves it out.
    """
    names = {entry.hf_name: entry.gguf_name for entry in tensor_table(plan.folder)}
    importance = {}
    for group in groups:
        squares = mean_squares(group).numpy()
        members = [names[name] for name in banks.group_tensors(group)]
        importance.update({name: squares for name in members if name.startswith("blk.")})
    text = windows.windows["calibration"]
    write_imatrix(path, importance, tokens=text.size, window=text.shape[1], dataset=plan.config.text.source)


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


def build_bank(plan: Plan, calibration: Path, groups: list[str], pool: Pool, track: Track) -> Path:
    """Build the missing or damaged tensors of the bank, and return its directory."""
    formats = {tensor: gene.formats for gene in plan.space.genes for tensor in gene.tensors}
    names = {tensor: tuple(f.name for f in choices) for tensor, choices in formats.items()}
    settings = compensation_settings(plan)
    how = plan.config.quantization.importance
    digest = banks.bank_digest(plan.folder.digest, calibration.name, formats, settings, plan.sparsity, how)
    directory = shared_directory(plan.config, layout.BANK_KIND, digest)

    def missing() -> set[str]:
        return {tensor for tensor in names if not banks.readable(directory, tensor, names[tensor])}

    def done() -> bool:
        return (directory / layout.MANIFEST).is_file() and not banks.damaged_tensors(directory) and not missing()

    def build() -> None:
        for tensor in banks.damaged_tensors(directory):
            log.warning("rebuilding %s: its bank file is missing or damaged", tensor)
            banks.tensor_file(directory, tensor).unlink(missing_ok=True)
        absent = missing()
        tasks = []
        for group in groups:
            file = group_file(calibration, group)
            tensors = names.keys() & banks.group_tensors(file)
            if absent & tensors:
                work = sum(prod(plan.folder.shapes[tensor]) for tensor in tensors)
                where = (plan.folder.path, file, directory)
                tasks.append(banks.BuildBankGroup(*where, names, settings, plan.sparsity, how, work))
        tasks.sort(key=lambda task: -task.work)  # the largest first, so that none runs alone at the end
        for _ in track(pool.map(tasks), len(tasks), "building the bank"):
            pass
        banks.write_manifest(directory, list(names))

    build_once(plan.config, directory, "the bank", done, build)
    return directory


def evaluator_setup(plan: Plan, run: RunDirectory, bank: Path) -> EvaluatorSetup:
    """Return what workers need to evaluate genomes."""
    fitness = plan.config.fitness
    windows = (run.path / layout.WINDOWS).resolve()
    evaluation = plan.config.evaluation
    key = digest_of(str(bank), str(windows), plan.config.digest, evaluation.memory)
    how = evaluation.model_dump() | {"activations": "q8" if evaluation.activations == "q8" else "float"}
    return EvaluatorSetup(
        plan.folder.path.resolve(), bank.resolve(), windows, plan.space, fitness, key, load=heaviest_load(plan), **how
    )


def prepare(plan: Plan, windows: TokenWindows, run: RunDirectory, pool: Pool, track: Track) -> Artefacts:
    """Make all artefacts of a run in order; each stage is timed in the run's record."""
    record_inputs(plan, windows, run)
    with run.stage("calibration"):
        calibration, groups = calibrate(plan, windows, pool, track, plan.config.quantization.upstream_level)
        save_imatrix(plan, windows, [group_file(calibration, name) for name in groups], run.path / layout.IMATRIX)
    if plan.config.quantization.scaling.active:
        with run.stage("scaling"):
            plan, calibration = scale_channels(plan, calibration, groups, run, pool, track)
    with run.stage("bank"):
        bank = build_bank(plan, calibration, groups, pool, track)
    with run.stage("sensitivity"):
        plan = with_activations(plan, choose_activations(plan, evaluator_setup(plan, run, bank), run, pool))
        setup = evaluator_setup(plan, run, bank)
        log_compute_floor(setup, plan.config.text.tokens.sensitivity, pool)
        sensitivities = measure_sensitivities(plan, setup, windows, run, pool, track)
    return Artefacts(plan, setup, sensitivities, mutation_prior(plan, calibration, groups, pool, track))


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
